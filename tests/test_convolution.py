"""bench/convolution.py: what a trunk has to beat."""

import re
import sys

from bench import convolution
from fine_tuning import made
from helpers import write_csv


def test_it_learns_which_word_decides(tmp_path, monkeypatch, capsys):
    """A baseline that does not learn makes every trunk look good."""
    path = write_csv(tmp_path / "made.csv", made(400))
    sizes = ["n_embd=32", "filters=16", "tokenizer.vocab_size=400", "batch_size=16", "lr=1e-2"]
    words = ["set=csv", f"path={path}", *sizes, "seeds=[0,1]", "epochs=4"]
    monkeypatch.setattr(sys, "argv", ["convolution.py", *words])
    convolution.main()
    printed = capsys.readouterr().out
    assert printed.startswith("| seed | validation after each epoch | test: accuracy, macro_f1 |")
    assert len(re.findall(r"^\| [01] \| [\d.]+(?:, [\d.]+){3} \|", printed, flags=re.M)) == 2
    mean = re.search(r"csv, accuracy on test: ([\d.]+) ± [\d.]+", printed)
    assert float(mean[1]) > 85  # 60 % are good
