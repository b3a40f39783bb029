"""Settings: dataclass defaults < one YAML file (with `base:`) < key=value on the command line; strict.

Each part declares a dataclass beside its code, every field with a default; a script nests them as sections.
The dataclass is its own documentation: `--help` shows the comment that ends each field's line.

    @dataclass
    class Settings:
        seed: int = 0  # the same seed gives the same run
        model: ModelSettings = field(default_factory=ModelSettings)  # architecture

    settings = load(Settings, doc=__doc__)      # python train.py config/tiny.yaml model.n_layer=4

A dataclass may define `check(self) -> list[str]` for what types cannot state, such as exclusive options.
"""

import ast
import functools
import inspect
import io
import math
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from smallgpt.console import UserError

T = TypeVar("T")
_ALTERNATIVES = (Literal, Union, UnionType)
_Problem = tuple[str, str]  # the key or section it is about ("" if it may be any), and the message
_Layer = tuple[str, dict, str | None]  # how its messages begin, its values, the value as typed


class _Key(NamedTuple):
    hint: Any
    default: Any
    owner: type  # the dataclass that declares it


def load(schema: type[T], argv: list[str] | None = None, doc: str | None = None) -> T:
    """Settings from `argv` (default: sys.argv[1:]): at most one YAML path, and key=value. UserError: all problems.

    `-h` or `--help` anywhere prints `doc` and every key, and exits with status 0."""
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(
            _help(schema, doc), flush=True
        )  # flushed so that `--help | head` breaks the pipe inside `cli`
        raise SystemExit(0)
    return _build(
        schema, [arg for arg in argv if "=" not in arg], [arg for arg in argv if "=" in arg]
    )


def write(settings: Any, path: str | Path) -> None:
    """Write the settings to `path` as YAML that `load` reads back unchanged, in UTF-8."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(settings)), encoding="utf-8")


def _build(schema: type[T], paths: list[str | Path], overrides: list[str]) -> T:
    problems: list[_Problem] = []
    if len(paths) > 1:
        problems.append(
            ("", f"give one YAML file, not {', '.join(paths)} (settings are written key=value)")
        )
    layers = [layer for path in paths for layer in read_yaml(Path(path), problems)]
    for token in overrides:
        key, _, text = token.partition("=")
        try:
            layers.append(("", OmegaConf.to_container(OmegaConf.from_dotlist([token])), text))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            problems.append(
                (key, f"{token} cannot be read as YAML ({_brief(error)}): quote the value")
            )
    keys = dict(_walk(schema()))
    config = OmegaConf.structured(schema())
    for where, values, text in layers:
        problems += (
            (name, where + message) for name, message in _assign(config, keys, values, text)
        )
    try:
        settings = OmegaConf.to_object(config)
        numbers = ((k, v.default) for k, v in _walk(settings) if isinstance(v.default, int | float))
        wrong = (
            (k, v) for k, v in numbers if not abs(v) < (2**63 if isinstance(v, int) else math.inf)
        )  # nan, too
        problems += ((k, f"{k}={v} is no number to work with") for k, v in wrong)
        # A refused value left a default in its place: a check that saw it would blame what the user never wrote.
        broken = [key for key, _ in problems]
        for section, message in _checks(settings):
            if not any(key.startswith(section) or section.startswith(key) for key in broken):
                problems.append((section, message))
    except (
        OmegaConfBaseException
    ) as error:  # ${interpolations} are followed once everything is merged
        problems.append((error.full_key, f"{error.full_key}: {_brief(error)}"))
    if problems:
        heading = ["several problems"] if len(problems) > 1 else []
        raise UserError("\n  - ".join([*heading, *(message for _, message in problems)]))
    return settings


def _walk(section: Any, prefix: str = "") -> Iterator[tuple[str, _Key]]:
    hints = get_type_hints(type(section))
    for f in fields(section):
        value = getattr(section, f.name)
        yield prefix + f.name, _Key(hints[f.name], value, type(section))
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{f.name}.")


def _assign(
    config: Any, keys: dict, values: dict, text: str | None, prefix: str = ""
) -> Iterator[_Problem]:
    """Set the values, found below `prefix`, in the config; yield what cannot be set."""
    for name, value in values.items():
        name = f"{prefix}{name}"
        is_section = name in keys and is_dataclass(keys[name].default)
        if isinstance(value, dict) and (is_section or (value and name not in keys)):
            yield from _assign(config, keys, value, text, name + ".")
        elif name not in keys:
            yield (
                name,
                f"unknown key {name}; did you mean {_nearest(name, keys)}? (--help lists every key)",
            )
        elif is_section:
            inside = next(key for key in keys if key.startswith(f"{name}."))
            yield name, f"{name} is a section, not a value: set the keys in it, such as {inside}"
        else:
            value = "" if (value, text, keys[name].hint) == (None, "", str) else value  # init_from=
            if isinstance(value, bool | int | float) and _is_text(keys[name].hint):
                # YAML reads `true` and 007 as no text: they keep the spelling if known, a bool in lower case
                spelling = str(value) if text is None else text
                value = spelling.lower() if isinstance(value, bool) else spelling
            try:
                OmegaConf.update(
                    config, name, value, merge=text is not None
                )  # key=value adds to a mapping
            except OmegaConfBaseException:
                yield name, f"{name} must be {_type_name(keys[name].hint)}, not {_show(value)}"


def _checks(section: Any, prefix: str = "") -> Iterator[_Problem]:
    for name, value in vars(section).items():
        if is_dataclass(value):
            yield from _checks(value, f"{prefix}{name}.")
    if hasattr(section, "check"):
        yield from (
            (prefix, f"{prefix[:-1]}: {text}".removeprefix(": ")) for text in section.check()
        )


def read_yaml(path: Path, problems: list[_Problem], above: tuple[Path, ...] = ()) -> list[_Layer]:
    """The file as a layer, after those of its `base:`; adds to `problems`. `above`: the files whose bases led here."""
    chain = (*above, path)
    try:
        if path.resolve() in [p.resolve() for p in above]:
            raise ValueError(f"base: goes in a circle, {' -> '.join(map(str, chain))}")
        values = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(values, dict):
            raise ValueError("must hold `key: value` lines, not a list")
        base = values.pop("base", None)
        if not isinstance(base, str | None):
            raise ValueError(f"base must be the path of one YAML file, not {_show(base)}")
        below = read_yaml(path.parent / base, problems, chain) if base else []
        return [*below, (f"{path}: ", values, None)]
    except FileNotFoundError:
        near = get_close_matches(str(path), map(str, path.parent.glob("*.yaml")), n=1)
        hint = f"did you mean {near[0]}?" if near else "settings are written key=value"
        problems.append(
            ("", f"{f'{above[-1]}: base: ' if above else ''}there is no file {path}; {hint}")
        )
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        problems.append(("", f"{path}{f':{mark.line + 1}' if mark else ''}: {_brief(error)}"))
    return []


def _nearest(name: str, keys: dict[str, _Key]) -> str:
    """The valid key most like `name`; one with the same last part if there is any (`lr` -> `optim.lr`)."""
    namesakes = [key for key in keys if key.rpartition(".")[2] == name.rpartition(".")[2]]
    return get_close_matches(name, namesakes or keys, n=1, cutoff=0.0)[0]


def _brief(error: Exception) -> str:
    text = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error)
    return text.partition("\n")[0]


def _is_text(hint: Any) -> bool:
    """Whether nothing but text or null fits: str, a Literal of strings, either of them optional."""
    if get_origin(hint) in _ALTERNATIVES:
        return all(map(_is_text, get_args(hint)))
    return hint in (str, NoneType) or isinstance(hint, str)


def _type_name(hint: Any) -> str:
    if get_origin(hint) in _ALTERNATIVES:
        return "|".join(map(_type_name, get_args(hint)))
    name = hint.__name__ if inspect.isclass(hint) else str(hint).removeprefix("typing.")
    return name.replace("NoneType", "null")


def _show(value: Any) -> str:
    """The value as it would be written in YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=sys.maxsize)
    return text.removesuffix("...\n").strip()


def _help(schema: type, doc: str | None) -> str:
    keys = dict(_walk(schema()))
    width = max(map(len, keys))
    usage = f"\nusage: python {Path(sys.argv[0]).name} [SETTINGS.yaml] [key=value ...]\n"
    lines = [inspect.cleandoc(doc or ""), usage]
    for name, (hint, default, owner) in keys.items():
        meaning = _meanings(owner)[name.rpartition(".")[2]]
        if is_dataclass(default):
            lines.append(f"\n{name}: {meaning}")
        else:
            lines.append(
                f"  {name:<{width}}  {_show(default):<10}  {_type_name(hint):<12}  {meaning}"
            )
    return "\n".join(lines).strip()


@functools.cache
def _meanings(cls: type) -> dict[str, str]:
    """Field -> the comment beside it in the source of the dataclass, or of the dataclass it inherits from."""
    meanings = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                lines = range(node.lineno, node.end_lineno + 1)
                meanings[node.target.id] = " ".join(
                    comments[line] for line in lines if line in comments
                )
    return meanings


def identity(s: Any) -> dict[str, Any]:
    """SHIM until the settings branch is merged."""
    from dataclasses import asdict

    free = {
        "run",
        "out_dir",
        "device",
        "dtype",
        "compile",
        "max_steps",
        "micro_batch",
        "eval_every",
        "save_every",
        "log_every",
        "keep",
        "resume",
        "init_from",
        "prompts",
        "sample",
        "epochs",
        "micro_tokens",
        "patience",
        "trunk",
        "allow_leaks",
        "cache_gb",
    }
    flat = {}

    def walk(d: dict, prefix: str) -> None:
        for k, v in d.items():
            if isinstance(v, dict):
                walk(v, prefix + k + ".")
            else:
                flat[prefix + k] = v

    walk({k: v for k, v in asdict(s).items() if k not in free}, "")
    drop = {"data.path", "data.test_path", "data.cache"}
    return {
        k: v
        for k, v in flat.items()
        if k not in drop and not (k.startswith("optim.") and k != "optim.name")
    }
