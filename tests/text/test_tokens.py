"""Dialogues -> token files: split, cached, made again when damaged, whatever the workers."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import DATA, ROOT, dialogue_ids
from smallgpt.console import UserError
from smallgpt.settings import load
from smallgpt.text import formats, tokens
from smallgpt.text.formats import read_dialogues
from smallgpt.text.tokens import DataSettings, held_out, prepare
from smallgpt.tokenizer import TokenizerSettings

REAL = DATA / "chat" / "zh"


def test_tokens_are_the_dialogues_in_order(settings, ready):
    data = settings()
    made = ready(data)
    for side, stored in ((False, made._train[0]), (True, made._val[0])):
        dialogues = [dialogue.turns for dialogue in read_dialogues(data.path[0])]
        wanted = [turns for turns in dialogues if held_out(turns, data) == side]
        assert stored[:].tolist() == [
            id for turns in wanted for id in dialogue_ids(made.tokenizer, turns)
        ]
        assert wanted and stored.dtype == np.uint16
    assert made.n_train_tokens == len(made._train[0]) and made.n_val_tokens == len(made._val[0])


def test_duplicates_are_never_on_both_sides(tmp_path, settings, ready):
    """Corpora scraped from one site share dialogues: a copy of a held-out one would be leakage."""
    shared = [[f"问题 {i}", f"回答 {i}"] for i in range(200)]
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    a.write_text("\r\n\r\n".join("\r\n".join(turns) for turns in shared + shared), encoding="utf-8")
    b.write_text(
        "\n".join(json.dumps({"dialog": turns}) for turns in reversed(shared)), encoding="utf-8"
    )
    made = ready(settings(a, b))
    sides = []
    for sources in (made._train, made._val):
        text = made.tokenizer.decode(np.concatenate([file[:] for file in sources]), specials=True)
        sides.append(text.split("<|bos|>")[1:])
    assert len(sides[0]) + len(sides[1]) == 600 and not set(sides[0]) & set(sides[1])
    assert 20 < len(sides[1]) < 120


def test_the_split_is_the_one_of_older_runs():
    """A run that goes on must not train on what it has held out so far."""
    draw = random.Random(0)
    letters = "ab \n你好🙂\u2028"
    for _ in range(5000):
        turns = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(2)]
        seed, fraction = draw.choice([0, 1, -7, 2**70]), draw.choice([1e-6, 0.01, 0.5, 0.999])
        key, text = str(seed).encode(), "\n".join(turns).encode()
        hash = hashlib.blake2b(text, digest_size=8, key=key).digest()
        expected = int.from_bytes(hash, "big") < fraction * 2**64
        assert held_out(turns, DataSettings(split_seed=seed, val_fraction=fraction)) == expected


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


def test_token_files_do_not_depend_on_the_number_of_workers(
    tmp_path, settings, monkeypatch, ready, write_chat
):
    path = write_chat(tmp_path / "chat.txt", 3000)
    monkeypatch.setattr(formats, "BLOCK", 5000)
    monkeypatch.setattr(tokens, "PER_WORKER", 1000)
    start_pool, started = tokens.start_pool, []
    monkeypatch.setattr(tokens, "start_pool", lambda n: started.append(n) or start_pool(n))
    found = []
    for cores in (1, 2):
        monkeypatch.setattr(tokens, "usable_cores", lambda cores=cores: cores)
        made = ready(settings(path, cache=str(tmp_path / f"cache{cores}")))
        found.append((made._train[0][:].tobytes(), made._val[0][:].tobytes(), made.fingerprint))
    assert started == [2] and found[0] == found[1]


def test_a_bad_file_is_reported_from_the_workers_too(
    tmp_path, settings, monkeypatch, ready, write_chat
):
    path = write_chat(tmp_path / "chat.txt", 3000)
    monkeypatch.setattr(tokens, "PER_WORKER", 1000)
    monkeypatch.setattr(tokens, "usable_cores", lambda: 2)
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
    for result in tokens.in_order(pool, str, range(100), 4):
        assert result == str(taken)
        taken += 1
        assert pool.submitted - taken <= 4
    assert taken == 100


def test_a_second_start_does_not_tokenise_or_read_again(settings, monkeypatch, ready):
    data = settings()
    first = ready(data)

    def never(*_):
        raise AssertionError("read again")

    for name in ("tokenise", "train", "blocks", "read_dialogues", "parse"):
        monkeypatch.setattr(tokens, name, never)
    monkeypatch.setattr("hashlib.file_digest", never)
    start = time.process_time()
    again = ready(data, block_size=32)
    assert time.process_time() - start < 1
    assert again.fingerprint == first.fingerprint and again.tokenizer.hash == first.tokenizer.hash
    weighed = ready(settings(data.path[0] + "@2"))  # weights change the batches, not the tokens
    assert weighed.fingerprint != first.fingerprint


def test_a_changed_file_is_prepared_anew(tmp_path, settings, ready, write_chat):
    path = write_chat(tmp_path / "chat.txt")
    first = ready(settings(path))
    moved = path.rename(tmp_path / "moved.txt")
    assert ready(settings(moved)).fingerprint == first.fingerprint  # content counts, not names
    write_chat(moved, seed=1)
    changed = ready(settings(moved))
    assert changed.fingerprint != first.fingerprint
    assert changed._train[0][:].tobytes() != first._train[0][:].tobytes()
    changes: list[dict] = [{}, {"split_seed": 1}, {"val_fraction": 0.2}]
    prints = {ready(settings(moved, **change)).fingerprint for change in changes}
    assert len(prints) == 3


def test_the_name_of_a_file_changes_nothing(tmp_path, settings, ready):
    """The format is in the content, so a renamed file has the same key in the cache."""
    lines = "\n\n".join(json.dumps([f"hi {i}"]) for i in range(300))
    made = []
    for name in ("a.txt", "a.jsonl", "a.ndjson"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
        made.append(ready(settings(tmp_path / name)))
    assert len({corpus.fingerprint for corpus in made}) == 1
    assert "[" not in made[0].tokenizer.decode(made[0]._train[0][:])


KILLED = """
import os, signal, sys
from smallgpt.text import tokens, formats
from smallgpt.tokenizer import TokenizerSettings
formats.BLOCK = 1000
real = tokens.encode_block
def encode(*args):
    encode.calls += 1
    if encode.calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
encode.calls = 0
tokens.encode_block = encode
tokens.prepare(tokens.DataSettings(path=sys.argv[1], val_fraction=0.1, cache=sys.argv[2]),
               TokenizerSettings(kind="char", min_count=1), 16)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_preparation_leaves_nothing_that_is_trusted(tmp_path, settings, ready, write_chat):
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
        after._train[0][:].tobytes() == clean._train[0][:].tobytes()
        and after.fingerprint == clean.fingerprint
    )
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\0" * 99, "half"])
@pytest.mark.parametrize(
    "name", ["sources/*.json", "*/meta.json", "tokenizer-*.json", "*/train.bin", "*/val.bin"]
)
def test_what_is_damaged_in_the_cache_is_made_again(settings, ready, name, content):
    """Regression: an emptied index, as a full disk leaves it, stopped every start."""
    data = settings()
    first = ready(data)
    good = [file[:].tobytes() for file in (first._train[0], first._val[0])]
    for file in Path(data.cache).glob(name):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    again = ready(data)
    assert [file[:].tobytes() for file in (again._train[0], again._val[0])] == good
    assert again.fingerprint == first.fingerprint and again.tokenizer.hash == first.tokenizer.hash
    assert not list(Path(data.cache).rglob("*.tmp"))


@pytest.mark.parametrize("damage", [{"counts": {"x": 1}}, {"train": "1"}, {"dtype": "O"}])
def test_a_meta_json_of_another_kind_is_made_again(settings, ready, damage):
    data = settings()
    ready(data)
    (file,) = Path(data.cache).glob("*/meta.json")
    good = file.read_text(encoding="utf-8")
    file.write_text(json.dumps(json.loads(good) | damage), encoding="utf-8")
    ready(data)
    assert file.read_text(encoding="utf-8") == good


UNGUARDED = """
import sys
from smallgpt.text import tokens
from smallgpt.tokenizer import TokenizerSettings
print("the script runs", flush=True)
tokens.PER_WORKER = 1000
tokens.usable_cores = lambda: 2
corpus = tokens.prepare(tokens.DataSettings(path=sys.argv[1], val_fraction=0.1, cache=sys.argv[2]),
                        TokenizerSettings(kind="char", min_count=1), 16)
print(corpus.fingerprint, "torch" in sys.modules)
"""


def test_a_script_without_a_main_guard_may_prepare(tmp_path, settings, ready, write_chat):
    """Regression: the workers ran the script again, and waited for its lock forever."""
    path = write_chat(tmp_path / "chat.txt", 3000)
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, path, tmp_path / "theirs"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    fingerprint = ready(settings(path)).fingerprint
    assert done.stdout == f"the script runs\n{fingerprint} False\n", done.stderr


def test_every_rank_may_call_prepare(tmp_path, settings):
    """torchrun starts all ranks at once; one makes a file while the others wait for it."""
    data = settings()
    code = (
        "import sys; from smallgpt.text.tokens import *; "
        "from smallgpt.tokenizer import TokenizerSettings; "
        "c = prepare(DataSettings(path=sys.argv[1], val_fraction=0.1, cache=sys.argv[2]), "
        "TokenizerSettings(min_count=1), 16); print(c.fingerprint, c.n_train_tokens)"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, data.path[0], data.cache],
            cwd=ROOT,
            env=os.environ | {"RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(3)
    ]
    out, err = zip(*(rank.communicate() for rank in ranks), strict=True)
    assert len(set(out)) == 1 and out[0].strip(), err
    assert "tokenised" in err[0] and err[1:] == ("", "")  # one line, from rank 0


def test_many_files_need_few_descriptors(tmp_path, settings, ready, write_chat):
    """Regression: a mapped file has one, so a corpus of 600 files exceeded the usual limit."""
    resource = pytest.importorskip("resource")
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(60):
        write_chat(folder / f"{i}.txt", 20, seed=i)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]  # numbers may have gaps
    for descriptor in spare:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
    try:
        made = ready(settings(folder / "*"))
        x, _ = made.train_batch(range(made.blocks_per_epoch), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(made._train) == 60 and len(x) >= 60


def test_paths_globs_and_weights(tmp_path, settings, write_chat):
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
            for s in tokens.find_sources(settings(*paths).path, tmp_path / "cache")
        ]

    assert found(tmp_path / "d" / "*") == [("a.txt", 1), ("b@home.txt", 1)]
    assert found(b, tmp_path / "d" / "*.txt") == [("b@home.txt", 1), ("a.txt", 1)]  # each file once
    assert found(tmp_path / "d" / "*", f"{a}@2.5", f"{b}@1e-1") == [
        ("a.txt", 2.5),
        ("b@home.txt", 0.1),
    ]
    assert tokens.find_sources(str(a), tmp_path / "cache")[0].path == a
    # the Hugging Face cache keeps files without an ending behind links: one was read as plain text
    (tmp_path / "blob").write_text('["hi", "ho"]\n', encoding="utf-8")
    (tmp_path / "chat.jsonl").symlink_to(tmp_path / "blob")
    (link,) = tokens.find_sources(str(tmp_path / "chat.jsonl"), tmp_path / "cache")
    assert [dialogue.turns for dialogue in read_dialogues(link.path)] == [["hi", "ho"]]


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
def test_bad_paths(tmp_path, path, message, ready, write_chat):
    write_chat(tmp_path / "a.txt")
    path = path.format(tmp_path) if isinstance(path, str) else path
    with pytest.raises(UserError, match=message):
        ready(DataSettings(path=path, cache=str(tmp_path / "cache")))


def test_the_format_and_what_was_dropped_are_said(tmp_path, settings, ready, capsys, monkeypatch):
    """They are said at each start, from the cache, too, and by one rank."""
    dialogues = [[f"hi {i}", f"ho {i}"] for i in range(300)]
    lines = [json.dumps(turns) for turns in dialogues]
    path = tmp_path / "chat.ndjson"
    path.write_text("\n".join([*lines, "{}", '["a", ""]']), encoding="utf-8")
    data = settings(path)
    expected = [
        f"data.path: {path} is read as JSON Lines",
        f"{path}: skipped 1 of 302 dialogues, the first at line 301: "
        "it has no messages, conversations, dialog, dialogue, text",
        f"{path}: dialogues ended before an empty turn: 1, 1 turns dropped",
    ]
    for _ in range(2):
        ready(data, quiet=False)
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "tokenis" not in line] == expected
    ready(data, quiet=True)
    monkeypatch.setenv("RANK", "1")
    ready(data, quiet=False)
    assert capsys.readouterr().err == ""


def test_a_file_without_one_good_dialogue_is_refused(tmp_path, settings, ready):
    tokenizer = ready(settings()).tokenizer
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": 1}\n' * 9, encoding="utf-8")
    for wanted in (tokenizer, TokenizerSettings()):
        with pytest.raises(UserError, match="bad.jsonl: none of its 9 dialogues can be read"):
            prepare(settings(path), wanted, 16, quiet=True)


def with_roles(path: Path, prompt: str = "") -> Path:
    """300 dialogues of a user and an assistant in JSON Lines, with a system prompt if one is
    given."""
    lines = []
    for i in range(300):
        turns = [("user", f"ask {i}"), ("assistant", f"reply {i}")]
        if prompt:
            turns.insert(0, ("system", prompt))
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_what_is_learned_changes_no_id(tmp_path, settings, ready, capsys):
    """loss_on=assistant reads the same ids with the same tokenizer, splits alike, and marks those
    of other turns; the token files of both lie side by side."""
    path = with_roles(tmp_path / "a.jsonl", "be kind")
    every, marked = ready(settings(path)), ready(settings(path, loss_on="assistant"), quiet=False)
    assert every.tokenizer.hash == marked.tokenizer.hash
    assert every.fingerprint != marked.fingerprint
    sep, bos, end = every.tokenizer.sep, every.tokenizer.bos, every.tokenizer.end
    for files in zip(every._train + every._val, marked._train + marked._val, strict=True):
        ids, signed = (file[:].astype(int) for file in files)
        assert (np.where(signed < 0, ~signed, signed) == ids).all()
        learned = every.tokenizer.decode(signed[signed >= 0], specials=True).split("<|bos|>")[1:]
        assert all(re.fullmatch(r"reply \d+<\|end\|>", text) for text in learned)
        assert len(learned) == (ids == bos).sum() == (ids == end).sum() == (ids == sep).sum() / 3
    assert files[1].dtype == np.int16
    n_learned = sum(len(f"reply {i}") + 1 for i in range(300))
    n_tokens = marked.n_train_tokens + marked.n_val_tokens
    said = f"data.loss_on=assistant learns {n_learned:,} of its {n_tokens:,} tokens"
    assert said in capsys.readouterr().err
    again = ready(settings(path, loss_on="assistant"))
    assert again._train == marked._train and again.fingerprint == marked.fingerprint


def test_large_vocabularies_have_room_for_the_marks():
    """A token that does not fit its type would be another one."""
    for loss_on, size in (("all", 1 << 16), ("assistant", 1 << 15)):
        small, large = tokens.dtype_of(size, loss_on), tokens.dtype_of(size + 1, loss_on)
        assert (small.itemsize, large.itemsize) == (2, 4)
        for dtype, last in ((small, size - 1), (large, size)):
            stored = [last] if loss_on == "all" else [last, ~last]
            assert np.array(stored, dtype).tolist() == stored


def test_system_prompts_do_not_decide_the_split_or_the_vocabulary(tmp_path, settings, ready):
    """A dialogue and its copy under another prompt are on the same side."""
    plain = ready(settings(with_roles(tmp_path / "a.jsonl")))
    asked = ready(settings(with_roles(tmp_path / "b.jsonl", "ÿ" * 9)))
    assert plain.tokenizer.hash == asked.tokenizer.hash
    sides = []
    for made in (plain, asked):
        text = made.tokenizer.decode(made._val[0][:], specials=True)
        sides.append(text.replace(f"<|sep|>{'ÿ' * 9}<|sep|>", ""))
    assert sides[0] == sides[1] and "ÿ" not in sides[1]


def test_token_files_without_the_system_prompts_are_made_again(tmp_path, settings, ready):
    """An earlier version left the prompts out: its files and its fingerprint are of other text."""
    data = settings(with_roles(tmp_path / "a.jsonl", "be kind"))
    made = ready(data)
    (file,) = Path(data.cache).glob("*/meta.json")
    meta = json.loads(file.read_text(encoding="utf-8"))
    assert meta["counts"].pop("prompts") == 300
    meta["counts"]["system_turns"] = 300
    file.write_text(json.dumps(meta), encoding="utf-8")
    assert tokens.open_tokens(file.parent) is None
    assert ready(data)._train[0][:].tobytes() == made._train[0][:].tobytes()
    meta["counts"]["system_turns"] = 0  # there were none: the files are what they would be
    file.write_text(json.dumps(meta), encoding="utf-8")
    assert tokens.open_tokens(file.parent) is not None
    assert ready(data).fingerprint != made.fingerprint


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_turns_of_nobody_cannot_be_learned_as_the_assistants(tmp_path, settings, ready, kind):
    path = tmp_path / f"a.{kind}"
    line = "hi\nho\n\n" if kind == "txt" else '["hi", "ho"]\n'
    path.write_text(line * 50, encoding="utf-8")
    says = {
        "txt": "needs roles, and .*a.txt is plain text, which has none: give JSON Lines or Parquet",
        "jsonl": "line 1: its turns have no roles, which data.loss_on=assistant needs; write a",
    }
    with pytest.raises(UserError, match=says[kind]):
        ready(settings(path, loss_on="assistant"))


def test_the_folder_of_a_data_set(tmp_path, settings, ready, capsys):
    """It opens as Hugging Face ships it; its other splits are no text to train on."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    names = ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]
    for name in names:
        texts = [f"{name} {i}\nyes" for i in range(100)]
        parquet.write_table(pyarrow.table({"text": texts}), folder / "data" / f"{name}.parquet")
    made = ready(settings(folder), quiet=False)
    text = made.tokenizer.decode(made._train[1][:])
    assert len(made._train) == 2 and "train-00001" in text
    assert f"data.path: {folder}: reads train, leaves out test" in capsys.readouterr().err
    (folder / "data" / f"{names[0]}.parquet").rename(folder / "data" / "train_sft.parquet")
    with pytest.raises(UserError, match="splits test, train, train_sft, of which it is not clear"):
        ready(settings(folder))


def test_an_archive_as_corpus(tmp_path, settings, ready):
    path = tmp_path / "chats.zip"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(UserError, match="chats.zip is a zip archive: unpack it"):
        ready(settings(path, errors="replace"))


def test_sources_are_recorded(tmp_path, settings, ready, write_chat):
    """A path as typed cannot be followed from another folder, and a link may be changed."""
    a, b = write_chat(tmp_path / "a.txt", seed=1), write_chat(tmp_path / "b.txt", seed=2)
    (tmp_path / "link.txt").symlink_to(b)
    made = ready(settings(a, f"{tmp_path / 'link.txt'}@0.5"))
    sha256 = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (a, b)]
    assert made.sources == [
        {"kind": "text", "path": str(a.resolve()), "weight": 1.0, "sha256": sha256[0]},
        {"kind": "text", "path": str(b.resolve()), "weight": 0.5, "sha256": sha256[1]},
    ]
    assert json.loads(json.dumps(made.sources)) == made.sources
    asked = ready(settings(with_roles(tmp_path / "c.jsonl", "be kind")))
    assert asked.sources[0]["prompts"] == 300, "chat.py reads it"


@pytest.mark.parametrize("val_fraction", [0.01, 0.99])
def test_one_long_text_is_told_of_the_blank_line(tmp_path, settings, ready, val_fraction):
    """Regression: the advice was to raise data.val_fraction, which emptied the training split."""
    path = tmp_path / "novel.txt"
    path.write_text("a line of a long text\n" * 800, encoding="utf-8")
    with pytest.raises(UserError, match="a single dialogue.*put a blank line between dialogues"):
        ready(settings(path, val_fraction=val_fraction))


def test_everything_held_out(tmp_path, settings, ready):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\nthree\n", encoding="utf-8")
    with pytest.raises(UserError, match="all 3 dialogues are held out.*lower data.val_fraction"):
        ready(settings(path, val_fraction=0.9999))


def test_too_little_data(tmp_path, settings, ready):
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


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real chats at {REAL} (set SMALLGPT_DATA)")
def test_real_chinese_chats(settings, ready):
    paths = REAL / "xpersona_zh.txt", f"{REAL / 'chatterbot_zh.txt'}@2"
    made = ready(settings(*paths, val_fraction=0.02), 64)
    x, _ = made.train_batch(range(8), 0)
    assert made.n_train_tokens > 90_000 and x.max() < made.tokenizer.vocab_size
    text = made.tokenizer.decode(made._val[0][:].tolist())
    assert "\ufffd" not in text
    assert sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text) / 2
