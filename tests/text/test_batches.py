"""Token files -> batches: a pure function of (data, seed, indices)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model import IGNORE
from smallgpt.console import UserError
from smallgpt.text.batches import Corpus, permute
from smallgpt.text.formats import read_dialogues
from smallgpt.text.tokens import held_out, prepare
from smallgpt.tokenizer import TokenizerSettings


def numbered(*lengths: int, weights=None, block_size=10, val=35, eval_blocks=0) -> Corpus:
    """A corpus whose k-th token is k (special ids lie below 10): batches name positions."""

    class Special:
        bos, pad = 1, 4

        @staticmethod
        def token_bytes():
            return np.arange(10**6)

    starts = np.cumsum([10, *lengths])
    sources = [
        [np.arange(a, a + n), np.arange(v * val, (v + 1) * val) + 500_000]
        for v, (a, n) in enumerate(zip(starts, lengths, strict=False))
    ]
    return Corpus(Special(), sources, weights or [1.0] * len(lengths), "f", block_size, eval_blocks)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 1000])
def test_permute_is_a_shuffle(n):
    orders = [permute(np.arange(n), n, np.array([key], np.uint64)).tolist() for key in range(200)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n > 4:
        assert len(set(map(tuple, orders))) > min(100, n)
    firsts = np.bincount([order[0] for order in orders], minlength=n)
    assert firsts.max() < 200 / n + 8 * (200 / n) ** 0.5 + 4  # no place is favoured


def test_permute_needs_no_memory_for_a_billion_blocks():
    order = permute(np.arange(10**5), 10**9, np.array([3], np.uint64))
    assert len(set(order.tolist())) == 10**5 and 0 <= order.min() and order.max() < 10**9
    assert abs(order.mean() / 10**9 - 0.5) < 0.01


def test_a_batch_is_a_pure_function_of_its_indices(settings, ready):
    """A row is the same however ranks and accumulation cut the range, and whatever came before."""
    made, total = ready(settings()), 50
    x, y = made.train_batch(range(total), seed=3)
    again = ready(settings())
    for cut in (1, 7, 25):
        parts = [
            again.train_batch(range(i, min(i + cut, total)), seed=3)
            for i in reversed(range(0, total, cut))
        ]
        assert torch.equal(torch.cat([p[0] for p in reversed(parts)]), x)
        assert torch.equal(torch.cat([p[1] for p in reversed(parts)]), y)
    assert torch.equal(again.train_batch(range(1, total, 4), seed=3)[0], x[1::4])
    assert not torch.equal(again.train_batch(range(total), seed=4)[0], x)
    far = range(10**12, 10**12 + 4)
    assert torch.equal(again.train_batch(far, 3)[0], made.train_batch(far, 3)[0])
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (total, 16)
    assert x.is_contiguous() and y.is_contiguous()


def test_targets_are_the_next_tokens_and_never_a_dialogue_start(settings, ready):
    made = ready(settings())
    x, y = made.train_batch(range(made.blocks_per_epoch), seed=0)
    starts = x[:, 1:] == made.tokenizer.bos
    assert starts.any() and torch.equal(y[:, :-1], torch.where(starts, IGNORE, x[:, 1:]))
    assert not (y == made.tokenizer.bos).any()


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63])
def test_an_epoch_visits_every_block_of_every_source_once(seed):
    made = numbered(1005, 333, 10, 4)  # the last two: exactly one block, less than one
    assert made.blocks_per_epoch == 100 + 33 + 1 + 1
    orders = set()
    for epoch in range(5):
        x, _ = made.train_batch(range(epoch * 135, (epoch + 1) * 135), seed)
        seen = x.flatten().tolist()
        long = [token for token in seen if token < 10 + 1005 + 333 + 10]
        assert len(long) == len(set(long)) == 1000 + 330 + 10
        assert {t for t in seen if t not in set(long)} == {1358, 1359, 1360, 1361}
        orders.add(tuple(seen))
    assert len(orders) == 5


def test_each_epoch_shifts_the_block_grid():
    made = numbered(1005)
    firsts = [made.train_batch(range(e * 100, e * 100 + 100), 0)[0][:, 0] for e in range(30)]
    grids = [set(((first - 10) % 10).tolist()) for first in firsts]
    assert (
        len(set().union(*grids)) == 10
    )  # every shift comes up; 1005 is no multiple, so one may wrap


def test_weights():
    made = numbered(1000, 400, 1000, weights=[1, 2, 0.5])
    assert made.blocks_per_epoch == 100 + 80 + 50
    counts = []
    for epoch in range(2):
        x, _ = made.train_batch(range(epoch * 230, (epoch + 1) * 230), 0)
        counts.append(np.bincount(x.flatten() - 10, minlength=2400))
    for count in counts:
        assert (count[:1000] == 1).all()
        assert (count[1000:1400] == 2).all()  # twice an epoch
        assert count[1400:].max() == 1 and count[1400:].sum() == 500
    assert (counts[0] + counts[1])[1400:].min() == 1  # the second epoch reads the other half


def test_validation_reads_every_token_once_in_order():
    made = numbered(100, 100, val=33)  # 66 tokens, block_size 10 -> 65 targets in 7 blocks
    assert made.n_val_blocks == 7
    x, y = made.val_batch(range(7))
    assert y[y != IGNORE].tolist() == [500_000 + i for i in range(1, 66)]
    assert x.flatten()[:66].tolist() == [500_000 + i for i in range(66)]
    assert (x.flatten()[66:] == 4).all() and (y.flatten()[65:] == IGNORE).all()
    assert torch.equal(torch.cat([made.val_batch(range(i, i + 1))[0] for i in range(7)]), x)
    assert made.val_batch(range(0))[0].shape == (0, 10)
    assert (made.val_batch(range(7, 9))[1] == IGNORE).all()  # ranks may run past the end together
    few = numbered(100, 100, val=33, eval_blocks=3)
    assert few.n_val_blocks == 3 and few.val_batch(range(3))[0][:, 0].tolist() == [
        500_000,
        500_020,
        500_040,
    ]


def test_val_bytes_are_those_of_the_file(settings, ready):
    data = settings(eval_blocks=0)
    made = ready(data)
    _, y = made.val_batch(range(made.n_val_blocks))
    dialogues = [dialogue.turns for dialogue in read_dialogues(data.path[0])]
    held = [turns for turns in dialogues if held_out(turns, data)]
    assert made.val_bytes(y) == sum(len("\n".join(turns).encode()) + 2 for turns in held)


def speak(path: Path, n: int, prompt: str = "") -> Path:
    """n dialogues with roles in JSON Lines, half of them longer; all with a prompt, if one is
    given."""
    lines = []
    for i in range(n):
        turns = [("user", f"第{i}个问题?"), ("assistant", f"reply {i * i}")]
        if i % 2:
            turns += [("human", f"more {i}?"), ("gpt", "好的")]
        if prompt:
            turns.insert(0, ("system", prompt))
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    return path


def test_targets_are_the_turns_of_the_assistant_and_what_closes_them(tmp_path, settings, ready):
    """The rest is read all the same. A loss on other turns teaches the model to ask, not to
    answer."""
    data = settings(speak(tmp_path / "a.jsonl", 200, "be kind"), loss_on="assistant", eval_blocks=0)
    made = ready(data, block_size=32)
    tokenizer = made.tokenizer
    x, y = made.train_batch(range(50), 0)
    is_learned = y != IGNORE
    assert x.min() >= 0 and (y[:, :-1] == x[:, 1:])[is_learned[:, :-1]].all()
    read, learned = (set(tokenizer.decode(ids.flatten())) for ids in (x, y[is_learned]))
    assert set("第个问题?bm") <= read and not set("第个问题?bm") & learned

    learned = []
    for dialogue in read_dialogues(data.path[0]):
        if held_out(dialogue.spoken, data):
            replies = [t for t, r in zip(*dialogue, strict=True) if r == "assistant"]
            learned.append("<|sep|>".join(replies) + "<|end|>")
    _, y = made.val_batch(range(made.n_val_blocks))
    assert tokenizer.decode(y[y != IGNORE], specials=True) == "".join(learned)


def test_a_whole_validation_split_without_a_target_is_refused(tmp_path, settings, ready):
    """Else the mean loss of no target would be divided by zero."""
    path = speak(tmp_path / "a.jsonl", 40, "be kind " * 100)
    data = settings(path, loss_on="assistant", eval_blocks=1)
    with pytest.raises(UserError, match="1 validation blocks of 16 tokens hold no turn of the ass"):
        ready(data)
    assert ready(settings(path, loss_on="assistant", eval_blocks=0))


def test_batches_of_a_corpus_with_roles_are_those_of_older_runs(tmp_path, settings):
    """Roles were not kept then. They change nothing while all turns are learned."""
    path = speak(tmp_path / "a.jsonl", 300)
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8", newline="\n")
    made = prepare(settings(path), TokenizerSettings(kind="char", min_count=1), 16, quiet=True)
    assert made.fingerprint == "1de34f44d6c84d8170e5b73b"
    assert (made.n_train_tokens, made.n_val_tokens) == (7653, 586)
    hash = hashlib.sha256()
    for x, y in (made.train_batch(range(500), seed=7), made.val_batch(range(made.n_val_blocks))):
        hash.update(x.numpy().tobytes() + y.numpy().tobytes())
    assert hash.hexdigest().startswith("594cd98dcb241ffc")
    (folder,) = (tmp_path / "cache").glob("*/meta.json")
    assert folder.parent.name == "cf9bf2173848d452988a33a7"


def test_batches_are_those_of_older_runs(tmp_path, settings):
    """A resumed run must read on in the order in which an earlier version began."""
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    chats = [f"第{i}个问题?\nreply {i * i}\n\n" for i in range(300)]
    a.write_text("".join(chats), encoding="utf-8", newline="\n")
    b.write_text("".join(f"{i}\n\n" for i in range(99)), encoding="utf-8", newline="\n")
    data = settings(f"{a}@1.5", b, split_seed=5)
    made = prepare(data, TokenizerSettings(kind="char", min_count=1), 16, quiet=True)
    assert made.fingerprint == "5af16b2b4b50143a555fb4b3"
    assert (made.n_train_tokens, made.n_val_tokens) == (6033, 697)
    hash = hashlib.sha256()
    for x, y in (
        made.train_batch(range(500), seed=7),
        made.train_batch(range(10**9, 10**9 + 40, 3), seed=-1),
        made.val_batch(range(made.n_val_blocks + 1)),
    ):
        hash.update(x.numpy().tobytes() + y.numpy().tobytes())
    assert hash.hexdigest().startswith("07c172f233aba899")
