"""What `--help` tells: the keys of a config class, and the names of a table with their settings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from typing import Any

from mmalign.config.schema import Choice, Setting, Table, import_address, members, nearest, settings_of, show, table_of, words
from mmalign.config.writing import resolved
from mmalign.errors import UserError

WIDTH = 128
Row = tuple[str, str, str]


def help_text(cls: type[Any], main: Callable[[Any], Any], prog: str, keys: list[str]) -> str:
    """Usage and all keys; or, for each of `keys`, the names that it takes with their settings.

    Raises:
        UserError: one of `keys` is no key of the config.
    """
    if keys:
        return "\n\n".join(_describe_key(cls, key) for key in keys)
    positional = next((name.upper() for name, s in settings_of(cls).items() if s.positional), "")
    usage = " ".join(filter(None, ("usage:", prog, "[CONFIG.yaml]", positional, "[key=value ...] [--key value ...]")))
    choices = [key for key, setting in _flat(cls, "") if _table_in(setting.annotation) is not None]
    more = f"{prog} --help KEY tells the names and settings of {', '.join(choices)}." if choices else ""
    return "\n\n".join(filter(None, (usage, _about(main) or _about(cls), describe(cls), more)))


def _about(thing: Any) -> str:
    """The docstring down to its sections."""
    if inspect.isclass(thing) and (thing.__doc__ or "").startswith(f"{thing.__name__}("):
        return ""  # written by dataclass, not by anybody
    return re.split(r"^(?:Args|Raises|Source|Returns):", inspect.getdoc(thing) or "", maxsplit=1, flags=re.M)[0].strip()


def describe(cls: type[Any]) -> str:
    """A table of the keys of a config class: name, default, type in words and the line of its docstring's Args.

    Lazy tables that are not loaded stay unloaded, so that help is quick.
    """
    return _table([(key, _default(setting), _wants(setting)) for key, setting in _flat(cls, "")])


def describe_names(table: Table) -> str:
    """The names of a table, each with the first line of its docstring and its settings."""
    parts = []
    for name, entry in table.entries().items():
        target = import_address(entry) if isinstance(entry, str) else entry
        settings = _with_help(table.settings_of(target), target)
        rows = [(f"  {key}", _default(setting), _wants(setting)) for key, setting in settings.items()]
        title = f"{name}: {_about(target).partition(chr(10))[0]}".rstrip(": ")
        parts.append(f"{title}\n{_table(rows, head=False)}" if rows else title)
    extra = [
        (f"  {key}", "required" if d is dataclasses.MISSING else show(d), words(kind)) for key, (kind, d) in table.extra.items()
    ]
    return "\n".join([*parts, *([f"and each of them:\n{_table(extra, head=False)}"] if extra else [])])


def _describe_key(cls: type[Any], key: str) -> str:
    settings = dict(_flat(cls, ""))
    if key not in settings:
        raise UserError(f"--help {key}: unknown key.{nearest(key, settings) or ' --help alone lists the keys.'}")
    table = _table_in(settings[key].annotation)
    if table is None:
        return _table([(key, _default(settings[key]), _wants(settings[key]))])
    return f"{key} is one of:\n\n{describe_names(table)}"


def _table(rows: list[Row], *, head: bool = True) -> str:
    rows = [("key", "default", "wants"), *rows] if head else rows
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = []
    for key, default, wants in rows:
        start = f"{key.ljust(first)}  {default.ljust(second)}  "
        indent = " " * min(len(start), WIDTH // 2)
        lines.append(textwrap.fill(wants, WIDTH, initial_indent=start, subsequent_indent=indent, break_long_words=False))
    return "\n".join(lines)


def _flat(cls: Any, prefix: str) -> Iterator[tuple[str, Setting]]:
    for name, setting in _with_help(settings_of(cls), cls).items():
        inner = next((m for m in members(setting.annotation) if dataclasses.is_dataclass(m)), None)
        if inner is not None and type(None) not in members(setting.annotation):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", setting


def _with_help(settings: dict[str, Setting], target: Any) -> dict[str, Setting]:
    told = _told_in_docstring(target)
    return {k: s if s.help else dataclasses.replace(s, help=told.get(k, "")) for k, s in settings.items()}


def _told_in_docstring(target: Any) -> dict[str, str]:
    """Name -> text from the lines `name, name2: text` below `Args:`."""
    told: dict[str, str] = {}
    names: list[str] = []
    for line in (inspect.getdoc(target) or "").partition("Args:\n")[2].splitlines():
        start = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            told |= dict.fromkeys(names, start[2])
        elif line.startswith(" " * 8):
            told |= {name: f"{told[name]} {line.strip()}" for name in names}
        else:
            break
    return told


def _wants(setting: Setting) -> str:
    table = _table_in(setting.annotation)
    kind = words(setting.annotation) if table is None else _names(table)
    return f"{kind}; {setting.help}" if setting.help else kind


def _table_in(annotation: Any) -> Table | None:
    for member in members(annotation):
        inside = (member, *(a for a in typing.get_args(member) if typing.get_origin(member) in (tuple, list)))
        found = next((t for t in map(table_of, inside) if t is not None), None)
        if found is not None:
            return found
    return None


def _names(table: Table) -> str:
    if isinstance(table.source, str) and table.source.partition(":")[0] not in sys.modules:
        return f"a name of {table.source}"
    if callable(table.source):
        return "a name with settings"
    return f"one of {', '.join(table.entries())}"


def _default(setting: Setting) -> str:
    if setting.default is None:
        return "required"
    value = setting.default()
    if isinstance(value, Choice):
        return value.name
    if isinstance(value, tuple) and value and all(isinstance(item, Choice) for item in value):
        return ", ".join(item.name for item in value)
    plain = resolved(value)
    return plain if isinstance(plain, str) and plain else show(plain)
