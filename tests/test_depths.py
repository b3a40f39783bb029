"""bench/depths.py: the states that it compares are those that a classifier reads."""

import numpy as np
import torch

from bench import depths
from model import GPT, GPTClassifier, GPTConfig
from smallgpt.sentiment.batches import Encoded, Inputs


def test_a_depth_gives_what_a_classifier_of_so_many_blocks_reads():
    """Else a depth would look better or worse than `trunk_blocks` makes it, or a text's state would
    be that of its cue."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "block_size": 16, "n_head": 2, "n_embd": 8}
    gpt = GPT(GPTConfig(n_layer=2 * depths.STRIDE, **shape)).eval()
    texts = [np.arange(2, 2 + length) for length in (5, 9, 7)]
    cue = np.array([40, 41])
    with_cue = [np.concatenate([text, cue]) for text in texts]
    inputs = Inputs(Encoded(with_cue, np.zeros(3, np.int64), 0), 0, 0, torch.device("cpu"))
    with torch.no_grad():
        states = depths.read_states(gpt, inputs, len(cue), 24)
    assert states.shape == (2, 2, 3, 8)

    for depth in range(2):
        lowest = GPT(GPTConfig(n_layer=(depth + 1) * depths.STRIDE, **shape)).eval()
        lowest.load_state_dict(gpt.state_dict(), strict=False)
        classifier = GPTClassifier(lowest, 2).eval()
        classifier.first_block = lowest.config.n_layer  # the head alone would train
        for place, rows in enumerate((texts, with_cue)):
            for number, row in enumerate(rows):
                tokens = torch.from_numpy(row)[None]
                with torch.no_grad():
                    read = classifier.run_frozen(tokens, torch.tensor([len(row)]))
                torch.testing.assert_close(states[place, depth, number], read[0])


def test_a_head_finds_what_one_of_the_joined_depths_knows():
    """Else the row of joined depths would say nothing."""
    torch.manual_seed(0)
    labels = {"train": torch.arange(200) % 2, "validation": torch.arange(100) % 2}
    states = {}
    for split, truth in labels.items():
        states[split] = torch.randn(2, len(truth), 4)
        states[split][1, :, 2] += 8 * truth
    noise = depths.head_accuracy(states["train"][:1], states["validation"][:1], labels)
    joined = depths.head_accuracy(states["train"], states["validation"], labels)
    assert float(noise) < 70 and float(joined) > 98
