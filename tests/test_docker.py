"""The Dockerfile, as far as it can be checked without Docker."""

import re
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

from helpers import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]


def test_every_file_that_the_image_installs_from_exists_and_is_copied_before():
    """A requirements file was renamed, and the build fails after minutes."""
    before, _, _ = DOCKERFILE.partition("COPY . .")
    (copied,) = re.findall(r"^COPY (.+) \./$", before, flags=re.M)
    wanted = re.findall(r" -[rc] (\S+txt)", before)
    assert wanted and set(wanted) == set(copied.split())
    assert all((ROOT / name).is_file() for name in wanted)


def test_the_base_has_a_python_that_the_package_allows():
    (version,) = re.findall(r"^ARG BASE=python:([\d.]+)-slim$", DOCKERFILE, flags=re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version in SpecifierSet(project["requires-python"])


def test_what_git_ignores_stays_out_of_the_image():
    """An image holds somebody's corpus, checkpoints or virtual environment."""
    hidden = {line.removeprefix("**/").rstrip("/") for line in lines(".dockerignore")}
    for line in lines(".gitignore"):
        name = line.rstrip("/")
        assert name in hidden or name.endswith(".gitkeep"), line
    assert ".git" in hidden


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_readme_builds_with_arguments_that_there_are(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"--build-arg (\w+)=", text)
    assert named and set(named) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, flags=re.M))
    (folder,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, flags=re.M)
    mounted = re.findall(r":(/\S+)\"", text)
    assert mounted == [f"{folder}/checkpoints", f"{folder}/data"]
