"""Files that several processes make together: divided, the same bits, taken over."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, mistake, wait_for
from smallgpt.console import UserError
from smallgpt.text import claims, tokens

# It notes each file that it makes in NAME.made, and finishes none before NAME.go is there.
PROCESS = """
import os, sys, time
from smallgpt.text import tokens
from smallgpt.tokenizer import TokenizerSettings
path, cache, name = sys.argv[1:]
real = tokens.write_tokens
def write(folder, source, dtype, pieces, bar):
    with open(name + ".made", "a") as file:
        file.write(source.path.name + "\\n")
    def held():
        yield from pieces
        while not os.path.exists(name + ".go"):
            time.sleep(0.01)
    real(folder, source, dtype, held(), bar)
tokens.write_tokens = write
data = tokens.DataSettings(path=path, val_fraction=0.1, cache=cache)
print(tokens.prepare(data, TokenizerSettings(kind="char", min_count=1), 16).fingerprint)
"""


class Maker:
    """A process that tokenises folder/chats/*.txt, as one of two machines would."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / name
        self.output = open(self.path.with_suffix(".out"), "w+", encoding="utf-8")
        words = [folder / "chats" / "*.txt", folder / "cache", self.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, words)],
            cwd=ROOT,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def made(self) -> list[str]:
        """The names of the files it has begun."""
        notes = self.path.with_suffix(".made")
        return notes.read_text(encoding="utf-8").split() if notes.exists() else []

    def said(self) -> str:
        return self.path.with_suffix(".out").read_text(encoding="utf-8")

    def go(self) -> None:
        self.path.with_suffix(".go").touch()


@pytest.fixture
def folder(tmp_path: Path, write_chat) -> Path:
    """Three chats, the largest first."""
    (tmp_path / "chats").mkdir()
    for i in range(3):
        write_chat(tmp_path / "chats" / f"{i}.txt", 300 - 50 * i, seed=i)
    return tmp_path


@pytest.fixture
def begin(folder):
    """begin(name) -> a Maker that has begun a file; it does not outlive the test."""
    makers = []

    def begin(name: str) -> Maker:
        maker = Maker(folder, name)
        makers.append(maker)
        wait_for(maker.made, f"the first file of {name}")
        return maker

    yield begin
    for maker in makers:
        maker.process.kill()
        maker.process.wait()
        maker.output.close()


def token_files(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.glob("*/*.bin")}


def test_processes_divide_the_files_and_take_over_those_of_a_killed_one(
    folder, begin, settings, ready
):
    """The others waited for one process that made all; and none may wait for a dead one."""
    a, b, dies = begin("a"), begin("b"), begin("dies")
    assert [maker.made() for maker in (a, b, dies)] == [["0.txt"], ["1.txt"], ["2.txt"]]
    b.go()
    wait_for(lambda: "waiting for other processes to tokenise: 2 file(s) left" in b.said(), "words")
    dies.process.send_signal(signal.SIGKILL)
    wait_for(lambda: b.made() == ["1.txt", "2.txt"], "the file of the killed process")
    a.go()
    assert a.process.wait(60) == b.process.wait(60) == 0
    assert a.made() == ["0.txt"]

    alone = ready(settings(folder / "chats" / "*.txt", cache=str(folder / "alone")))
    assert token_files(folder / "cache") == token_files(folder / "alone")
    assert not list((folder / "cache").glob("*.tmp"))
    for maker, n_others in ((a, 2), (b, 1)):
        *_, summary, fingerprint = maker.said().splitlines()
        assert fingerprint == alone.fingerprint
        assert summary.startswith("tokenised 0.1 MB of 3 file(s) in")
        assert summary.endswith(f"s, {n_others} of them by other processes")
        assert maker.said().count("waiting") <= 1


def test_a_rank_other_than_0_is_quiet(tmp_path, settings, ready, monkeypatch, capsys):
    """A thousand ranks must not print a thousand lines, nor train a tokenizer each."""
    monkeypatch.setenv("RANK", "3")
    ready(settings(), quiet=False)
    assert capsys.readouterr().err == ""


def test_processes_of_one_machine_divide_its_cores(monkeypatch):
    """Eight ranks with a pool of all cores each would be eight times too many."""
    monkeypatch.setattr(tokens, "usable_cores", lambda: 64)
    assert tokens.share_of_cores(100) == 64
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert tokens.share_of_cores(100) == 8
    assert tokens.share_of_cores(2) == 32 and tokens.share_of_cores(1) == 64
    monkeypatch.setattr(tokens, "usable_cores", lambda: 2)
    assert tokens.share_of_cores(100) == 1


def test_a_claim_is_free_after_an_error(tmp_path):
    """A process that stays alive after an error must not keep the file from the others."""

    def fail(path: Path, n_missing: int) -> None:
        raise UserError("bad")

    path = tmp_path / "x"
    with pytest.raises(UserError, match="bad"):
        claims.make_together([path], lambda path: None, fail, "fail")
    start = time.monotonic()
    made = claims.make_together([path], lambda path: None, lambda path, n: n, "work")
    assert made == {path: 1} and time.monotonic() - start < 10


def test_ranks_tokenise_together(folder, run_ranks, tiny):
    """They must leave together, too: a rank that goes on alone waits in a collective."""
    args = tiny(
        folder / "run",
        max_steps=1,
        data__path=folder / "chats" / "*.txt",
        data__cache=folder / "cache",
    )
    results = run_ranks(2, args)
    assert [result.status for result in results] == [0, 0], results
    assert "tokenised 0.1 MB of 3 file(s)" in results[0].err
    assert "tokenis" not in results[1].err
    assert len(list((folder / "cache").glob("*/meta.json"))) == 3


def test_a_bad_file_ends_all_ranks_with_one_sentence(folder, run_ranks, tiny):
    """Whichever rank has claimed it."""
    with open(folder / "chats" / "2.txt", "ab") as file:
        file.write(b"\xff\n")
    args = tiny(
        folder / "run",
        data__path=folder / "chats" / "*.txt",
        data__cache=folder / "cache",
    )
    results = run_ranks(2, args)
    assert "2.txt, line " in mistake(results[0]) and results[1].status == 2
    assert "error:" not in results[1].err
