"""What every script does at its edges: exit status, a sentence or a traceback, UTF-8, streams."""

import os
import subprocess
import sys
import time

import pytest

from helpers import ROOT
from smallgpt import console
from smallgpt.console import UserError
from smallgpt.files import expand_user

SCRIPT = """
import sys
from smallgpt import console
def main():
    {}
console.run(main)
"""


def script(body: str, **options) -> subprocess.CompletedProcess:
    """A process whose `main` has this body."""
    command = [sys.executable, "-c", SCRIPT.format(body)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, **options)


def status(main) -> int:
    """How `run(main)` ends in this process."""
    with pytest.raises(SystemExit) as stop:
        console.run(main)
    return stop.value.code


def fail(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_the_end_of_main_is_the_exit_status(capsys):
    assert status(lambda: None) in (None, 0)
    assert status(lambda: 3) == 3
    assert status(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error, sentence",
    [
        (UserError("no file x; give one"), "no file x; give one"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (OSError(28, "No space left on device"), "the disk is full ([Errno 28] No space left"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "the GPU's memory is full: lower"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(capsys, error, sentence):
    assert status(fail(error)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {sentence}") and captured.err.count("\n") == 1


def test_text_that_is_not_utf8_is_named(capsys, tmp_path):
    """Regression: a GBK file name, which Python spells in surrogates, ended in a traceback."""
    name = os.fsdecode("评论.csv".encode("gbk"))
    with pytest.raises(UnicodeEncodeError) as error:
        (tmp_path / "meta.json").write_text(name, encoding="utf-8")
    assert status(fail(error.value)) == 2
    assert capsys.readouterr().err.startswith(r"error: '\udcc6\udcc0")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), KeyError("a bug")])
def test_a_bug_shows_its_traceback(error):
    """If every RuntimeError became a sentence, a bug of ours could not be found."""
    with pytest.raises(type(error), match="a bug"):
        console.run(fail(error))


@pytest.mark.slow
def test_the_other_ranks_leave_the_message_to_rank_0(capsys, monkeypatch):
    """Under torchrun all ranks mostly fail alike: the others wait two seconds before they speak."""
    monkeypatch.setenv("RANK", "1")
    start = time.monotonic()
    assert status(fail(UserError("no file x"))) == 2
    assert time.monotonic() - start > 2
    assert capsys.readouterr().err == "(process 1: no file x)\n"


def test_standard_input_that_is_closed_is_a_mistake(monkeypatch):
    """Regression: `python chat.py RUN <&-` ended in a traceback, since sys.stdin is None then."""
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        console.open_stdin()


def test_a_path_of_an_unknown_user_is_taken_as_typed(monkeypatch, tmp_path):
    """Regression: ~$book.csv, a spreadsheet's lock file, ended in a RuntimeError about a home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in ("~$book.csv", "~no-such-user/x", "a/~/b", "exp #2"):
        assert str(expand_user(typed)) == typed
    assert expand_user("~/x") == tmp_path / "x"


# --- real processes: streams that pytest replaces -----------------------------------------------


def test_what_goes_to_a_file_is_utf8_on_every_system():
    """Regression: on Windows every Chinese character of `classify.py ... > file` became a ?."""
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = script("print(input())", env=env, input="你好\n".encode())
    assert done.stdout.decode().strip() == "你好", done.stderr


def test_an_argument_that_is_not_utf8_can_be_printed():
    """Regression: print() of a GBK file name raised UnicodeEncodeError."""
    done = script(r"print('\udcc6', file=sys.stderr); print('\udcc6')")
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, b"?", b"?")


def test_streams_that_are_closed_do_not_matter_to_who_does_not_use_them():
    done = script("return 5 if sys.stdin is None else 0", preexec_fn=lambda: os.close(0))
    assert (done.returncode, done.stderr) == (5, b"")
    command = [sys.executable, "-c", SCRIPT.format("print('x'); return 3")]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (3, b"")


def test_a_closed_pipe_is_quiet():
    """`chat.py --help | head -1` ended in "Exception ignored in ... BrokenPipeError"."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", SCRIPT.format("print('x' * 10)")]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(os.name == "nt", reason="another shell")
@pytest.mark.parametrize("path", ["checkpoints/exp", "exp #2", "a'b $x", "高 (1)", "~$book"])
def test_a_path_in_a_command_can_be_pasted(path):
    """Regression: "python chat.py checkpoints/exp #2", pasted as it was printed, talked to exp."""
    word = console.shell_word(path)
    assert (
        subprocess.check_output(["sh", "-c", f"printf %s {word} TEXT"]) == path.encode() + b"TEXT"
    )
    assert console.shell_word("checkpoints/exp") == "checkpoints/exp"
