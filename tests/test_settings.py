"""Settings: what a user may write, what is refused, and in which words."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated

import pytest
from annotated_types import Ge, Le

from helpers import ROOT
from smallgpt import settings
from smallgpt.console import UserError
from smallgpt.settings import Free, Positive, PositiveFloat, Switch, load


@dataclass
class ModelSettings:
    n_layer: int = 12  # number of transformer blocks
    n_head: Positive = 4  # attention heads; "#" is not a comment in here
    n_embd: int = 64  # width

    def check(self) -> list[str]:
        if self.n_embd % self.n_head:
            return [f"n_embd={self.n_embd} needs a multiple of n_head"]
        return []


@dataclass
class OptimSettings:
    lr: PositiveFloat = 1e-3  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # Adam's decay rates
    decay: Free[Annotated[float, Ge(0), Le(1)]] = 0.2  # last fraction


@dataclass
class Common:
    run: Free[str] = "default"  # the run folder's name
    compile: Switch = "auto"  # torch.compile


@dataclass
class Settings(Common):
    freeze: str = "none"  # none, trunk, or all_but_last:K
    path: str | list[str] = ""  # one file or several
    mask: bool = True  # a switch
    sizes: list[int] = field(
        default_factory=lambda: [1, 2],
    )  # a field on several lines
    words: list[str] = field(default_factory=list)  # some words
    extra: dict[str, str] = field(default_factory=dict)  # whatever a user adds
    grid: dict[str, list[str]] = field(default_factory=dict)  # lists of it
    model: ModelSettings = field(default_factory=ModelSettings)  # architecture
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=3e-4))  # optimizer
    sample: Free[OptimSettings] = field(default_factory=OptimSettings)  # a section that is free

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
        run="base", model=ModelSettings(3, 2), optim=OptimSettings(lr=1.0, betas=[0.8, 1.0])
    )
    assert isinstance(s.optim.lr, float)
    assert load(Settings, []) == Settings()
    assert load(Settings, [file("empty.yaml", "# nothing\n")]) == Settings()


def test_the_default_of_a_section_is_that_of_the_script(file):
    """A key set in a section must not bring back the part's own defaults of the other keys."""
    assert load(Settings, ["optim.decay=0.5"]).optim == OptimSettings(lr=3e-4, decay=0.5)
    assert load(Settings, [file("a.yaml", "optim: {decay: 1}")]).optim.lr == 3e-4


# --- values ---------------------------------------------------------------------------------------

TEXTS = [
    "exp #2",
    "Label #1",
    "/a/run #7",
    "007",
    "1e3",
    "0x1f",
    "2024_01",
    "on",
    "Yes",
    "No",
    "True",
    "null",
    "~",
    "2024-01-01",
    "12:30:45",
    "a=b",
    "a: b",
    "{x}",
    "[a, b]",
    "${model.n_layer}",
    "'quoted'",
    '"quoted"',
    "- a",
    "& * ! | > % @ `",
    " spaces ",
    "\\n",
    "好 🙂",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_was_typed(text, file, tmp_path):
    """Regression: `run="exp #2"` continued the run exp, and `run: 2024_01` the run 202401."""
    assert load(Settings, [f"run={text}", f"extra.k={text}"]).run == text
    s = load(Settings, [f"extra.a.b={text}"])
    assert s.extra == {"a.b": text}, "what is passed on to another script, too"
    quoted = json.dumps(text, ensure_ascii=False)
    in_file = load(Settings, [file("a.yaml", f"run: {quoted}\nextra: {{a: {{b: {quoted}}}}}")])
    assert (in_file.run, in_file.extra) == (text, {"a.b": text})
    settings.write(in_file, tmp_path / "written.yaml")
    assert load(Settings, [str(tmp_path / "written.yaml")]) == in_file


@pytest.mark.parametrize("text", ["on", "007", "2024_01", "Yes", "1e3", "null", "~", "12:30:45"])
def test_text_without_quotes_in_a_file_is_what_was_written(text, file):
    """Regression: YAML made another type of it: `label_column: Yes` looked for the column true."""
    s = load(Settings, [file("a.yaml", f"run: {text}\nwords: [a, {text}]\nextra: {{k: {text}}}")])
    assert (s.run, s.words, s.extra) == (text, ["a", text], {"k": text})
    s = load(Settings, [f"words=[{text}, 'a #b']", f"grid.k=[{text}]"])
    assert (s.words, s.grid) == ([text, "a #b"], {"k": [text]})


@pytest.mark.parametrize(
    "typed, path",
    [
        ("a.txt", "a.txt"),
        ("[a.txt, b #2.txt@0.5]", None),
        ("[a.txt, 'b #2.txt@0.5']", ["a.txt", "b #2.txt@0.5"]),
        ("[ab]*.txt", "[ab]*.txt"),
        ("data/[0-9]", "data/[0-9]"),
        ("{a}", "{a}"),
        ("[", "["),
        ("", ""),
    ],
)
def test_text_or_a_list(typed, path):
    """What stands in brackets is a list, all else is text; a list that # cuts short is refused."""
    if path is None:
        assert "put an item in quotes" in fails(f"path={typed}")
    else:
        assert load(Settings, [f"path={typed}"]).path == path


def test_scientific_notation_is_a_number(file):
    """YAML alone reads 1e-4, which has no dot, as text: the learning rate arrived as a str."""
    assert load(Settings, [file("a.yaml", "optim: {lr: 1e-4}")]).optim.lr == 1e-4
    assert load(Settings, ["optim.lr=1e-4"]).optim.lr == 1e-4
    assert load(Settings, ["optim.betas=[1e-1, 9e-1]"]).optim.betas == [0.1, 0.9]


@pytest.mark.parametrize("true, false", [("true", "false"), ("True", "NO"), ("on", "Off")])
def test_booleans(file, true, false):
    assert load(Settings, [f"mask={true}"]).mask is True
    assert load(Settings, [file("a.yaml", f"mask: {false}")]).mask is False
    assert load(Settings, [f"compile={true}"]).compile == "true"
    assert load(Settings, [file("b.yaml", f"compile: {false}")]).compile == "false"


def test_text_can_be_emptied():
    assert load(Settings, ["run="]).run == ""  # init_from= undoes what the file says
    assert fails("model.n_layer=") == "model.n_layer must be int, not ''"


@pytest.mark.parametrize(
    "typed", ["optim.lr=nan", "optim.lr=.inf", "optim.lr=1e999", "optim.lr=1e39"]
)
def test_numbers_that_nothing_can_be_done_with(typed):
    assert fails(typed).startswith("optim.lr")


def test_numbers_that_no_tensor_holds():
    """Regression: sample.temperature=1e39 and seed=2**63 ended in tracebacks of torch."""
    assert fails("optim.lr=1e39") == "optim.lr=1e39 is too large"
    assert fails(f"model.n_layer={2**63}") == f"model.n_layer={2**63} is too large"
    assert fails(f"model.n_layer=-{2**63}") == f"model.n_layer=-{2**63} is too large"


def test_a_file_replaces_a_mapping_and_the_command_line_adds_to_it(file):
    """`sweep.yaml set.trunk=x` adds to the file's set:, while a file's set: replaces its base's."""
    file("base.yaml", "extra: {a: 1}\nsizes: [1, 2]")
    path = file("a.yaml", "base: base.yaml\nextra: {b: {c: 2, d: 3}, e.f: 4}\nsizes: [1, 2, 3]")
    assert load(Settings, [path]).extra == {"b.c": "2", "b.d": "3", "e.f": "4"}
    s = load(Settings, [path, "extra.g=[5, 6]", "extra.b.c=7", "extra.h=x", "sizes=[9]"])
    assert s.extra == {"b.c": "7", "b.d": "3", "e.f": "4", "g": "[5, 6]", "h": "x"}
    assert s.sizes == [9], "a list is one value"
    assert load(Settings, [path, "grid.g=[1]", "grid.g=[2]"]).grid == {"g": ["2"]}
    assert load(Settings, [path, "extra={b: {c: 7}}"]).extra == {"b.c": "7"}
    assert load(Settings, [path, "extra={}"]).extra == {}


def test_text_that_is_not_utf8_is_refused():
    """Regression: a GBK file name as argument ended in a traceback when a run recorded it."""
    message = fails("run=" + os.fsdecode("评论.csv".encode("gbk")))
    assert message == r"run='\udcc6\udcc0\udcc2\udcdb.csv' is not UTF-8: rename the file or folder"
    assert "is not UTF-8" in fails("path=[a, \udcc6]")


# --- problems -------------------------------------------------------------------------------------


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
        ("model.n_head=0", "model.n_head must be int >= 1, not 0"),
        ("optim.lr=true", "optim.lr must be float > 0, not true"),
        ("optim.lr=0", "optim.lr must be float > 0, not 0"),
        ("optim.decay=2", "optim.decay must be float >= 0 and <= 1, not 2"),
        ("optim.betas=[x]", 'optim.betas must be list[float], written [a, b], not ["x"]'),
        ("sizes=3", "sizes must be list[int], written [a, b], not 3"),
        ("sizes=[1,", "sizes must be list[int], written [a, b], not [1,"),
        ("sizes=[1 #2]", "sizes=[1 #2]: did not find expected"),
        ("words=[a, [b]]", 'words must be list[str], written [a, b], not ["a", ["b"]]'),
        ("mask=maybe", "mask must be bool, not maybe"),
        ("compile=maybe", "compile must be auto|true|false, not maybe"),
        ("grid.k=3", "grid.k must be list[str], written [a, b], not 3"),
        ("model=3", "model is a section, not a value: set the keys in it, such as model.n_layer"),
    ],
)
def test_a_wrong_value_names_the_key_the_type_and_the_value(typed, message):
    assert fails(typed).startswith(message)


def test_a_wrong_value_in_a_file_names_the_file(file):
    path = file("a.yaml", "run: [a, b]\nmask:\nmodel: {n_layer: [1]}\npath: {a: b}\n")
    for problem in (
        'run must be str, not ["a", "b"]',
        "mask must be bool, not ''",
        'model.n_layer must be int, not ["1"]',
        'path must be str | list[str], not {"a": "b"}',
    ):
        assert f"{path}: {problem}" in fails(path)


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
    message = fails("gone.yaml", "lr=1")
    assert "there is no file gone.yaml" in message and "did you mean optim.lr" in message


def test_checks_are_collected_and_name_their_section():
    assert fails("model.n_embd=65") == "model: n_embd=65 needs a multiple of n_head"
    assert "exclude each other" in fails("model.n_layer=0", "freeze=trunk")
    assert "n_embd=65" in fails("optim.lr=x", "model.n_embd=65")


def test_a_check_does_not_blame_a_default():
    """With n_head=5 mistyped, the check saw the default 4 and called the user's n_embd wrong."""
    assert "multiple" not in fails("model.n_hed=5", "model.n_embd=65")


# --- files ----------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(file, tmp_path):
    file("small.yaml", "run: a")
    assert fails(str(tmp_path / "smal.yaml")).endswith(f"did you mean {tmp_path / 'small.yaml'}?")
    assert "settings are written key=value" in fails("nothing/n_layer")
    orphan = file("orphan.yaml", "base: gone/away.yaml")
    gone = tmp_path / "gone" / "away.yaml"
    assert fails(orphan).startswith(f"{orphan}: base: there is no file {gone}")
    both = fails(str(tmp_path / "small.yaml"), "x.yaml")
    assert both.count("x.yaml") == 2, "one too many, and missing"
    bad = file("bad.yaml", "run: a\nfreeze: b: c\n")
    assert "bad.yaml:2: mapping values are not allowed" in fails(bad)
    assert "list" in fails(file("list.yaml", "- 1"))
    assert "base must be the path" in fails(file("base.yaml", "base: [a, b]"))
    assert str(tmp_path) in fails(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("run: café".encode("latin-1"))
    assert "latin.yaml" in fails(str(tmp_path / "latin.yaml"))


def test_a_key_that_is_written_twice_is_refused(file):
    """YAML takes the second and says nothing, while a reader sees the first."""
    path = file("a.yaml", "run: a\nmodel:\n  n_layer: 1\n  n_layer: 2\n")
    assert fails(path) == f"{path}:4: n_layer is written twice"


def test_a_circle_of_bases_is_named(file, tmp_path):
    file("a.yaml", "base: b.yaml")
    b = file("b.yaml", "base: a.yaml")
    assert f"circle, {b} -> {tmp_path / 'a.yaml'} -> {b}" in fails(b)


def test_a_path_may_hold_an_equals_sign(file, tmp_path):
    """Regression: a YAML or a model below runs/lr=0.1 was taken for a setting."""
    path = file("lr=0.1/a.yaml", "run: found")
    assert load(Settings, [path]).run == "found"
    words = {"lr=0.1": True, "path=a/b=c": True, "runs/lr=0.1": False, "runs\\a=b": False}
    assert {word: settings.is_setting(word) for word in words} == words


def test_what_is_written_reads_back_unchanged(tmp_path):
    typed = ["run='7 你好'", "compile=true", "freeze=all_but_last:2", "optim.lr=1e-5", "mask=no"]
    s = load(Settings, [*typed, "path=[a, 007]", "grid.x=[1, on]", "extra.k.l= #"])
    s.words = ["a\nb\tc", "\x07", " ", "x" * 500 + " y" * 500]
    settings.write(s, tmp_path / "run-1.yaml")
    assert load(Settings, [str(tmp_path / "run-1.yaml")]) == s
    assert "你好" in (tmp_path / "run-1.yaml").read_text(encoding="utf-8")


# --- identity -------------------------------------------------------------------------------------


def test_the_identity_is_every_setting_that_is_not_free():
    s = load(Settings, ["run=x", "optim.lr=1", "extra.k=v"])
    everything = settings.flat(s)
    assert list(everything)[:3] == ["run", "compile", "freeze"]
    assert everything["run"] == "x" and everything["model.n_layer"] == 12
    assert everything["extra"] == {"k": "v"} and "model" not in everything
    same = settings.identity(s)
    free = {"run", "optim.decay", "sample.lr", "sample.betas", "sample.decay"}
    assert everything.keys() - same.keys() == free
    assert same == {name: everything[name] for name in same}
    assert json.loads(json.dumps(same))["optim.lr"] == 1.0


@pytest.mark.parametrize("script", ["train", "sentiment"])
def test_what_may_change_when_a_run_is_resumed(script):
    """A new setting is part of the identity; one that is marked Free is listed here, too."""
    common = "run out_dir device dtype compile max_steps eval_every save_every log_every keep"
    optim = (
        "lr embedding_factor head_factor min_lr schedule warmup decay weight_decay beta1 beta2 clip"
    )
    free = {
        *common.split(),
        "resume",
        "save",
        "timeout",
        "tracker",
        "recompute",
        *(f"optim.{name}" for name in optim.split()),
    }
    if script == "train":
        from train import TrainSettings as Schema

        sample = "temperature top_k top_p repetition_penalty max_tokens seed"
        free |= {"micro_batch", "init_from", "prompts", "data.path", "data.cache"}
        free |= {f"sample.{name}" for name in sample.split()}
    else:
        from sentiment_train import SentimentSettings as Schema

        free |= {"epochs", "micro_tokens", "patience", "trunk", "allow_leaks", "cache_gb"}
        free |= {"before", "score_test"}
        mesh = "shard replicate tp sequence pp schedule virtual offload reduce"
        free |= {"data.path", "data.test_path", *(f"mesh.{name}" for name in mesh.split())}
    s = Schema()
    assert settings.flat(s).keys() - settings.identity(s).keys() == free


# --- help -----------------------------------------------------------------------------------------


def test_help_shows_every_key_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        load(Settings, ["no-such-file.yaml", "lr=1", "-h"], doc="Trains.\n\n    python train.py")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ")}
    assert text.startswith("Trains.") and "usage: python" in text
    assert "\nmodel: architecture" in text
    assert rows["run"] == ["run", "default", "str", "the", "run", "folder's", "name"]  # inherited
    assert rows["compile"][1:3] == ["auto", "auto|true|false"]
    # the script's default, not the part's
    assert rows["optim.lr"][1:6] == ["0.0003", "float", ">", "0", "peak"]
    assert rows["optim.decay"][2:7] == ["float", ">=", "0", "and", "<="]
    assert '"#" is not a comment in here' in text and "a field on several lines" in text


def test_settings_do_not_import_torch():
    """With torch, --help of a script that needs none would take seconds."""
    code = "import sys, smallgpt.settings; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ)
    assert done.returncode == 0


def test_a_section_of_another_script_is_named(tmp_path):
    """Regression: train.py mesh.shard=2 was answered by "did you mean optim.schedule?"."""
    from train import TrainSettings

    with pytest.raises(UserError, match="this script has no section mesh, but data, tokenizer"):
        settings.load(TrainSettings, ["mesh.shard=2"])
    with pytest.raises(UserError, match="did you mean optim.lr?"):
        settings.load(TrainSettings, ["optm.lr=2"])
