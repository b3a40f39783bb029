"""Typed settings: defaults < one YAML file (with `base:`) < key=value on the command line.

Each part declares a dataclass beside its code; a script nests them as sections. A field has a type
that states its limits, a default, and at the end of its line a comment that `--help` shows.

    @dataclass
    class Settings:
        seed: int = 0  # the same seed gives the same run
        log_every: Free[Positive] = 10  # steps between records
        model: ModelSettings = field(default_factory=ModelSettings)  # architecture

    settings = load(Settings, doc=__doc__)  # python train.py config/tiny.yaml model.n_layer=4

Text is what was typed, not what YAML makes of it: `run=exp #2`, `run=007` and, in a file, `run: on`
name the runs "exp #2", "007" and "on". pydantic converts text to the other types.
What types cannot state, such as exclusive options, a dataclass finds in `check(self) -> list[str]`.
"""

import ast
import functools
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from smallgpt.console import UserError

T = TypeVar("T")
FREE = "may change when a run is resumed"
SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python spells such bytes of an argument
BRACKETS = {"[]": list, "{}": dict}
SWITCH = {"yes": "true", "on": "true", "no": "false", "off": "false"}  # as in YAML


def _spelled(word: Any) -> str:
    lower = str(word).lower()
    return SWITCH.get(lower, lower)


Free = Annotated[T, FREE]  # Free[Positive], Free[str]; what is not Free is a run's identity
Positive = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
Amount = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
Share = Annotated[float, Gt(0), Lt(1)]  # neither none nor all
Rate = Annotated[float, Ge(0), Lt(1)]  # of dropout, of a moving average
Switch = Annotated[Literal["auto", "true", "false"], BeforeValidator(_spelled)]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float64", "float32", "bfloat16", "float16"]


@dataclass
class Key:
    """A setting or a section: one field of a dataclass object."""

    owner: Any  # the object
    name: str  # of the field
    hint: Any
    free: bool

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.name)

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.value)


Keys = dict[str, Key]  # by dotted names: run, model, model.n_layer, ...
Problem = tuple[str, str]  # the key it is about, "" for all of them, and the message


def load(schema: type[T], argv: list[str] | None = None, doc: str | None = None) -> T:
    """Settings from `argv` (default: sys.argv[1:]): at most one YAML path, and key=value.

    UserError: all problems at once. `-h` or `--help` anywhere prints `doc` and every key and exits
    with status 0."""
    words = sys.argv[1:] if argv is None else argv
    settings = schema()
    keys = _keys(settings)
    if "-h" in words or "--help" in words:
        # flushed, so that `--help | head` breaks the pipe inside console.run
        print(_help(keys, doc), flush=True)
        raise SystemExit(0)

    problems: list[Problem] = []
    paths = [word for word in words if not is_setting(word)]
    if len(paths) > 1:
        listed = ", ".join(paths)
        problems.append(("", f"give one YAML file, not {listed} (settings are written key=value)"))
    for path in paths:
        try:
            layers = read_yaml(Path(path))
        except UserError as error:
            problems.append(("", str(error)))
            continue
        for file, values in layers.items():
            problems += _assign(keys, values, where=f"{file}: ")
    for word in filter(is_setting, words):
        name, _, text = word.partition("=")
        problems += _assign(keys, {name: text})
    problems += _check(settings, keys, [name for name, _ in problems])

    messages = [message for _, message in problems]
    if len(messages) > 1:
        messages.insert(0, "several problems")
    if messages:
        raise UserError("\n  - ".join(messages))
    return settings


def is_setting(word: str) -> bool:
    """Whether a word of the command line is key=value. `runs/lr=0.1` is a path."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key and "\\" not in key


def write(settings: Any, path: str | Path) -> None:
    """Write the settings to `path` as YAML that `load` reads back unchanged, in UTF-8."""
    text = yaml.safe_dump(asdict(settings), allow_unicode=True, sort_keys=False, width=sys.maxsize)
    Path(path).write_text(text, encoding="utf-8")


def flat(settings: Any) -> dict[str, Any]:
    """Every setting by its dotted name: {"run": "pretrain", "model.n_layer": 12, ...}."""
    return {name: key.value for name, key in _keys(settings).items() if not key.is_section}


def identity(settings: Any) -> dict[str, Any]:
    """`flat` without what is Free: a run can be resumed by settings of the same identity only."""
    keys = _keys(settings)
    return {name: value for name, value in flat(settings).items() if not keys[name].free}


def _keys(section: Any, prefix: str = "", free: bool = False) -> Keys:
    """All settings and sections in a section."""
    keys: Keys = {}
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        key = Key(section, name, hint, free or FREE in marks)
        keys[prefix + name] = key
        if key.is_section:
            keys |= _keys(key.value, f"{prefix}{name}.", key.free)
    return keys


def dotted(values: dict, keys: Keys | None = None, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names: {"optim": {"lr": 1}} as {"optim.lr": 1}.

    A mapping that is the value of one of `keys` stays whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        name = prefix + name
        is_value = keys and name in keys and not keys[name].is_section
        if isinstance(value, dict) and value and not is_value:
            found |= dotted(value, keys, f"{name}.")
        else:
            found[name] = value
    return found


def _assign(keys: Keys, values: dict, where: str = "") -> Iterator[Problem]:
    """Set the values, which are text, or lists and mappings of text; yield what cannot be set."""
    for name, value in dotted(values, keys).items():
        try:
            key, item = _find(keys, name)
            if item:  # of a mapping
                hint = get_args(_bare(key.hint))[1]
                converted = {**key.value, item: _convert(name, value, hint)}
            else:
                converted = _convert(name, value, key.hint)
            setattr(key.owner, key.name, converted)
        except ValueError as error:
            yield name, f"{where}{error}"


def _find(keys: Keys, name: str) -> tuple[Key, str]:
    """The key of this name and ""; or that of a mapping and the item: set.optim.lr is in `set`."""
    for known, key in keys.items():
        below = f"{known}."
        if name == known and key.is_section:
            first = next(other for other in keys if other.startswith(below))
            raise ValueError(
                f"{name} is a section, not a value: set the keys in it, such as {first}"
            )
        if name == known:
            return key, ""
        if name.startswith(below) and get_origin(_bare(key.hint)) is dict:
            return key, name.removeprefix(below)
    # one with the same last part if there is any: lr -> optim.lr
    namesakes = [key for key in keys if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = get_close_matches(name, namesakes or keys, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown key {name}; did you mean {near}? (--help lists every key)")


def _convert(name: str, value: Any, hint: Any) -> Any:
    """The value as the type of this key wants it. ValueError: what is wrong with it."""
    if isinstance(value, str):
        if NOT_UTF8.search(value):
            raise ValueError(f"{name}={value!r} is not UTF-8: rename the file or folder")
        value = _read_brackets(name, value, hint)
    if isinstance(value, dict):
        value = dotted(value)
    adapter = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    try:
        converted = adapter.validate_python(value)
    except ValidationError:
        raise ValueError(f"{name} must be {_describe(hint)}, not {_show(value)}") from None
    limit = 2**63 if isinstance(converted, int) else 2.0**128  # int64 and float32 end there
    if isinstance(converted, int | float) and abs(converted) >= limit:
        raise ValueError(f"{name}={value} is too large")
    return converted


def _read_brackets(name: str, text: str, hint: Any) -> Any:
    """[a, b] as a list where the type allows one, {a: b} as a mapping; other text unchanged."""
    bare = _bare(hint)
    allowed = [get_origin(option) for option in (bare, *get_args(bare))]
    kind = BRACKETS.get(text[:1] + text[-1:])
    if kind is None or kind not in allowed:
        return text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}={text} cannot be read: {_brief(error)}") from None


def _check(settings: Any, keys: Keys, broken: list[str]) -> Iterator[Problem]:
    """What check() finds in each section that has no broken key: it would blame the default."""
    sections = {f"{name}.": key.value for name, key in keys.items() if key.is_section}
    for prefix, section in {**sections, "": settings}.items():
        is_broken = any(name.startswith(prefix) or prefix.startswith(name) for name in broken)
        if hasattr(section, "check") and not is_broken:
            label = prefix[:-1] + ": " if prefix else ""
            for message in section.check():
                yield prefix, label + message


class _Loader(getattr(yaml, "CBaseLoader", yaml.BaseLoader)):
    """YAML whose scalars stay the text that was written. libyaml alone reads [How are you?]."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in names[:i]:
                twice = f"{key.value} is written twice"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[Path, dict[str, Any]]:
    """File -> its values, as text: those of the `base:` first. `above`: whose bases led here."""
    if path.resolve() in [other.resolve() for other in above]:
        circle = " -> ".join(map(str, [*above, path]))
        raise UserError(f"{path}: base: goes in a circle, {circle}")
    try:
        values = yaml.load(path.read_bytes(), _Loader) or {}
    except FileNotFoundError:
        near = get_close_matches(str(path), map(str, path.parent.glob("*.yaml")), n=1)
        hint = f"did you mean {near[0]}?" if near else "settings are written key=value"
        where = f"{above[-1]}: base: " if above else ""
        raise UserError(f"{where}there is no file {path}; {hint}") from None
    except (OSError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: {_brief(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold `key: value` lines, not a list")
    base = values.pop("base", "")
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the path of one YAML file, not {_show(base)}")
    below = read_yaml(path.parent / base, (*above, path)) if base else {}
    return {**below, path: values}


def _brief(error: Exception) -> str:
    text = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error)
    return text.partition("\n")[0]


def _bare(hint: Any) -> Any:
    """The type without its limits and marks."""
    return hint.__origin__ if get_origin(hint) is Annotated else hint


def _describe(hint: Any) -> str:
    """The type as people read it: int >= 1, auto|cpu|cuda|mps, str | list[str]."""
    bare = _bare(hint)
    if get_origin(bare) is Literal:
        return "|".join(get_args(bare))
    limits = []
    for mark in getattr(hint, "__metadata__", ()):
        if sign := SIGNS.get(type(mark)):
            limits.append(f" {sign} {astuple(mark)[0]}")
    return inspect.formatannotation(bare) + " and".join(limits)


def _show(value: Any) -> str:
    """A value on one line; text is shown as it is."""
    if isinstance(value, str):
        return value or "''"
    return json.dumps(value, ensure_ascii=False)


def _help(keys: Keys, doc: str | None) -> str:
    usage = f"\nusage: python {Path(sys.argv[0]).name} [SETTINGS.yaml] [key=value ...]\n"
    lines = [inspect.cleandoc(doc or ""), usage]
    width = max(map(len, keys))
    for name, key in keys.items():
        meaning = _meanings(type(key.owner))[key.name]
        if key.is_section:
            lines.append(f"\n{name}: {meaning}")
        else:
            kind = _describe(key.hint)
            default = _show(key.value)
            lines.append(f"  {name:<{width}}  {default:<10}  {kind:<22}  {meaning}")
    return "\n".join(lines).strip()


@functools.cache
def _meanings(cls: type) -> dict[str, str]:
    """Field -> the comment beside it, in the source of the dataclass or one it inherits from."""
    meanings: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        source = textwrap.dedent(inspect.getsource(base))
        comments: dict[int, str] = {}  # line -> its comment
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.string.lstrip("# ")
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                lines = range(node.lineno, node.end_lineno + 1)
                found = [comments[line] for line in lines if line in comments]
                meanings[node.target.id] = " ".join(found)
    return meanings
