"""Chat text -> token files -> batches: smallgpt/{dialogues,corpus,batches}.py."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import ROOT
from scripts import data as data_script
from smallgpt.console import UserError
from smallgpt.settings import load
from smallgpt.text import formats, tokens
from smallgpt.text.batches import Corpus, permute
from smallgpt.text.tokens import DataSettings, held_out, prepare, read_dialogues
from smallgpt.tokenizer import TokenizerSettings

REAL = Path(os.environ.get("SMALLGPT_DATA", ROOT.parent / "shared" / "data")) / "chat" / "zh"
CHAR = TokenizerSettings(kind="char", min_count=1)


def write_chat(path: Path, n: int = 300, seed: int = 0) -> Path:
    """A chat file of n dialogues, Chinese and English, all different."""
    draw = random.Random(seed)
    words = ["你好", "吃了吗", "天气不错", "hello", "fine", "🙂", "再见", "why not"]
    path.write_text(
        "\n".join(
            "".join(
                f"{i} {' '.join(draw.choices(words, k=5))}\n" for _ in range(draw.randint(1, 4))
            )
            for i in range(n)
        ),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def settings(tmp_path):
    def make(*paths, **changes) -> DataSettings:
        paths = [str(p) for p in paths] or [str(write_chat(tmp_path / "chat.txt"))]
        defaults = {"path": paths, "val_fraction": 0.1, "cache": str(tmp_path / "cache")}
        return DataSettings(**defaults | changes)

    return make


def ready(data: DataSettings, block_size: int = 16) -> Corpus:
    return prepare(data, CHAR, block_size, quiet=True)


def numbered(*lengths: int, weights=None, block_size=10, val=35, eval_blocks=0) -> Corpus:
    """A corpus whose k-th token is k (from 10 on; special ids lie below), so that batches name positions."""

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


# -- reading -------------------------------------------------------------------------------------------------


def test_text_of_every_platform_reads_the_same(tmp_path):
    plain = "你好\n吃了吗\n\nbye \u2028 now\n"
    messy = "\ufeff\r\n\r\n  你好\r\n吃了吗\r\n \t\u3000\r\n\r\nbye \u2028 now"
    for name, text in (("a.txt", plain), ("b.txt", messy)):
        (tmp_path / name).write_bytes(text.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert list(read_dialogues(path)) == [["你好", "吃了吗"], ["bye \u2028 now"]], path


@pytest.mark.parametrize(
    "line",
    [
        ["hi", "two\nlines", " "],
        {"dialog": ["hi", "two\r\nlines"]},
        {"dialogue": ["hi", "two\nlines"], "id": 3},
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "two\nlines"},
            ]
        },
        {
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "two\nlines"},
            ]
        },
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_json_forms(tmp_path, line, name):
    raw = (
        "\ufeff" + json.dumps(line) + "\r\n\r\n" + json.dumps([]) + "\n" + json.dumps(["bye"])
    ).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert list(read_dialogues(tmp_path / name)) == [["hi", "two lines"], ["bye"]]


def test_cutting_into_blocks_never_cuts_a_dialogue(tmp_path, monkeypatch):
    path = write_chat(tmp_path / "a.txt")
    whole = list(read_dialogues(path))
    json_lines = tmp_path / "a.jsonl"
    json_lines.write_text("".join(json.dumps(turns) + "\n" for turns in whole), encoding="utf-8")
    for size in (1, 100, 1000):
        monkeypatch.setattr(formats, "BLOCK", size)
        assert list(read_dialogues(path)) == list(read_dialogues(json_lines)) == whole
    assert len(list(formats.blocks(path))) > 10


def test_reading_memory_is_flat_even_without_a_blank_line(tmp_path):
    """A novel, one paragraph a line, is one dialogue by the format; it must not be held in memory at once."""
    path = tmp_path / "novel.txt"
    path.write_text(
        "a line of a long book without a blank line\n" * 400_000, encoding="utf-8"
    )  # 17 MB
    tracemalloc.start()
    assert sum(len(block) for _, block, _ in formats.blocks(path)) == path.stat().st_size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9e6, peak


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_bytes_that_are_not_utf8(tmp_path, monkeypatch, gz):
    monkeypatch.setattr(formats, "BLOCK", 8)  # so that the bad line is not in the first block
    path = tmp_path / f"a.txt{gz}"
    raw = "好\n\n好\n\n好\n".encode() + "好".encode("gbk") + b"\n"
    path.write_bytes(gzip.compress(raw) if gz else raw)
    with pytest.raises(UserError, match=rf"a\.txt{gz}, line 6: not UTF-8.*data\.errors=replace"):
        list(read_dialogues(path))
    assert list(read_dialogues(path, "replace"))[-1][0] == "好"


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "3",
        "[" * 100_000,
        '"text"',
        '{"text": "hi"}',
        "[1]",
        '{"messages": [{"role": "user"}]}',
        '["half a pair \\ud83d"]',
    ],
)
def test_malformed_json_names_the_line(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text(f'["hi"]\n\n{bad}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not a dialogue in JSON"):
        list(read_dialogues(path))


def test_half_a_surrogate_pair_can_be_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('["half \\ud83d"]\n', encoding="utf-8")
    assert list(read_dialogues(path, "replace")) == [["half ?"]]


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(os.urandom(9999))
    for raw in (b"not gzip", whole[:5000], whole[:50] + b"x" * 50 + whole[100:]):
        (tmp_path / "a.txt.gz").write_bytes(raw)
        with pytest.raises(UserError, match="cannot read .*a.txt.gz"):
            list(read_dialogues(tmp_path / "a.txt.gz", "replace"))


# -- preparing -----------------------------------------------------------------------------------------------


def test_tokens_are_the_dialogues_in_order(settings):
    data = settings()
    made = ready(data)
    for side, stored in ((False, made._train[0]), (True, made._val[0])):
        wanted = [turns for turns in read_dialogues(data.path[0]) if held_out(turns, data) == side]
        assert stored.tolist() == [
            id for turns in wanted for id in made.tokenizer.encode_dialogue(turns)
        ]
        assert wanted and stored.dtype == np.uint16
    assert made.n_train_tokens == len(made._train[0]) and made.n_val_tokens == len(made._val[0])


def test_duplicates_are_never_on_both_sides(tmp_path, settings):
    """Corpora scraped from one site share dialogues; a copy of a held-out dialogue in training is leakage."""
    shared = [[f"问题 {i}", f"回答 {i}"] for i in range(200)]
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    a.write_text("\r\n\r\n".join("\r\n".join(turns) for turns in shared + shared), encoding="utf-8")
    b.write_text(
        "\n".join(json.dumps({"dialog": turns}) for turns in reversed(shared)), encoding="utf-8"
    )
    made = ready(settings(a, b))
    sides = []
    for sources in (made._train, made._val):
        text = made.tokenizer.decode(np.concatenate(sources), specials=True)
        sides.append(text.split("<|bos|>")[1:])
    assert len(sides[0]) + len(sides[1]) == 600 and not set(sides[0]) & set(sides[1])
    assert 20 < len(sides[1]) < 120


def test_split_seed_holds_out_other_dialogues():
    every = [[str(i)] for i in range(2000)]
    one, two = (
        {turns[0] for turns in every if held_out(turns, data)}
        for data in (
            DataSettings(val_fraction=0.1, split_seed=0),
            DataSettings(val_fraction=0.1, split_seed=1),
        )
    )
    assert 140 < len(one) < 260 and 140 < len(two) < 260 and len(one & two) < 60


def test_token_files_do_not_depend_on_the_number_of_workers(tmp_path, settings, monkeypatch):
    path = write_chat(tmp_path / "chat.txt", 3000)
    monkeypatch.setattr(formats, "BLOCK", 5000)
    files = []
    for cpus in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        monkeypatch.setattr(tokens, "PER_WORKER", 1000)
        made = ready(settings(path, cache=str(tmp_path / f"cache{cpus}")))
        files.append((made._train[0].tobytes(), made._val[0].tobytes(), made.fingerprint))
    assert files[0] == files[1]


def test_a_bad_file_is_reported_from_the_workers_too(tmp_path, settings, monkeypatch):
    path = write_chat(tmp_path / "chat.txt", 3000)
    monkeypatch.setattr(tokens, "PER_WORKER", 1000)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    tokenizer = ready(settings()).tokenizer
    with open(path, "ab") as file:
        file.write(b"\xff\n")
    with pytest.raises(UserError, match="chat.txt, line .* not UTF-8"):
        prepare(settings(path), tokenizer, 16, quiet=True)


def test_work_in_flight_is_bounded():
    """Executor.map reads its whole input first, which once meant a whole corpus in memory."""

    class Pool:
        submitted = 0

        def submit(self, work, item):
            self.submitted += 1
            return type("Done", (), {"result": lambda _: work(item)})()

    pool, taken = Pool(), 0
    for result in tokens._in_order(pool, str, range(100), 4):
        assert result == str(taken)
        taken += 1
        assert pool.submitted - taken <= 4
    assert taken == 100


def test_a_second_start_does_not_tokenise_or_read_again(settings, monkeypatch):
    data = settings()
    first = ready(data)

    def never(*_):
        raise AssertionError("read again")

    for name in ("_tokenise", "train", "blocks", "read_dialogues", "parse"):
        monkeypatch.setattr(tokens, name, never)
    monkeypatch.setattr("hashlib.file_digest", never)
    start = time.perf_counter()
    again = ready(data, block_size=32)
    assert time.perf_counter() - start < 1
    assert again.fingerprint == first.fingerprint and again.tokenizer.hash == first.tokenizer.hash
    weighed = ready(settings(data.path[0] + "@2"))  # weights change the batches, not the tokens
    assert weighed.fingerprint != first.fingerprint


def test_a_changed_file_is_prepared_anew(tmp_path, settings):
    path = write_chat(tmp_path / "chat.txt")
    first = ready(settings(path))
    moved = path.rename(tmp_path / "moved.txt")
    assert ready(settings(moved)).fingerprint == first.fingerprint  # content counts, not names
    write_chat(moved, seed=1)
    changed = ready(settings(moved))
    assert changed.fingerprint != first.fingerprint
    assert changed._train[0].tobytes() != first._train[0].tobytes()
    changes: list[dict] = [{}, {"split_seed": 1}, {"val_fraction": 0.2}]
    prints = {ready(settings(moved, **change)).fingerprint for change in changes}
    assert len(prints) == 3


def test_the_same_bytes_read_as_text_and_as_json_are_two_sources(tmp_path, settings):
    for name in ("a.txt", "a.jsonl"):
        lines = "\n\n".join(json.dumps([f"hi {i}"]) for i in range(300))
        (tmp_path / name).write_text(lines, encoding="utf-8")
    text, parsed = ready(settings(tmp_path / "a.txt")), ready(settings(tmp_path / "a.jsonl"))
    assert text.n_train_tokens > parsed.n_train_tokens and text.fingerprint != parsed.fingerprint


KILLED = """
import os, signal, sys
from smallgpt.text import tokens, formats
from smallgpt.tokenizer import TokenizerSettings
formats.BLOCK = 1000
real = tokens._encode
def encode(*args):
    encode.calls += 1
    if encode.calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
encode.calls = 0
tokens._encode = encode
tokens.prepare(tokens.DataSettings(path=sys.argv[1], val_fraction=0.1, cache=sys.argv[2]),
               TokenizerSettings(kind="char", min_count=1), 16)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_preparation_leaves_nothing_that_is_trusted(tmp_path, settings):
    path = write_chat(tmp_path / "chat.txt")
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(tmp_path / "cache")],
        cwd=ROOT,
        capture_output=True,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert list((tmp_path / "cache").glob("*.tmp/train.bin"))
    assert not list((tmp_path / "cache").glob("*/meta.json"))
    after, clean = ready(settings(path)), ready(settings(path, cache=str(tmp_path / "clean")))
    assert (
        after._train[0].tobytes() == clean._train[0].tobytes()
        and after.fingerprint == clean.fingerprint
    )
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_truncated_token_file_is_made_again(settings):
    data = settings()
    good = ready(data)._train[0].tobytes()
    (file,) = Path(data.cache).glob("*/train.bin")
    file.write_bytes(good[:100])
    assert ready(data)._train[0].tobytes() == good


def test_every_rank_may_call_prepare(tmp_path, settings):
    """torchrun starts all ranks at once; one must do the work while the others wait for it."""
    data = settings()
    code = (
        "import sys; from smallgpt.text.tokens import *; from smallgpt.tokenizer import TokenizerSettings; "
        "c = prepare(DataSettings(path=sys.argv[1], val_fraction=0.1, cache=sys.argv[2]), "
        "TokenizerSettings(min_count=1), 16); print(c.fingerprint, c.n_train_tokens)"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, data.path[0], data.cache],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    out, err = zip(*(rank.communicate() for rank in ranks), strict=True)
    assert len(set(out)) == 1 and out[0].strip(), err
    assert sum("tokenised" in text for text in err) == 1, (
        err
    )  # one plain line, from the one that worked


# -- paths and messages --------------------------------------------------------------------------------------


def test_paths_globs_and_weights(tmp_path, settings):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "sub").mkdir()
    a, b = (
        write_chat(tmp_path / "d" / "a.txt", seed=1),
        write_chat(tmp_path / "d" / "b@home.txt", seed=2),
    )
    (tmp_path / "cache").mkdir()

    def found(*paths):
        return [
            (s.path.name, s.weight)
            for s in tokens._sources(settings(*paths).path, tmp_path / "cache")
        ]

    assert found(tmp_path / "d" / "*") == [("a.txt", 1), ("b@home.txt", 1)]
    assert found(b, tmp_path / "d" / "*.txt") == [("b@home.txt", 1), ("a.txt", 1)]  # each file once
    assert found(tmp_path / "d" / "*", f"{a}@2.5", f"{b}@1e-1") == [
        ("a.txt", 2.5),
        ("b@home.txt", 0.1),
    ]
    assert tokens._sources(str(a), tmp_path / "cache")[0].path == a
    # the Hugging Face cache keeps files without an ending behind links: one was read as plain text
    (tmp_path / "blob").write_text('["hi", "ho"]\n', encoding="utf-8")
    (tmp_path / "chat.jsonl").symlink_to(tmp_path / "blob")
    (link,) = tokens._sources(str(tmp_path / "chat.jsonl"), tmp_path / "cache")
    assert list(read_dialogues(link.path)) == [["hi", "ho"]]


@pytest.mark.parametrize(
    "path, message",
    [
        (None, "data.path is not set.*scripts/data.py embedded"),
        ([], "data.path is not set"),
        ("{}/none.txt", "no file at .*none.txt"),
        ("{}/*.nothing", r"no file at .*\*.nothing"),
        ("{}", r"no file at .*FOLDER/\*"),
        ("{}/a.txt@0", "weight in .*@0.* must be a positive number"),
        ("{}/a.txt@-1", "weight in .*@-1.* must be a positive number"),
        ("{}/a.txt@nan", "must be a positive number"),
    ],
)
def test_bad_paths(tmp_path, path, message):
    write_chat(tmp_path / "a.txt")
    path = path.format(tmp_path) if isinstance(path, str) else path
    with pytest.raises(UserError, match=message):
        ready(DataSettings(path=path, cache=str(tmp_path / "cache")))


def test_too_little_data(tmp_path, settings):
    path = tmp_path / "a.txt"
    path.write_text("\n \r\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="corpus is empty.*data.path"):
        ready(settings(path))
    data = settings()
    n = ready(data).n_train_tokens
    with pytest.raises(
        UserError, match=rf"has {n:,} training tokens, shorter than .*block_size={n}: use"
    ):
        ready(data, block_size=n)
    assert ready(data, block_size=n - 1).blocks_per_epoch == 1
    path.write_text("one\n\ntwo\n\nthree\n\nfour\n", encoding="utf-8")
    with pytest.raises(UserError, match="validation split is empty: raise data.val_fraction"):
        ready(settings(path, val_fraction=1e-6), block_size=4)


def test_settings_are_checked():
    with pytest.raises(UserError) as error:
        load(DataSettings, ["val_fraction=1.0", "eval_blocks=-1"])
    assert "val_fraction must be float > 0 and < 1, not 1.0" in str(error.value)
    assert "eval_blocks must be int >= 0, not -1" in str(error.value)


# -- batches -------------------------------------------------------------------------------------------------


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


def test_a_batch_is_a_pure_function_of_its_indices(settings):
    """However ranks and accumulation cut the global range, and whatever came before, a row stays the same."""
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


def test_targets_are_the_next_tokens_and_never_a_dialogue_start(settings):
    made = ready(settings())
    x, y = made.train_batch(range(made.blocks_per_epoch), seed=0)
    starts = x[:, 1:] == made.tokenizer.bos
    assert starts.any() and torch.equal(y[:, :-1], torch.where(starts, -1, x[:, 1:]))
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
    assert y[y >= 0].tolist() == [500_000 + i for i in range(1, 66)]
    assert x.flatten()[:66].tolist() == [500_000 + i for i in range(66)]
    assert (x.flatten()[66:] == 4).all() and (y.flatten()[65:] == -1).all()
    assert torch.equal(torch.cat([made.val_batch(range(i, i + 1))[0] for i in range(7)]), x)
    assert made.val_batch(range(0))[0].shape == (0, 10)
    assert (made.val_batch(range(7, 9))[1] == -1).all()  # ranks may run past the end together
    few = numbered(100, 100, val=33, eval_blocks=3)
    assert few.n_val_blocks == 3 and few.val_batch(range(3))[0][:, 0].tolist() == [
        500_000,
        500_020,
        500_040,
    ]


def test_val_bytes_are_those_of_the_file(settings):
    data = settings(eval_blocks=0)
    made = ready(data)
    _, y = made.val_batch(range(made.n_val_blocks))
    held = [turns for turns in read_dialogues(data.path[0]) if held_out(turns, data)]
    assert made.val_bytes(y) == sum(len("\n".join(turns).encode()) + 2 for turns in held)


# -- commands and real data ----------------------------------------------------------------------------------


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/data.py", *map(str, args)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},
    )


def test_embedded_and_stats(tmp_path):
    pytest.importorskip("chatterbot_corpus")
    assert command("embedded", f"to={tmp_path / 'new'}").returncode == 0
    file = tmp_path / "new" / "chatterbot.txt"
    found = list(read_dialogues(file))
    assert ["什么是ai", "人工智能是工程和科学的分支,致力于构建具有思维的机器。"] in found
    assert len(found) > 1000
    counts = command("stats", f"path={file}").stdout.splitlines()[-1].replace(",", "").split()
    assert counts == [
        str(len(found)),
        str(sum(map(len, found))),
        str(file.stat().st_size),
        str(file),
    ]
    missing = command("stats", f"path={tmp_path / 'none.txt'}")
    assert missing.returncode == 2 and missing.stderr.startswith("error: cannot read")
    assert "none.txt" in missing.stderr


def test_fetch_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def down(*_, **__):
        raise ConnectionError("down")

    monkeypatch.setattr(hub, "hf_hub_download", down)
    with pytest.raises(
        UserError, match="lccc_base_train.jsonl.gz of https://.*silver/lccc.*at .*jsonl.gz"
    ):
        data_script.fetch_chat("lccc", tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real chats at {REAL} (set SMALLGPT_DATA)")
def test_real_chinese_chats(settings):
    made = ready(
        settings(REAL / "xpersona_zh.txt", f"{REAL / 'chatterbot_zh.txt'}@2", val_fraction=0.02), 64
    )
    x, _ = made.train_batch(range(8), 0)
    assert made.n_train_tokens > 90_000 and x.max() < made.tokenizer.vocab_size
    text = made.tokenizer.decode(made._val[0].tolist())
    assert "�" not in text and sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text) / 2
