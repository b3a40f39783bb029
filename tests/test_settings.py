"""Settings: what a user may write, what is refused, and in which words."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from helpers import ROOT
from smallgpt import settings
from smallgpt.console import UserError
from smallgpt.settings import load


@dataclass
class ModelSettings:
    n_layer: int = 12  # number of transformer blocks
    n_head: int = 4  # attention heads; "#" is not a comment in here
    n_embd: int = 64  # width

    def check(self) -> list[str]:
        return (
            []
            if self.n_embd % self.n_head == 0
            else [f"n_embd={self.n_embd} needs a multiple of n_head"]
        )


@dataclass
class OptimSettings:
    lr: float = 1e-3  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # Adam's decay rates
    grad_clip: float | None = 1.0  # maximum gradient norm


@dataclass
class Common:
    run: str = "default"  # the run folder's name
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile


@dataclass
class Settings(Common):
    freeze: Any = "none"  # none, trunk, or all_but_last: k
    sizes: list[int] = field(
        default_factory=lambda: [1, 2],
    )  # a field on several lines
    extra: dict[str, Any] = field(default_factory=dict)  # whatever a user adds
    model: ModelSettings = field(default_factory=ModelSettings)  # architecture
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=3e-4))  # optimizer

    def check(self) -> list[str]:
        both = self.freeze != "none" and self.model.n_layer == 0
        return ["freeze and n_layer=0 exclude each other"] if both else []


def fails(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        load(Settings, list(argv))
    return str(error.value)


@pytest.fixture
def file(tmp_path):
    def make(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return make


def test_defaults_then_bases_then_file_then_command_line(file):
    file("base.yaml", "run: base\nmodel: {n_layer: 1, n_head: 2}\noptim: {lr: 1}")
    path = file("sub/tiny.yaml", "base: ../base.yaml\nmodel:\n  n_layer: 2\n")
    s = load(Settings, ["optim.betas=[0.8, 1]", path, "model.n_layer=3"])
    assert s == Settings(
        run="base", model=ModelSettings(3, 2), optim=OptimSettings(lr=1.0, betas=(0.8, 1.0))
    )
    assert isinstance(s.optim.lr, float) and isinstance(s.optim.betas, tuple)
    assert load(Settings, []) == Settings()


def test_scientific_notation_is_a_number(file):
    # PyYAML alone reads 1e-4, which has no dot, as text: the learning rate arrived as a str.
    assert load(Settings, [file("a.yaml", "optim: {lr: 1e-4}")]).optim.lr == 1e-4
    assert load(Settings, ["optim.lr=1e-4"]).optim.lr == 1e-4


def test_text_keeps_its_spelling():
    # YAML reads 7, 1000.0, True, text and 202401: all but one are not what the user named the run.
    for name in ("007", "1e3", "on", "a=b", "2024_01"):
        assert load(Settings, [f"run={name}"]).run == name
    assert load(Settings, ["compile=True"]).compile == "true"


def test_a_bool_in_yaml_fits_a_text_choice(file):
    assert load(Settings, [file("a.yaml", "compile: true")]).compile == "true"
    assert load(Settings, [file("b.yaml", "compile: off")]).compile == "false"


def test_text_can_be_emptied():
    assert load(Settings, ["run="]).run == ""  # init_from= undoes what the file says
    assert "model.n_layer must be int, not null" in fails("model.n_layer=")


@pytest.mark.parametrize("typed", ["optim.lr=.nan", "optim.lr=.inf", f"model.n_layer={2**63}"])
def test_numbers_that_nothing_can_be_done_with(typed):
    assert "is no number to work with" in fails(typed)


def test_null_only_where_optional():
    assert load(Settings, ["optim.grad_clip=null"]).optim.grad_clip is None
    assert fails("optim.lr=null") == "optim.lr must be float, not null"
    assert fails("run=null") == "run must be str, not null"


def test_interpolation_follows_the_merged_values(file):
    path = file("a.yaml", "run: layers-${model.n_layer}\nmodel: {n_head: '${model.n_embd}'}")
    s = load(Settings, [path, "model.n_layer=5", "model.n_embd=8"])
    assert (s.run, s.model.n_head) == ("layers-5", 8)
    assert "optim.lr" in fails("optim.lr=${nothing}") and "nothing" in fails("optim.lr=${nothing}")


def test_a_file_replaces_a_mapping_and_the_command_line_adds_to_it(file):
    # `sweep.yaml set.trunk=x` must not lose the set: of the YAML; a YAML that writes set: anew means the whole of it.
    file("base.yaml", "extra: {a: 1}\nsizes: [1, 2]")
    path = file("a.yaml", "base: base.yaml\nextra: {b: {c: 2, d: 3}, e.f: 4}\nsizes: [1, 2, 3]")
    assert load(Settings, [path]).extra == {"b": {"c": 2, "d": 3}, "e.f": 4}
    s = load(Settings, [path, "extra.g=[5, 6]", "extra.b.c=7", "extra.h=x", "sizes=[9]"])
    assert s.extra == {"b": {"c": 7, "d": 3}, "e.f": 4, "g": [5, 6], "h": "x"}
    assert s.sizes == [9], "a list is one value"
    assert load(Settings, [path, "extra.g=[1]", "extra.g=[2]"]).extra["g"] == [2]


@pytest.mark.parametrize(
    "typed, nearest",
    [
        ("lr=1", "optim.lr"),
        ("model.nlayer=1", "model.n_layer"),
        ("modle.n_head=1", "model.n_head"),
        ("--n_embd=1", "model.n_embd"),
        ("optim.n_layer=1", "model.n_layer"),
        ("rnu=x", "run"),
        ("=1", ""),
    ],
)
def test_an_unknown_key_names_the_nearest(typed, nearest):
    assert f"unknown key {typed.split('=')[0]}; did you mean {nearest}" in fails(typed)


@pytest.mark.parametrize(
    "typed, message",
    [
        ("model.n_layer=two", "model.n_layer must be int, not two"),
        ("model.n_layer=1.5", "model.n_layer must be int, not 1.5"),
        ("optim.lr=true", "optim.lr must be float, not true"),
        ("optim.betas=[1]", "optim.betas must be tuple[float, float], not [1]"),
        ("optim.grad_clip=x", "optim.grad_clip must be float|null, not x"),
        ("sizes=3", "sizes must be list[int], not 3"),
        ("compile=maybe", "compile must be auto|true|false, not maybe"),
        ("model=3", "model is a section, not a value: set the keys in it, such as model.n_layer"),
        (
            "sizes=[1,",
            "sizes=[1, cannot be read as YAML (did not find expected node content): quote",
        ),
    ],
)
def test_a_wrong_value_names_the_key_the_type_and_the_value(typed, message):
    assert fails(typed).startswith(message)


def test_every_problem_is_reported_at_once(file):
    path = file("a.yaml", "optim: {lr: fast}\nmodel:\ncolour: red")
    message = fails(path, "compile=x", "lr=1", "freeze=trunk")
    for part in (
        f"{path}: optim.lr must be float",
        "model is a section",
        "unknown key colour",
        "compile must",
        "did you mean optim.lr",
        "several problems\n  - ",
    ):
        assert part in message


def test_checks_are_collected_and_name_their_section():
    assert fails("model.n_embd=65") == "model: n_embd=65 needs a multiple of n_head"
    assert "exclude each other" in fails("model.n_layer=0", "freeze=trunk")
    assert "n_embd=65" in fails("optim.lr=x", "model.n_embd=65")


def test_a_check_does_not_blame_a_default():
    # With n_head=5 mistyped, the check saw the default n_head=4 and called the user's n_embd wrong.
    assert "multiple" not in fails("model.n_hed=5", "model.n_embd=65")


def test_files_that_cannot_be_read(file, tmp_path):
    file("small.yaml", "run: a")
    assert fails(str(tmp_path / "smal.yaml")).endswith(f"did you mean {tmp_path / 'small.yaml'}?")
    assert "settings are written key=value" in fails("nothing/n_layer")
    orphan = file("orphan.yaml", "base: gone/away.yaml")
    assert fails(orphan).startswith(
        f"{orphan}: base: there is no file {tmp_path / 'gone' / 'away.yaml'}"
    )
    assert (
        fails(str(tmp_path / "small.yaml"), "x.yaml").count("x.yaml") == 2
    )  # one too many, and missing
    assert "bad.yaml:2: mapping values are not allowed" in fails(
        file("bad.yaml", "run: a\nfreeze: b: c\n")
    )
    assert "list" in fails(file("list.yaml", "- 1"))
    assert "base must be the path" in fails(file("base.yaml", "base: [a, b]"))
    assert str(tmp_path) in fails(str(tmp_path))


def test_a_circle_of_bases_is_named(file, tmp_path):
    file("a.yaml", "base: b.yaml")
    b = file("b.yaml", "base: a.yaml")
    assert f"circle, {b} -> {tmp_path / 'a.yaml'} -> {b}" in fails(b)


def test_what_is_written_reads_back_unchanged(tmp_path):
    s = load(Settings, ["run='7 你好'", "compile=true", "freeze.all_but_last=2", "optim.lr=1e-5"])
    settings.write(s, tmp_path / "run-1.yaml")
    assert load(Settings, [str(tmp_path / "run-1.yaml")]) == s
    assert "你好" in (tmp_path / "run-1.yaml").read_text(encoding="utf-8")


def test_help_shows_every_key_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        load(Settings, ["no-such-file.yaml", "lr=1", "-h"], doc="Trains.\n\n    python train.py")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ")}
    assert (
        text.startswith("Trains.") and "usage: python" in text and "\nmodel: architecture" in text
    )
    assert rows["run"] == ["run", "default", "str", "the", "run", "folder's", "name"]  # inherited
    assert rows["compile"][1:3] == ["auto", "auto|true|false"]
    assert rows["optim.lr"][1:4] == [
        "0.0003",
        "float",
        "peak",
    ]  # the script's default, not the part's
    assert '"#" is not a comment in here' in text and "a field on several lines" in text


SCRIPT = """
import sys
from smallgpt import console
def main():
    {}
console.run(main)
"""


def run(body: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT.format(body)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


def test_cli_turns_the_end_of_main_into_an_exit_status():
    mistake = run("raise console.UserError('no file x; give one')")
    assert (mistake.returncode, mistake.stderr) == (2, "error: no file x; give one\n")
    # under torchrun all ranks mostly fail alike: rank 0 says so at once, the others only if they are still there then
    start = time.monotonic()
    other_rank = run("raise console.UserError('no file x')", RANK="1")
    assert (other_rank.returncode, other_rank.stderr) == (2, "(process 1: no file x)\n")
    assert time.monotonic() - start > 2
    interrupted = run("raise KeyboardInterrupt")
    assert (interrupted.returncode, interrupted.stderr) == (130, "")
    assert run("return 3").returncode == 3
    assert run("return None").returncode == 0


def test_what_goes_to_a_file_is_utf8_on_every_system():
    """On Windows every Chinese character of `scripts/classify.py ... > file` became a question mark."""
    command = [sys.executable, "-c", SCRIPT.format("print(input())")]
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    result = subprocess.run(
        command, cwd=ROOT, env=env, input="你好\n".encode(), capture_output=True
    )
    assert result.stdout.decode().strip() == "你好", result.stderr


def test_a_full_gpu_is_one_message():
    body = "raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory')"
    assert (
        "memory is full: lower micro_batch" in (done := run(body)).stderr and done.returncode == 2
    )
    assert (
        "Traceback" not in done.stderr and "Traceback" in run("raise RuntimeError('a bug')").stderr
    )


def test_a_closed_pipe_is_quiet():
    # `chat.py --help | head -1` ended in "Exception ignored in ... BrokenPipeError".
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", SCRIPT.format("print('x' * 10)")]
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_settings_do_not_import_torch():
    # With torch, --help takes seconds.
    assert run("return int('torch' in sys.modules)").returncode == 0
