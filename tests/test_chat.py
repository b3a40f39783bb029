"""chat.py as its users use it: piped, and in a terminal (a pty)."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chat
from helpers import ENV, ROOT, Result, mistake
from smallgpt import settings
from smallgpt.console import UserError
from smallgpt.text import tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory, chat_file, run, tiny) -> Path:
    """A run whose corpus is gone; it learned to answer in its 150 steps."""
    out = tmp_path_factory.mktemp("chat")
    text = shutil.copy(chat_file, out / "text.txt")
    args = tiny(
        out,
        run="r",
        data__path=text,
        data__cache=out / "tokens",
        max_steps=150,
        eval_every=50,
        save_every=50,
    )
    assert run("train", args).status == 0
    Path(text).unlink()
    shutil.rmtree(out / "tokens")
    return out / "r"


@pytest.fixture(scope="module")
def talk(run, model):
    def talk(text: str, *args: str) -> Result:
        result = run("chat", [model, "device=cpu", "dtype=float32", *args], stdin=text)
        assert result.status == 0, result.err
        return result

    return talk


def test_one_reply_a_line(talk):
    result = talk("what is red 1?\nwhat is 黑色 5?\n\n   \nhello")
    lines = result.out.splitlines()
    assert len(lines) == 3 and all(line.strip() for line in lines) and not result.err
    assert "red" in lines[0] or "fine" in lines[0], "the model has learned this corpus"


def test_the_same_seed_the_same_text(talk):
    text = "what is blue 1?\nwhat is 白色 2?\n"
    outs = [talk(text, f"sample.seed={seed}", "sample.temperature=2").out for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]
    assert (
        len({talk(text, f"sample.seed={seed}", "sample.temperature=0").out for seed in (1, 2)}) == 1
    )


def test_commands(talk, tmp_path):
    script = [
        "/help",
        "hi",
        "/stats",
        "/set temperature=0 top_k=5",
        "/set",
        "/undo",
        "/undo",
        "there",
        "/save {f}",
        "/save",
        "/reset",
        "/stats",
        "flush",
        "/nonsense",
        "/save {f}",
        "/exit",
        "never read",
    ]
    out = talk("\n".join(script).format(f=tmp_path / "said.txt")).out
    for says in (
        "/set KEY=VALUE",
        "context ",
        "2 turns",
        "temperature=0.0  top_k=5",
        "(took back the last exchange)",
        "(nothing to take back)",
        "(saved 2 lines",
        "/save FILE, after something was said",
        "(new conversation)",
        "context 1 of 32 tokens, 0 turns",
        "there is no command /nonsense",
    ):
        assert says in out, says
    assert out.count("(new conversation)") == 2 and "never read" not in out
    (said,) = tokens.read_dialogues(tmp_path / "said.txt")
    assert len(said.turns) == 2 and said.turns[0] == "there"


def test_a_system_prompt(talk, tmp_path):
    """It is set, said to be new to this model, kept in JSON Lines, and taken away."""
    script = [
        "/system Be kind.",
        "what is red 1?",
        "/stats",
        "/save {f}.txt",
        "/save {f}.jsonl",
        "/system",
        "/stats",
        f"/system {'long' * 9}",
    ]
    out = talk("\n".join(script).format(f=tmp_path / "said")).out
    for says in (
        "(system prompt set)\n(this model was trained without system prompts: it may not follow",
        "(without the system prompt, which /save FILE.jsonl keeps)",
        "(no system prompt)",
        "it must leave half of the 32 that the model can read",
    ):
        assert says in out, says
    with_prompt, without = re.findall(r"context (\d+) of", out)
    assert int(with_prompt) - int(without) == len("Be kind.") + 2
    (kept,) = tokens.read_dialogues(tmp_path / "said.jsonl")
    (plain,) = tokens.read_dialogues(tmp_path / "said.txt")
    assert kept.roles == ["system", "user", "assistant"] and kept.turns[0] == "Be kind."
    assert kept.spoken == plain.turns and plain.turns[0] == "what is red 1?"


def test_a_model_that_has_read_system_prompts_is_known(tmp_path):
    """A run tells in its meta.json; of a model from elsewhere nothing is said."""
    assert chat.has_read_prompts(str(tmp_path))
    for source, knows in (({"kind": "text"}, False), ({"kind": "text", "prompts": 3}, True)):
        meta = json.dumps({"sources": [source]})
        (tmp_path / "meta.json").write_text(meta, encoding="utf-8")
        assert chat.has_read_prompts(str(tmp_path)) == knows


@pytest.mark.parametrize(
    "command, says",
    [
        ("/set temperature=-1", "temperature must be float >= 0 and <= 1000, not -1"),
        ("/set temprature=1", "did you mean temperature"),
        ("/set top_k=many", "top_k must be int"),
        ("/set warm", "/set KEY=VALUE ..., not warm"),
        ("/save /no/such/folder/x.txt", "could not save"),
    ],
)
def test_a_bad_command_changes_nothing(talk, command, says):
    before, message, after = talk(f"hi\n/set\n{command}\n/set\n").out.splitlines()[1:]
    assert says in message and before == after


def test_words_that_leave_and_forget(talk):
    assert talk("exit\nhi\n").out == ""
    assert talk("flush\n").out == "(new conversation)\n"
    assert talk("").out == ""


@pytest.mark.slow
def test_bytes_that_are_not_utf8_do_not_end_the_session(talk, model):
    done = subprocess.run(
        [sys.executable, str(ROOT / "chat.py"), str(model)],
        input=b"caf\xe9\nhi\n",
        capture_output=True,
        env={**ENV, "PYTHONIOENCODING": "utf-8"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout.decode().splitlines()) == 2


def test_settings_in_a_file(run, model, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"checkpoint: {model}\ndevice: cpu\nsample:\n  top_k: 7\n", encoding="utf-8"
    )
    result = run("chat", [tmp_path / "c.yaml", "sample.seed=5"], stdin="/set\n")
    assert result.status == 0 and "top_k=7" in result.out and "seed=5" in result.out
    step = next(model.glob("step-*"))
    assert run("chat", [step], stdin="hi\n").status == 0


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "which model?"),
        (["/no/such/run"], "(no step-... folder) in /no/such/run"),
        (["{empty}"], "there is no checkpoint"),
        (["{empty}/step-00000001"], "step-00000001"),
        (["{model}", "sample.top_p=2"], "sample.top_p must be float > 0 and <= 1, not 2"),
        (["{model}", "device=cuda"], "GPU"),
        (["{model}", "{model}"], "one model at a time"),
        (["{model}", "temperature=1"], "did you mean sample.temperature"),
        (["{model}", "sample.temperature=nan"], "sample.temperature must be float >= 0"),
        (["{model}", "sample.temperature=1e-40"], "must be at least 0.001, or 0"),
        (["{model}", "sample.temperature=1e39"], "must be float >= 0 and <= 1000, not 1e39"),
        (["\udcc6\udcc0"], "is not UTF-8: rename the file or folder"),
    ],
)
def test_mistakes(model, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)  # without the model of the repository
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    monkeypatch.setattr(sys, "argv", ["chat.py"])
    sys.argv += [arg.format(empty=tmp_path, model=model) for arg in args]
    with pytest.raises(UserError) as error:
        chat.main()
    assert says in str(error.value)


def test_a_closed_standard_input_is_a_mistake(model, monkeypatch):
    """Regression: `python chat.py RUN <&-` ended in an AttributeError: sys.stdin is None then."""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["chat.py", str(model)])
    with pytest.raises(UserError, match="standard input is closed"):
        chat.main()


@pytest.mark.parametrize(
    "path", ["/a/run #7", "runs/lr=0.1", "/a/b=c/step-00000001", "a: b", "007", "{x}", "[a]", "on"]
)
def test_the_path_of_a_model_arrives_as_typed(path):
    """Regression: "/a/run #7" opened /a/run, and a path with = in it was taken for a setting."""
    argv = chat.name_checkpoint(["config/x.yaml", path, "sample.seed=1", "--help"])
    assert argv == ["config/x.yaml", f"checkpoint={path}", "sample.seed=1", "--help"]
    assert settings.load(chat.ChatSettings, argv[1:2]).checkpoint == path


def test_a_model_in_a_folder_with_an_odd_name(run, model, tmp_path):
    odd = shutil.copytree(model, tmp_path / "lr=0.1 #2" / "on")
    result = run("chat", [odd, "sample.max_tokens=4"], stdin="hi\n")
    assert (result.status, result.err) == (0, "") and result.out.strip()


def test_without_a_home_folder_no_history_is_kept(monkeypatch):
    """Regression: HOME unset and an unknown uid, as in a container, ended in a RuntimeError."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    chat.line_editing()


class Terminal:
    """python chat.py in a pseudo-terminal."""

    def __init__(self, args: list[str], home: Path):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            env = {**ENV, "HOME": str(home), "TERM": "dumb"}
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # ignored where a shell began the tests with &
            os.execve(sys.executable, [sys.executable, str(ROOT / "chat.py"), *args], env)
        self.seen = ""

    def until(self, pattern: str, timeout: float = 60) -> str:
        """Read until the pattern appears in what is new; returns that."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[-2000:]!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
        new, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return new

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


# the likeliest token of an untrained model repeats itself, and never ends the reply
ENDLESS = [
    "device=cpu",
    "sample.max_tokens=4000",
    "sample.temperature=0",
    "sample.repetition_penalty=1",
]


@pytest.mark.slow
def test_a_terminal_session(tmp_path_factory, tiny, run, tmp_path):
    """Ctrl-C stops a long reply and the session goes on; Ctrl-D leaves with 0; history is kept."""
    out = tmp_path_factory.mktemp("long")
    # a model that has not learned to stop, with room for many seconds of talk
    args = tiny(
        out,
        run="r",
        max_steps=1,
        optim__lr=1e-5,
        model__block_size=4096,
        batch_tokens=4096,
        model__n_layer=8,
    )
    assert run("train", args).status == 0
    tty = Terminal(
        [str(out / "r"), *ENDLESS],
        tmp_path,
    )
    try:
        tty.until(r"/help lists the commands.*> ")
        tty.type("hello\n")
        tty.until(r"hello\r\n.")
        tty.type("\x03")  # at once: some 150 tokens later the reply ends by itself
        tty.until(r"\[stopped\]\r\n> ", timeout=10)
        tty.type("/set max_tokens=5\n")
        tty.until(r"max_tokens=5.*> ")
        tty.type("again\n")
        tty.until(r"again\r\n.+\r\n> ")
        tty.type("/stats\n")
        assert "4 turns" in tty.until(r"tokens/s.*> ")
        time.sleep(0.3)  # readline shows the prompt just before it listens
        tty.type("\x03")  # at the prompt: it does not leave
        tty.until(r"Ctrl-D.*> ")
        tty.type("\x04")
        assert tty.status() == 0
    finally:
        os.close(tty.fd)
    history = tmp_path / ".small_gpt_history"
    assert "again" in history.read_text(encoding="utf-8")


def test_a_half_precision_conversation_and_meta_of_a_newer_program(run, model, tmp_path):
    for dtype in ("bfloat16", "float16"):
        assert run("chat", [model, f"dtype={dtype}"], stdin="hi\n").status == 0
    shutil.copytree(model, tmp_path / "r")
    for step in (tmp_path / "r").glob("step-*"):
        meta = json.loads((step / "meta.json").read_text(encoding="utf-8"))
        meta["model"]["experts"] = 8
        (step / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert "another version" in mistake(run("chat", [tmp_path / "r"], stdin="hi\n"))
