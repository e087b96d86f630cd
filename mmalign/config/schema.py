"""The signature is the schema: settings read off signatures, and plain values checked against them.

Settings are the fields of a dataclass and the keyword-only parameters of a function; positional parameters are data.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from mmalign.config.reading import KeyPath
from mmalign.errors import UserError

Faults = list[tuple[KeyPath, str]]
FAULTY: Any = object()  # what a check returns where it has reported a fault


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of a config: its annotation, a function giving its default (None: required), and a line of help."""

    annotation: Any
    default: Callable[[], Any] | None = None
    help: str = ""
    positional: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One entry of a table with its settings, defaults included: `{name: dpo, beta: 5000}`.

    `extra` holds the keys that the table's owner adds (the weight of a loss, say) and that the target does not know.
    """

    name: str
    target: Any
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def build(self, *data: Any, **more: Any) -> Any:
        """Calls the target with positional data and the settings; `more` overrides settings."""
        return self.target(*data, **{**self.settings, **more})

    def with_settings(self, **settings: Any) -> Choice:
        """The same choice with some settings replaced."""
        return dataclasses.replace(self, settings={**self.settings, **settings})


@dataclass(frozen=True, eq=False)
class Table:
    """What a name in a config may be: stands in `Annotated[Choice, Table(LOSSES)]`.

    Args:
        source: a dict name -> function or dataclass (or its address "package.module:thing"), or something lazy: a
            function giving that dict, or the address of the dict. A name with a colon is an address, always allowed.
        extra: keys added to every entry, name -> (type, default); `dataclasses.MISSING` as default makes the key required.
        widen: settings that the config accepts in a wider type than the target, name -> type.
        known_as: other names that people know an entry by, in small letters -> what to write instead, which the error tells.
    """

    source: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | str
    extra: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    widen: Mapping[str, Any] = field(default_factory=dict)
    known_as: Mapping[str, str] = field(default_factory=dict)

    def entries(self) -> Mapping[str, Any]:
        """The dict, imported now if it was given lazily."""
        if isinstance(self.source, str):
            return typing.cast("Mapping[str, Any]", import_address(self.source))
        return self.source() if callable(self.source) else self.source

    def settings_of(self, target: Any) -> dict[str, Setting]:
        """The settings of one entry, widened, without the extra keys."""
        settings = settings_of(target)
        wider = {
            name: dataclasses.replace(settings[name], annotation=wide) for name, wide in self.widen.items() if name in settings
        }
        return {**settings, **wider}

    def choose(self, name: str, **settings: Any) -> Choice:
        """A Choice made in Python, checked like one from YAML.

        Raises:
            UserError: unknown name or setting, wrong type.
        """
        faults: Faults = []
        choice = check_choice(self, {"name": name, **settings}, (), faults)
        if faults:
            raise UserError("\n".join(": ".join(filter(None, (name, ".".join(path), fault))) for path, fault in faults))
        return typing.cast(Choice, choice)


def import_address(address: str) -> Any:
    """The thing at "package.module:thing".

    Raises:
        UserError: no such module, or no such thing in it.
    """
    module, _, thing = address.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in thing.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import {address!r} ({error}). Want package.module:thing.") from error
    return found


def settings_of(target: Any) -> dict[str, Setting]:
    """Keyword-only fields of a dataclass, or keyword-only parameters of a function or class; positional ones are data."""
    if dataclasses.is_dataclass(target):
        module = sys.modules[target.__module__]  # as globals, so that a lambda inside an annotation finds its names
        hints = typing.get_type_hints(target, vars(module), include_extras=True)
        return {f.name: _field_setting(f, hints[f.name]) for f in dataclasses.fields(target) if f.init and f.kw_only}
    if not callable(target):
        return {}
    function = target.__init__ if inspect.isclass(target) else getattr(target, "func", target)  # .func: functools.partial
    hints = typing.get_type_hints(function, include_extras=True)
    settings = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = None if parameter.default is parameter.empty else _constant(parameter.default)
            settings[name] = Setting(annotation=hints.get(name, Any), default=default)
    return settings


def _field_setting(one: dataclasses.Field[Any], annotation: Any) -> Setting:
    default: Callable[[], Any] | None = None
    if one.default is not dataclasses.MISSING:
        default = _constant(one.default)
    elif one.default_factory is not dataclasses.MISSING:
        default = one.default_factory
    metadata = one.metadata
    return Setting(
        annotation=annotation,
        default=default,
        help=metadata.get("help", ""),
        positional=metadata.get("positional", False),
    )


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union that YAML can say: tensors are left out."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for m in typing.get_args(annotation) if not _is_tensor(m))
    return (annotation,)


def _is_tensor(annotation: Any) -> bool:
    return inspect.isclass(annotation) and any(c.__module__.split(".")[0] in ("torch", "jaxtyping") for c in annotation.__mro__)


def table_of(annotation: Any) -> Table | None:
    """The table of `Annotated[Choice, Table(...)]`, or None for any other annotation."""
    if typing.get_origin(annotation) is Annotated:
        return next((m for m in annotation.__metadata__ if isinstance(m, Table)), None)
    return None


def is_structure(annotation: Any) -> bool:
    """Whether a value of this type has keys or items that are checked one by one."""
    if dataclasses.is_dataclass(annotation) or table_of(annotation) is not None:
        return True
    if typing.get_origin(annotation) in (tuple, list, dict):
        return any(is_structure(m) for a in typing.get_args(annotation) for m in members(a))
    return False


def check(annotation: Any, value: Any, path: KeyPath, faults: Faults, default: Callable[[], Any] | None = None) -> Any:
    """The typed value, or FAULTY with its faults appended; `default` fills what a mapping leaves out."""
    alternatives = members(annotation)
    if value is None and type(None) in alternatives:
        return None
    structures = [m for m in alternatives if is_structure(m)]
    only_structure = len(structures) == len([m for m in alternatives if m is not type(None)])
    if structures and (only_structure or isinstance(value, (dict, list))):
        return _check_structure(structures[0], value, path, faults, default)
    leaves = tuple(m for m in alternatives if m not in structures)
    return _check_leaf(Union[leaves], value, path, faults)  # noqa: UP007  (a union of a variable number of types)


def _check_structure(kind: Any, value: Any, path: KeyPath, faults: Faults, default: Callable[[], Any] | None) -> Any:
    table = table_of(kind)
    if table is not None:
        return check_choice(table, value, path, faults, default() if default else None)
    if dataclasses.is_dataclass(kind):
        return check_dataclass(kind, value, path, faults, default() if default else None)
    if typing.get_origin(kind) is dict:
        return _check_dict(typing.get_args(kind)[1], value, path, faults)
    return _check_items(kind, value, path, faults)


def check_dataclass(cls: Any, value: Any, path: KeyPath, faults: Faults, default: Any = None) -> Any:
    """An instance of the dataclass, keys left out taken from `default` or the fields' own defaults."""
    if not isinstance(value, Mapping):
        faults.append((path, f"got {show(value)}, want keys of its own: {', '.join(settings_of(cls))}."))
        return FAULTY
    settings = settings_of(cls)
    if dataclasses.is_dataclass(default):
        settings = {k: dataclasses.replace(s, default=_constant(getattr(default, k))) for k, s in settings.items()}
    checked = _check_settings(settings, value, path, faults)
    return FAULTY if checked is FAULTY else _construct(cls, checked, path, faults)


def _construct(cls: Any, values: Mapping[str, Any], path: KeyPath, faults: Faults) -> Any:
    try:
        return cls(**values)
    except ValueError as error:  # __post_init__ has found settings that do not go together
        message = str(error)
        key, _, rest = message.partition(": ")
        if rest and key.split(".")[0] in values:  # `lr: got 0, want ...` names its own field
            path, message = (*path, *key.split(".")), rest
        faults.append((path, message))
        return FAULTY


def check_choice(table: Table, value: Any, path: KeyPath, faults: Faults, default: Choice | None = None) -> Any:
    """A Choice from `{name: dpo, beta: 5000}` or plain `dpo`; a mapping without a name changes settings of the default."""
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        faults.append(
            (path, f"got {show(value)}, want a name or {{name: ..., settings}}. Known: {', '.join(table.entries())}.")
        )
        return FAULTY
    name = given.get("name", default.name if default else None)
    if not isinstance(name, str):
        got = f"got {show(name)}, want" if "name" in given else "missing; want"
        faults.append(((*path, "name"), f"{got} one of {', '.join(table.entries())}."))
        return FAULTY
    try:
        target = _find(table, name)
    except UserError as error:
        faults.append(((*path, "name"), str(error)))
        return FAULTY
    settings = table.settings_of(target)
    extra = {
        k: Setting(annotation=a, default=None if d is dataclasses.MISSING else _constant(d))
        for k, (a, d) in table.extra.items()
    }
    schema = {**settings, **extra}
    if default is not None and "name" not in given:
        kept = {**default.settings, **default.extra}
        schema = {k: dataclasses.replace(s, default=_constant(kept[k])) if k in kept else s for k, s in schema.items()}
    checked = _check_settings(schema, {k: v for k, v in given.items() if k != "name"}, path, faults)
    if checked is FAULTY:
        return FAULTY
    own = {k: v for k, v in checked.items() if k not in extra}
    if _can_construct(target, own) and not table.widen and _construct(target, own, path, faults) is FAULTY:
        return FAULTY
    return Choice(name=name, target=target, settings=own, extra={k: checked[k] for k in extra})


def _find(table: Table, name: str) -> Any:
    if ":" in name:
        return import_address(name)
    entries = table.entries()
    if name not in entries:
        here = table.known_as.get(name.lower())
        hint = f" Here {name} is {here}." if here else nearest(name, entries)
        raise UserError(f"got {name!r}, want one of {', '.join(entries)}.{hint} A thing of yours is package.module:thing.")
    target = entries[name]
    return import_address(target) if isinstance(target, str) else target


def _can_construct(target: Any, settings: Collection[str]) -> bool:
    return (
        inspect.isclass(target)
        and dataclasses.is_dataclass(target)
        and all(f.kw_only for f in dataclasses.fields(target) if f.init)
    )


def _check_settings(settings: Mapping[str, Setting], value: Mapping[Any, Any], path: KeyPath, faults: Faults) -> Any:
    before = len(faults)
    for key in value:
        if key not in settings:
            hint = nearest(str(key), settings) or f" Known here: {', '.join(settings) or 'no keys at all'}."
            faults.append(((*path, str(key)), f"unknown key.{hint}"))
    checked = {}
    for name, setting in settings.items():
        if name in value:
            checked[name] = check(setting.annotation, value[name], (*path, name), faults, setting.default)
        elif setting.default is not None:
            default = setting.default()
            if isinstance(default, Choice):  # with every setting filled in, as if it had been written
                default = check(setting.annotation, {}, (*path, name), faults, setting.default)
            checked[name] = default
        else:
            faults.append(((*path, name), f"missing; want {words(setting.annotation)}."))
    return FAULTY if len(faults) > before else checked


def _check_items(kind: Any, value: Any, path: KeyPath, faults: Faults) -> Any:
    container = typing.get_origin(kind)
    args = typing.get_args(kind)
    if isinstance(value, (str, Mapping)):
        items, paths = [value], [path]  # one thing stands for a list of one
    elif isinstance(value, list):
        items, paths = value, [(*path, str(index)) for index in range(len(value))]
    else:
        faults.append((path, f"got {show(value)}, want {words(kind)}."))
        return FAULTY
    fixed = container is tuple and args[-1] is not Ellipsis
    if fixed and len(items) != len(args):
        faults.append((path, f"got {len(items)} items, want {words(kind)}."))
        return FAULTY
    kinds = args if fixed else (args[0],) * len(items)
    checked = [check(k, item, p, faults) for k, item, p in zip(kinds, items, paths, strict=True)]
    return FAULTY if any(item is FAULTY for item in checked) else typing.cast(Any, container)(checked)


def _check_dict(kind: Any, value: Any, path: KeyPath, faults: Faults) -> Any:
    if not isinstance(value, Mapping):
        faults.append((path, f"got {show(value)}, want keys of your own, each {words(kind)}."))
        return FAULTY
    checked = {str(k): check(kind, item, (*path, str(k)), faults) for k, item in value.items()}
    return FAULTY if any(item is FAULTY for item in checked.values()) else checked


def _check_leaf(kind: Any, value: Any, path: KeyPath, faults: Faults) -> Any:
    """pydantic in strict JSON mode: no text for numbers, but lists for tuples, text for paths, integers for floats."""
    from pydantic import TypeAdapter, ValidationError

    if isinstance(value, float) and math.isnan(value):
        faults.append((path, "got NaN, want a number."))
        return FAULTY
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
        if len(members(kind)) > 1 or all(not fault["loc"] for fault in found):
            faults.append((path, _leaf_fault(kind, value, found[0])))
        else:
            faults += [((*path, *map(str, f["loc"])), f"got {show(f['input'])}: {_lower(f['msg'])}.") for f in found]
        return FAULTY


def _leaf_fault(kind: Any, value: Any, found: Mapping[str, Any]) -> str:
    bound = {
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "multiple_of",
        "value_error",
        "too_short",
        "too_long",
    }
    if found["type"] in bound:
        return f"got {show(value)}: {_lower(found['msg'])}."
    quotes = " Put it in quotes." if kind is str and not isinstance(value, (list, dict, type(None))) else ""
    options = [o for m in members(kind) if typing.get_origin(m) is Literal for o in typing.get_args(m) if isinstance(o, str)]
    hint = nearest(value, options) if isinstance(value, str) else ""
    return f"got {show(value)}, want {words(kind)}.{hint}{quotes}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


WORD_SLIPS = 1.5  # what words too many weigh


def nearest(name: str, options: Collection[str]) -> str:
    """` Did you mean beta?` where something is near, or one is a word of the other (`flow_dpo`, `vqa`); else nothing."""
    words = name.lower().split("_")
    near = [option for typed in (name, name.lower()) for option in difflib.get_close_matches(typed, list(options), n=8)]
    near += [option for option in options if option in words or name.lower() in option.split("_")]
    if not near:
        return ""
    return f" Did you mean {min(near, key=lambda option: WORD_SLIPS if option in words else _slips(name, option))}?"


def _slips(name: str, option: str) -> float:
    """Letters left out, put in or mistaken between the two; two letters that changed places are half a slip.

    Source: the optimal string alignment distance, with that weight.
    """
    above: list[float] = []
    row = [float(j) for j in range(len(option) + 1)]
    for i, letter in enumerate(name, 1):
        before, above, row = above, row, [float(i)]
        for j, other in enumerate(option, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter != other and letter == option[j - 2] and other == name[i - 2]:
                row[j] = min(row[j], before[j - 2] + 0.5)
    return row[-1]


def show(value: Any) -> str:
    """A value as a message shows it: YAML's spelling, cut at 60 characters."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_WORDS = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    type(None): "null",
    Any: "anything",
}


def words(annotation: Any) -> str:
    """A type in plain words: `a number or "auto"`, `one of fp32, bf16`, `a list, each an integer`."""
    alternatives = members(annotation)
    if len(alternatives) > 1:
        return " or ".join(words(m) for m in alternatives)
    kind = alternatives[0]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if table_of(kind) is not None:
        return "a name with settings"
    if origin is Annotated:
        return words(args[0])
    if origin is Literal:
        return str(args[0]) if len(args) == 1 else f"one of {', '.join(map(str, args))}"
    if origin is dict:
        return f"keys, each {words(args[1])}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} ({', '.join(words(a) for a in args)})"
    if origin in (tuple, list, set, frozenset):
        return f"a list, each {words(args[0])}"
    if dataclasses.is_dataclass(kind):
        return f"keys ({', '.join(settings_of(kind))})"
    return getattr(kind, "__name__", str(kind))
