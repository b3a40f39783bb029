"""The house rules: who imports whom, how text is opened, how much a line holds, what a YAML must
say."""

import ast
import re
import sys
from pathlib import Path

import pytest

from bench import density
from helpers import ROOT
from smallgpt import settings

MAIN = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]
PARTS = sorted((ROOT / "smallgpt").rglob("*.py"))
NAMES = {p.stem for p in ROOT.glob("*.py")}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it, with their full names."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            is_package = (ROOT / node.module.replace(".", "/")).is_dir()
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if is_package
                else {node.module}
            )
    return {name for name in found if name.partition(".")[0] in {*NAMES, "smallgpt", "scripts"}}


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module.partition(".")[0])
    return found


# Who may be imported by whom: a part imports only parts of its own rank or of lower ones.
RANKS = [
    {
        "model",
        "smallgpt.settings",
        "smallgpt.console",
        "smallgpt.files",
        "smallgpt.parquet",
        "smallgpt.plots",
    },
    {"smallgpt.adam"},
    {
        "smallgpt.hardware",
        "smallgpt.tokenizer",
        "smallgpt.turns",
        "smallgpt.optim",
        "smallgpt.sampling",
    },
    {"smallgpt.text", "smallgpt.parallel"},
    {"smallgpt.runs"},
    {"smallgpt.weights"},
    {"smallgpt.sentiment"},
    {"smallgpt.inference"},
    {"smallgpt.server"},
]


def rank(name: str) -> int:
    """The place of a module in RANKS; that of a script is above all."""
    room = ".".join(name.split(".")[:2])
    return next((i for i, rooms in enumerate(RANKS) if room in rooms), len(RANKS))


def test_import_direction():
    assert imported(ROOT / "model.py") <= {"torch", *sys.stdlib_module_names}
    for path in PARTS:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in modules(path):
            assert rank(name) <= rank(own), f"{own} imports {name}"
    for path in MAIN:
        allowed = {"model"}
        if path.stem in ("train_fsdp", "plan"):  # the same settings, and more
            allowed |= {"train", "train_fsdp"}
        assert imported(path) & NAMES <= allowed, f"{path.name} imports another script"


@pytest.mark.parametrize(
    "path", [*MAIN, *PARTS, *(ROOT / "bench").glob("*.py")], ids=lambda p: p.name
)
def test_text_is_utf8_everywhere(path):
    """Windows opens text in its own code page unless told; and nothing is ever unpickled."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        where, keywords = f"{path.name}:{node.lineno}", {k.arg for k in node.keywords}
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if isinstance(node.func, ast.Name) and name == "open":
            modes = [
                a.value
                for a in [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
            ]
            assert any("b" in mode for mode in modes) or "encoding" in keywords, where
        if name in ("read_text", "write_text"):
            assert "encoding" in keywords, where
        assert name not in ("Unpickler", "allow_pickle"), where
        if (
            name == "load"
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            assert node.func.value.id != "pickle", where
            assert node.func.value.id != "torch" or "weights_only" in keywords, where


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def contains(node: ast.AST, kinds: type | tuple[type, ...]) -> bool:
    """Is there such a node below this one?"""
    return any(isinstance(other, kinds) for other in ast.walk(node) if other is not node)


@pytest.mark.parametrize("path", [*MAIN, *PARTS], ids=lambda p: p.name)
def test_one_idea_a_line(path):
    """A condition that calls and names something at once, or a comprehension inside another one,
    would have to be read twice."""
    for node in ast.walk(tree(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            for part in ast.walk(node.test):
                names_a_call = isinstance(part, ast.NamedExpr) and contains(part, ast.Call)
                assert not names_a_call, f"{where}: a walrus takes the value of a call"
        if isinstance(node, COMPREHENSIONS):
            assert not contains(node, COMPREHENSIONS), f"{where}: a comprehension inside another"


def test_the_code_is_not_packed():
    """At most as many tokens a line as nanoGPT has, over all scripts and parts."""
    counts = [density.count(path) for path in density.project_files()]
    tokens = sum(tokens for tokens, _ in counts)
    lines = sum(lines for _, lines in counts)
    assert tokens / lines <= 9.0


@pytest.mark.parametrize("path", sorted((ROOT / "config").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_yaml_is_read_by_its_script(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    script = re.search(rf"(\S+\.py).*config/{path.name}", first)
    assert first.startswith("#") and script, (
        f"{path.name} must begin with a comment that holds its command"
    )
    if "chat.py" in first:
        from chat import ChatSettings as Schema
    elif "sentiment_train.py" in first:
        from sentiment_train import SentimentSettings as Schema
    elif "scripts/sweep.py" in first:
        from scripts.sweep import SweepSettings as Schema
    elif "train_fsdp.py" in first:
        from train_fsdp import MeshTrainSettings as Schema
    elif "train.py" in first:
        from train import TrainSettings as Schema
    else:
        pytest.skip(f"{script[1]}: a test beside that script reads it")
    settings.load(Schema, [str(path)])
