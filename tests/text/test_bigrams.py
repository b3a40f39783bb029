"""A GPT that begins as a bigram model: what is counted, and what its logits are."""

import math
from collections import Counter

import pytest
import torch

from model import GPT, IGNORE, GPTConfig
from smallgpt.text import bigrams
from smallgpt.text.bigrams import SMOOTHING, Pairs, begin_with_bigrams, count_pairs, factorise


def test_each_pair_of_the_first_epoch_is_counted(settings, ready, monkeypatch):
    """Pairs in more than one of the pieces that are read at a time would be miscounted."""
    monkeypatch.setattr(bigrams, "AT_ONCE", 100)
    corpus = ready(settings())
    pairs = count_pairs(corpus, seed=3, vocab_size=corpus.tokenizer.vocab_size)
    x, y = corpus.train_batch(range(corpus.blocks_per_epoch), seed=3)
    expected = Counter()
    for row_x, row_y in zip(x.tolist(), y.tolist(), strict=True):
        expected.update((a, b) for a, b in zip(row_x, row_y, strict=True) if b != IGNORE)
    keys = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    assert dict(zip(keys, pairs.count.tolist(), strict=True)) == expected


def test_of_a_large_corpus_only_the_beginning_is_counted(settings, ready, monkeypatch):
    """A corpus of any size would otherwise be read whole before the first step."""
    monkeypatch.setattr(bigrams, "COUNTED", 640)
    corpus = ready(settings())
    pairs = count_pairs(corpus, seed=0, vocab_size=corpus.tokenizer.vocab_size)
    _, y = corpus.train_batch(range(40), seed=0)
    assert corpus.blocks_per_epoch > 40
    assert int(pairs.count.sum()) == int((y != IGNORE).sum())


def test_with_enough_coordinates_the_logits_are_the_smoothed_bigram_model():
    """A wrong scale, weight or sign in the factors would show here: nothing is left out of them."""
    V, C = 12, 16
    draw = torch.Generator().manual_seed(0)
    table = torch.randint(0, 40, (V, V), generator=draw) * (torch.rand(V, V, generator=draw) < 0.7)
    first, second = table.nonzero(as_tuple=True)
    pairs = Pairs(first, second, table[first, second])
    embedding, head = factorise(pairs, V, C, torch.float64, draw)
    assert embedding.square().mean(1).sqrt() == pytest.approx(torch.ones(V), abs=1e-9)

    count = table.double()
    frequency = (count.sum(0) + 0.5) / (count.sum(0) + 0.5).sum()
    given = (count + SMOOTHING * frequency) / (count.sum(1, keepdim=True) + SMOOTHING)
    information = (given / frequency).log().clamp(min=0) * (table > 0)
    expected = (frequency.log() + information).log_softmax(1)
    difference = (embedding @ head.T).log_softmax(1) - expected
    per_row = difference.abs().amax(1)
    assert per_row.sort().values[:-1].max() < 1e-9  # the longest row was shortened


def test_a_model_begins_with_what_its_text_tells_of_pairs(settings, ready):
    """Blocks that already added something, or a norm that changed the rows, would spoil it."""
    corpus = ready(settings())
    V = corpus.tokenizer.vocab_size
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(V, block_size=16, n_layer=2, n_head=2, n_embd=32, tie_weights=False)
    ).double()
    x, y = corpus.val_batch(range(corpus.n_val_blocks))
    n_targets = int((y != IGNORE).sum())
    with torch.no_grad():
        untrained = float(model(x, y)) / n_targets
        words = begin_with_bigrams(model, corpus, seed=0)
        begun = float(model(x, y)) / n_targets
        by_pair = model.wte.weight @ model.lm_head.weight.T
        torch.testing.assert_close(model(x), by_pair[x], atol=1e-4, rtol=0)  # the norm's epsilon
    assert words.startswith("begins with ") and "pairs of tokens" in words
    pairs = count_pairs(corpus, 0, V)
    share = torch.zeros(V).index_add(0, pairs.second, pairs.count.float()).div(pairs.count.sum())
    entropy = -float((share * share.clamp(min=1e-9).log()).sum())
    assert untrained == pytest.approx(math.log(V), rel=0.05)
    assert begun < entropy - 0.5  # better than knowing how frequent each token is


def test_two_runs_of_one_seed_begin_alike(settings, ready):
    """A draw from the global generator would make a run depend on what was drawn before."""
    corpus = ready(settings())
    config = GPTConfig(
        corpus.tokenizer.vocab_size,
        block_size=16,
        n_layer=1,
        n_head=2,
        n_embd=16,
        tie_weights=False,
    )
    begun = []
    for used in (0, 5):
        torch.rand(used)
        model = GPT(config)
        begin_with_bigrams(model, corpus, seed=1)
        begun.append((model.wte.weight, model.lm_head.weight))
    assert torch.equal(begun[0][0], begun[1][0]) and torch.equal(begun[0][1], begun[1][1])
