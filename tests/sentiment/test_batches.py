"""Labelled examples as batches: nothing lost, little padding, and cut where it hurts least."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smallgpt.sentiment.batches import (
    Buckets,
    Encoded,
    Inputs,
    drop_tokens,
    encode,
    encode_text,
    length_batches,
    score,
    share_rows,
)
from smallgpt.sentiment.sets import Example
from smallgpt.tokenizer import TokenizerSettings, train


def skewed(n: int) -> np.ndarray:
    """Lengths like those of reviews: most are short, the longest are cut at the block."""
    return np.random.default_rng(0).lognormal(4.2, 0.9, n).clip(2, 512).astype(int)


@pytest.mark.parametrize("n, size", [(1, 4), (7, 8), (64, 16), (1000, 16), (5003, 32)])
def test_an_epoch_has_every_example_once(n, size):
    buckets = Buckets(skewed(n), size, seed=3)
    k = buckets.steps_per_epoch
    assert k == math.ceil(n / size)
    orders = []
    for epoch in (0, 1, 7):
        batches = [buckets.of(epoch * k + i) for i in range(k)]
        assert sorted(np.concatenate(batches)) == list(range(n))
        assert sorted(map(len, batches)) == sorted(
            [size] * (n // size) + [n % size] * (n % size > 0)
        )
        orders.append(np.concatenate(batches).tolist())
    other = Buckets(skewed(n), size, seed=4)
    if n > 50:
        assert len({*map(tuple, orders)}) == 3
        assert np.concatenate([other.of(i) for i in range(k)]).tolist() != orders[0]
    # a pure function of (seed, step): whatever was asked before
    for step in (7 * k + k // 2, 0, 3 * k - 1):
        assert Buckets(skewed(n), size, seed=3).of(step).tolist() == buckets.of(step).tolist()


def test_there_is_little_padding_and_still_a_mixture():
    lengths, size = skewed(5003), 32
    buckets = Buckets(lengths, size, seed=0)
    batches = [buckets.of(i) for i in range(buckets.steps_per_epoch)]
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert 1 - lengths.sum() / padded < 0.1
    chance = np.array_split(np.random.default_rng(1).permutation(len(lengths)), len(batches))
    assert 1 - lengths.sum() / sum(len(b) * lengths[b].max() for b in chance) > 0.5  # what it saves
    # no length has a part of the epoch to itself, and neighbours change from epoch to epoch
    means = [lengths[b].mean() for b in batches]
    assert abs(np.mean(means[:78]) - np.mean(means[78:])) < 0.25 * np.mean(means)
    first, later = (
        {*batches[0]},
        (buckets.of(buckets.steps_per_epoch + i) for i in range(len(batches))),
    )
    assert max(len(first & {*b}) for b in later) < size // 2


@pytest.mark.parametrize("n", [1, 2, 3, 16, 33])
@pytest.mark.parametrize("size, depth", [(1, 1), (2, 1), (3, 1), (1, 2), (2, 4)])
def test_the_shares_of_all_ranks_are_the_batch(n, size, depth):
    rows = np.random.default_rng(0).permutation(100)[:n]
    ranks = [SimpleNamespace(data_rank=r, data_size=size, depth=depth) for r in range(size)]
    for longest, most in ((10, 10**6), (10, 25), (10, 19), (10, 1), (48, 400)):
        shares = [share_rows(rows, longest, rank, most) for rank in ranks]
        assert len(shares[0]) % depth == 0  # or a pipeline would not be filled
        assert sorted(np.concatenate([part for parts in shares for part in parts])) == sorted(rows)
        assert len({*map(len, shares)}) == 1  # each micro-batch is a collective
        for part in (part for parts in shares for part in parts):
            assert len(part) * longest <= most or len(part) == 1
        counts = [sum(map(len, parts)) for parts in shares]
        assert max(counts) - min(counts) <= 1


def test_tokens_left_out_close_up_and_the_first_and_the_separator_stay():
    """Token 1 begins each text, 9 separates, 0 is padding; the others count up, so their order can
    be seen."""
    torch.manual_seed(0)
    lengths = torch.tensor([40, 3, 1, 40])
    idx = torch.where(torch.arange(40) < lengths[:, None], torch.arange(40) + 10, 0)
    idx[:, 0], idx[0, 20] = 1, 9
    left = []
    for width in (0, 40):
        for _ in range(200):
            x, n = drop_tokens(idx, lengths, 0.3, fill=0, sep=9, width=width)
            assert (
                x.size(1) == (width or n.max())
                and n[2] == 1
                and (x[:, 0] == 1).all()
                and (x[0] == 9).sum() == 1
            )
            for row, was, k in zip(x, idx, n.tolist(), strict=True):
                assert (row[k:] == 0).all() and set(row[:k].tolist()) <= set(was.tolist())
                ordered = row[:k][row[:k] >= 10]
                assert (ordered.diff() > 0).all()
            left.append(int(n[3]))
    assert np.mean(left) == pytest.approx(1 + 0.7 * 39, rel=0.02)
    assert torch.equal(drop_tokens(idx, lengths, 0.0, 0, 9, 40)[0], idx)
    for words in ([1, 33], [1, 33, 9, 34]):  # neither a text nor a pair loses all its words
        idx, n = torch.tensor([words] * 50), torch.full((50,), len(words))
        assert ((drop_tokens(idx, n, 0.9, 0, 9, 0)[0] > 9).sum(1) >= 1).all()


@pytest.fixture(scope="module")
def tok():
    return train(TokenizerSettings("char", min_count=1), ["abcdefghijklmnopqrstuvwxyz0123456789"])


def test_a_long_text_keeps_its_beginning_and_its_end(tok):
    text = "abcdefghijklmnopqrstuvwxyz"
    cases = {
        27: text,
        26: text,
        25: text[:13] + text[14:],
        10: "abcdevwxyz",
        9: "abcdewxyz",
        1: "a",
    }
    for block, kept in cases.items():
        ids, cut = encode_text(tok, text, "", block, [])
        assert tok.decode(ids) == kept and len(ids) == len(kept) and cut == (block < 26)
    ids, cut = encode_text(tok, text, "", 10, [tok.bos])
    assert ids[0] == tok.bos and tok.decode(ids) == "abcdewxyz" and cut
    ids, cut = encode_text(tok, text * 10_000, "", 8, [tok.bos])
    assert tok.decode(ids) == "abcdxyz" and len(ids) == 8 and cut


@pytest.mark.parametrize(
    "a, b, block, kept_a, kept_b",
    [
        (26, 26, 21, 10, 10),  # a separator between ten and ten
        (26, 3, 21, 17, 3),  # the longer side gives first
        (3, 26, 21, 3, 17),
        (26, 26, 20, 10, 9),
        (8, 12, 21, 8, 12),  # fits exactly
        (12, 8, 20, 11, 8),
        (26, 26, 3, 1, 1),
    ],
)
def test_a_pair_keeps_both_sides(tok, a, b, block, kept_a, kept_b):
    text = "abcdefghijklmnopqrstuvwxyz"
    ids, cut = encode_text(tok, text[:a], text[:b][::-1], block, [])
    at = ids.index(tok.sep)
    assert (at, len(ids) - at - 1) == (kept_a, kept_b) and ids.count(tok.sep) == 1
    assert cut == ((kept_a, kept_b) != (a, b)) and len(ids) <= block
    for side, whole in ((tok.decode(ids[:at]), text[:a]), (tok.decode(ids[at:]), text[:b][::-1])):
        half = len(side) // 2
        assert whole.startswith(side[: len(side) - half]) and whole.endswith(
            side[len(side) - half :]
        )
    longer, cut = encode_text(tok, text[:a] * 5000, text[:b], block, [tok.bos])
    assert len(longer) == block and cut and longer[0] == tok.bos and tok.sep in longer


def test_the_first_word_is_the_token_that_it_is_later_on(tok):
    """BPE joins the space before a word to it, so a text's first word was another token, rarer or
    in pieces."""
    bpe = train(
        TokenizerSettings("bpe", vocab_size=300),
        ["the good film and the good plot are so good"] * 9,
    )
    ids, _ = encode_text(bpe, "good plot", "good film", 20, [])
    first, again = ids[0], ids[ids.index(bpe.sep) + 1]
    assert first == again == bpe.encode("so good")[-1] != bpe.encode("good")[0]
    assert bpe.decode(ids[: ids.index(bpe.sep)]) == " good plot"
    for text in ("很好", "12 good", "'good'", "", " good"):  # no word to be joined to
        assert encode_text(bpe, text, "", 40, [])[0] == bpe.encode(text)
    assert encode_text(tok, "good", "", 9, [])[0] == tok.encode(
        "good"
    )  # characters: a space is one of its own


def test_what_was_cut_is_counted(tok):
    sizes = [(5, 0, "x"), (6, 0, "y"), (2, 2, "y"), (3, 3, "x")]
    found = encode(
        [Example("a" * n, "b" * m, label) for n, m, label in sizes], ["x", "y"], tok, 5, []
    )
    assert (
        found.cut == 2
        and found.labels.tolist() == [0, 1, 1, 0]
        and found.lengths.tolist() == [5, 5, 5, 5]
    )


@pytest.mark.parametrize("n_texts, max_tokens, size", [(7, 8, 2), (7, 8, 3), (2, 64, 4)])
def test_all_ranks_score_in_the_same_number_of_passes(n_texts, max_tokens, size):
    """Regression: a rank used to make one pass less where the batches ran out, and a layout whose
    forward communicates would have waited for it for ever."""
    ids = [np.arange(1, 3 + i % 4) for i in range(n_texts)]
    cpu = torch.device("cpu")
    inputs = Inputs(Encoded(ids, np.zeros(n_texts, np.int64), 0), 0, 0, cpu)
    batches = length_batches(inputs.data.lengths, max_tokens, 0, cpu)
    passes, parts = [], []

    def evaluate(x, lengths, targets, reads):
        passes[-1] += 1
        return torch.stack([x.sum(1), lengths], dim=1).double()

    for rank in range(size):
        passes.append(0)
        strategy = SimpleNamespace(
            data_rank=rank,
            data_size=size,
            shapes={"head.weight": (2, 1)},
            evaluate=evaluate,
            settle=lambda: None,
            sum=lambda *values: list(values),
        )
        parts.append(score(strategy, inputs, max_tokens))
    assert passes == [math.ceil(len(batches) / size)] * size
    assert np.sum(parts, axis=0).tolist() == [[sum(one), len(one)] for one in ids]
