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
import os
import re
import sys
import textwrap
import tokenize
from collections.abc import Collection, Iterator
from dataclasses import asdict, astuple, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from smallgpt.console import UserError

T = TypeVar("T")
FREE = "may change when a run is resumed"
FINITE = ConfigDict(allow_inf_nan=False)
LIMITS = {int: 2**63, float: 2.0**128}  # where int64 and float32 end
SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python spells such bytes of an argument
BRACKETS = {"[]": list, "{}": dict}


def _spelled(word: Any) -> str:
    """Other words for true and false, which YAML has, as Switch spells them."""
    lower = str(word).lower()
    if lower in ("yes", "on"):
        return "true"
    if lower in ("no", "off"):
        return "false"
    return lower


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
    """A setting or a section: a field of a dataclass object, or an item of a mapping."""

    name: str  # dotted: model.n_layer
    owner: Any  # the object, or the mapping
    field: str  # n_layer
    hint: Any
    free: bool = False

    @property
    def value(self) -> Any:
        """What the field holds; an item is only ever set."""
        return getattr(self.owner, self.field)

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.value)

    @property
    def bare_hint(self) -> Any:
        """The type without limits and marks."""
        if get_origin(self.hint) is Annotated:
            return self.hint.__origin__
        return self.hint

    @property
    def item_hint(self) -> Any:
        """The type of a mapping's items; None if it is no mapping."""
        if get_origin(self.bare_hint) is not dict:
            return None
        _, item = get_args(self.bare_hint)
        return item

    @property
    def kind(self) -> str:
        """The type as people read it: int >= 1, auto|cpu|cuda|mps, str | list[str]."""
        bare = self.bare_hint
        if get_origin(bare) is Literal:
            return "|".join(get_args(bare))
        limits = []
        for mark in getattr(self.hint, "__metadata__", ()):
            sign = SIGNS.get(type(mark))
            if sign:
                (limit,) = astuple(mark)
                limits.append(f" {sign} {limit}")
        return inspect.formatannotation(bare) + " and".join(limits)

    def set(self, given: Any) -> None:
        """Set it to text, or to lists and mappings of text. ValueError: what is wrong with it."""
        if isinstance(given, str):
            given = self.parse(given)
        if isinstance(given, dict):
            given = dotted(given)
        try:
            value = TypeAdapter(self.hint, config=FINITE).validate_python(given)
        except ValidationError:
            is_list = get_origin(self.bare_hint) is list
            wanted = f"{self.kind}, written [a, b]" if is_list else self.kind
            raise ValueError(f"{self.name} must be {wanted}, not {_show(given)}") from None
        limit = LIMITS.get(type(value))
        if limit and abs(value) >= limit:
            raise ValueError(f"{self.name}={given} is too large")
        if isinstance(self.owner, dict):
            self.owner[self.field] = value
        else:
            setattr(self.owner, self.field, value)

    def parse(self, text: str) -> Any:
        """[a, b] as a list where the type allows one, {a: b} as a mapping; other text as it is."""
        if NOT_UTF8.search(text):
            raise ValueError(f"{self.name}={text!r} is not UTF-8: rename the file or folder")
        options = (self.bare_hint, *get_args(self.bare_hint))
        brackets = text[:1] + text[-1:]
        wanted = BRACKETS.get(brackets)
        if wanted is None or wanted not in map(get_origin, options):
            return text
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            _, problem = _explain(error)
            fix = "put an item in quotes if it holds any of , : # [ ]"
            raise ValueError(f"{self.name}={text}: {problem}; {fix}") from None


Keys = dict[str, Key]  # by their dotted names: run, model, model.n_layer, ...
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
    broken = [name for name, _ in problems]
    problems += _check("", settings, broken)
    for key in keys.values():
        if key.is_section:
            problems += _check(f"{key.name}.", key.value, broken)

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


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """The command line as (folders of runs, settings and options)."""
    runs = []
    others = []
    for word in words:
        if word.startswith("-") or is_setting(word):
            others.append(word)
        else:
            runs.append(word)
    return runs, others


def name_checkpoint(words: list[str]) -> list[str]:
    """The command line with the folder of a model written as checkpoint=FOLDER."""
    paths, _ = split_words(words)
    models = [path for path in paths if not path.endswith((".yaml", ".yml"))]
    if len(models) > 1:
        raise UserError(f"one model at a time, not {' and '.join(models)}")
    return [f"checkpoint={word}" if word in models else word for word in words]


def write(settings: Any, path: str | Path) -> None:
    """Write the settings to `path` as YAML that `load` reads back unchanged, in UTF-8."""
    values = asdict(settings)
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=sys.maxsize)
    Path(path).write_text(text, encoding="utf-8")


def flat(settings: Any) -> dict[str, Any]:
    """Every setting by its dotted name: {"run": "pretrain", "model.n_layer": 12, ...}."""
    found: dict[str, Any] = {}
    for key in _keys(settings).values():
        if not key.is_section:
            found[key.name] = key.value
    return found


def identity(settings: Any) -> dict[str, Any]:
    """`flat` without what is Free: a run can be resumed by settings of the same identity only."""
    found = flat(settings)
    for key in _keys(settings).values():
        if key.free:
            found.pop(key.name, None)
    return found


def dotted(values: dict, keys: Collection[str] = (), prefix: str = "") -> dict:
    """Nested values by dotted names: {"optim": {"lr": 1}} as {"optim.lr": 1}.

    A mapping that is the value of one of `keys` stays whole."""
    found = {}
    for name, value in values.items():
        name = prefix + name
        if isinstance(value, dict) and value and name not in keys:
            found |= dotted(value, keys, f"{name}.")
        else:
            found[name] = value
    return found


def _keys(section: Any, prefix: str = "", free: bool = False) -> Keys:
    """All settings and sections in a section."""
    keys: Keys = {}
    hints = get_type_hints(type(section), include_extras=True)
    for field, hint in hints.items():
        marks = getattr(hint, "__metadata__", ())
        key = Key(prefix + field, section, field, hint, free or FREE in marks)
        keys[key.name] = key
        if key.is_section:
            keys |= _keys(key.value, f"{key.name}.", key.free)
    return keys


def _assign(keys: Keys, values: dict, where: str = "") -> Iterator[Problem]:
    """Set the values; yield what cannot be set."""
    leaves = [key.name for key in keys.values() if not key.is_section]
    for name, value in dotted(values, leaves).items():
        try:
            _find(keys, name).set(value)
        except ValueError as error:
            yield name, f"{where}{error}"


def _find(keys: Keys, name: str) -> Key:
    """The key of this name, also one that a mapping may have: set.optim.lr, in `set`."""
    if name in keys and keys[name].is_section:
        first, *_ = fields(keys[name].value)
        hint = f"set the keys in it, such as {name}.{first.name}"
        raise ValueError(f"{name} is a section, not a value: {hint}")
    if name in keys:
        return keys[name]
    for key in keys.values():
        if key.item_hint and name.startswith(f"{key.name}."):
            item = name.removeprefix(f"{key.name}.")
            return Key(name, key.value, item, key.item_hint)
    *_, last = name.split(".")
    namesakes = [key.name for key in keys.values() if key.field == last]  # lr -> optim.lr
    sections = [key.name for key in keys.values() if key.is_section]
    if not namesakes and name.partition(".")[0] not in sections and "." in name:
        raise ValueError(
            f"unknown key {name}: this script has no section {name.partition('.')[0]}, but "
            f"{', '.join(sections)} (--help lists every key)"
        )
    candidates = namesakes or keys
    (near,) = get_close_matches(name, candidates, n=1, cutoff=0.0)
    raise ValueError(f"unknown key {name}; did you mean {near}? (--help lists every key)")


def _check(prefix: str, section: Any, broken: list[str]) -> Iterator[Problem]:
    """What check() finds in a section without broken keys: it would blame their defaults."""
    for name in broken:
        if name.startswith(prefix) or prefix.startswith(name):
            return
    label = f"{prefix[:-1]}: " if prefix else ""
    if hasattr(section, "check"):
        for message in section.check():
            yield prefix, label + message


class _Loader(getattr(yaml, "CBaseLoader", yaml.BaseLoader)):
    """YAML whose scalars stay the text that was written. libyaml alone reads [How are you?]."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = []
        for key, _ in node.value:
            if key.value in names:
                twice = f"{key.value} is written twice"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            names.append(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, above: tuple = ()) -> dict[Path, dict]:
    """File -> its values, as text: those of the `base:` first. `above`: whose bases led here."""
    chain = (*above, path)
    if os.path.realpath(path) in map(os.path.realpath, above):
        circle = " -> ".join(map(str, chain))
        raise UserError(f"{path}: base: goes in a circle, {circle}")
    try:
        values = yaml.load(path.read_bytes(), _Loader) or {}
    except FileNotFoundError:
        neighbours = map(str, path.parent.glob("*.yaml"))
        near = get_close_matches(str(path), neighbours, n=1)
        hint = f"did you mean {near[0]}?" if near else "settings are written key=value"
        base = f"{above[-1]}: base: " if above else ""
        raise UserError(f"{base}there is no file {path}; {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        line, problem = _explain(error)
        raise UserError(f"{path}{line}: {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold `key: value` lines, not a list")
    base = values.pop("base", "")
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the path of one YAML file, not {_show(base)}")
    below = {}
    if base:
        below = read_yaml(path.parent / base, chain)
    return {**below, path: values}


def _explain(error: yaml.YAMLError) -> tuple[str, str]:
    """(":LINE" or "", what is wrong there)."""
    if isinstance(error, yaml.MarkedYAMLError):
        return f":{error.problem_mark.line + 1}", error.problem
    return "", str(error).partition("\n")[0]


def _show(value: Any) -> str:
    """A value on one line; text is shown as it is."""
    if isinstance(value, str):
        return value or "''"
    return json.dumps(value, ensure_ascii=False)


def _help(keys: Keys, doc: str | None) -> str:
    usage = f"\nusage: python {sys.argv[0]} [SETTINGS.yaml] [key=value ...]\n"
    lines = [inspect.cleandoc(doc or ""), usage]
    width = max(map(len, keys))
    for name, key in keys.items():
        meaning = _meanings(type(key.owner))[key.field]
        if key.is_section:
            lines.append(f"\n{name}: {meaning}")
        else:
            default = _show(key.value)
            lines.append(f"  {name:<{width}}  {default:<11}  {key.kind:<22}  {meaning}")
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
                line, _ = token.start
                comments[line] = token.string.lstrip("# ")
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                lines = range(node.lineno, node.end_lineno + 1)
                found = [comments[line] for line in lines if line in comments]
                meanings[node.target.id] = " ".join(found)
    return meanings
