"""Export a run for other programs: transformers, ONNX Runtime, llama.cpp.

    python scripts/export.py checkpoints/quickstart to=hf out=quickstart-hf
    python scripts/export.py checkpoints/sentiment to=onnx out=sentiment-onnx
    python scripts/export.py checkpoints/quickstart to=gguf out=quickstart-gguf

The first word is the run, whose best checkpoint is taken, or a step folder. docs/export.md tells
what is exact where. A folder that was written with to=hf can be opened again, by chat.py, and as
trunk= of a fine-tuning.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, settings
from smallgpt.console import UserError, shell_word
from smallgpt.files import expand_user
from smallgpt.weights import export, export_gguf, export_hf, export_onnx

WRITERS = {"hf": export_hf.write, "onnx": export_onnx.write, "gguf": export_gguf.write}


@dataclass
class ExportSettings:
    run: str = ""  # run folder (its best checkpoint) or step folder; run= may be left out
    to: Literal["hf", "onnx", "gguf"] = "hf"  # hf = for transformers, gguf = for llama.cpp
    out: str = ""  # the new folder


def main() -> None:
    s = settings.load(ExportSettings, name_run(sys.argv[1:]), doc=__doc__)
    if not (s.run and s.out):
        raise UserError(
            "give a run and out=FOLDER: "
            "python scripts/export.py checkpoints/quickstart to=hf out=quickstart-hf"
        )
    out = expand_user(s.out)
    source = export.open_source(s.run)
    with export.new_folder(out) as folder:
        WRITERS[s.to](source, folder)
    for file in sorted(out.iterdir()):
        print(f"{file.stat().st_size:>12,}  {shell_word(file)}")


def name_run(words: list[str]) -> list[str]:
    """The command line with the run written as run=FOLDER."""
    runs, _ = settings.split_words(words)
    if len(runs) > 1:
        raise UserError(f"one run at a time, not {' and '.join(runs)}")
    return [f"run={word}" if word in runs else word for word in words]


if __name__ == "__main__":
    console.run(main)
