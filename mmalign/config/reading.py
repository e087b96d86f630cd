"""YAML text and `a.b=c` overrides to one plain tree, remembering what the command line set.

The dialect is YAML 1.2's: `1e-5` is a number, `no` and `on` are text, only `true` and `false` are truth values, a date
is text. A key given twice is a fault. There are no includes and no interpolation: a config is read alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmalign.errors import UserError

KeyPath = tuple[str, ...]

_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)


class Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's scalars."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """An integer; a leading zero does not make it octal."""
        text = str(self.construct_scalar(node))
        return int(text, 16) if text.startswith("0x") else int(text)


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads back as the same values."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def ignore_aliases(self, data: Any) -> bool:
        """No anchors: the same list twice is written twice."""
        return True


for _tag, _pattern, _first in _RESOLVERS:
    for _dialect in (Loader, Dumper):
        _dialect.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first])
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_decimal)


@dataclass
class Tree:
    """Plain values, where they come from, and the faults met on the way."""

    values: dict[str, Any]
    source: str
    overridden: set[KeyPath] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """The file, or `command line` for what an override has set."""
        from_override = any(path[: len(known)] == known for known in self.overridden)
        return "command line" if from_override else self.source


def dump(values: Any) -> str:
    """Plain values as YAML text that `read_tree` reads back unchanged."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse(text: str) -> tuple[Any, list[tuple[KeyPath, str]]]:
    """YAML text to plain values and the faults (path, message) of keys given twice.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        faults: list[tuple[KeyPath, str]] = []
        _find_repeats(node, (), (), faults)
        return (None if faults else loader.construct_document(node)), faults
    finally:
        loader.dispose()


def _find_repeats(node: Any, path: KeyPath, above: tuple[int, ...], faults: list[tuple[KeyPath, str]]) -> None:
    if id(node) in above:
        faults.append((path, f"line {node.start_mark.line + 1} refers to itself. Write the value out."))
        return
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _find_repeats(item, (*path, str(index)), above, faults)
    if isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for key, item in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in first_lines and name != "<<":
                faults.append(((*path, name), f"given twice, in lines {first_lines[name]} and {line}. Keep one."))
            first_lines.setdefault(name, line)
            _find_repeats(item, (*path, name), above, faults)


def read_tree(path: str | Path | None, overrides: Sequence[str] = ()) -> Tree:
    """The values of the file at `path` (none: no values) with the overrides `a.b=c` laid over them.

    Raises:
        UserError: the file cannot be read, is no YAML, or holds something else than keys.
    """
    tree = Tree(values={}, source="command line" if path is None else str(path))
    if path is not None:
        values, repeats = _read_file(Path(path))
        tree.values = values
        tree.faults += [f"{tree.source}: {'.'.join(where)}: {fault}" for where, fault in repeats]
        if repeats:
            return tree
    for override in overrides:
        _apply(tree, override)
    return tree


def _read_file(path: Path) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    try:
        values, repeats = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of a YAML config, or a.b=c settings alone.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML config.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: got bytes that are not UTF-8 ({error.reason}), want YAML text.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_line(error)}: not YAML: {_problem(error)}. Mend the syntax.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: got {type(values).__name__}, want keys with values (`key: value` lines).")
    return values, repeats


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}"


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _apply(tree: Tree, override: str) -> None:
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        tree.faults.append(f"command line: got {override!r}, want key=value, as in loss.beta=2000.")
        return
    try:
        value, repeats = parse(text)
    except yaml.YAMLError as error:
        tree.faults.append(
            f"command line: {key}: got {text!r}, which is not YAML ({_problem(error)}). Put it in quotes: {key}='\"...\"'."
        )
        return
    tree.faults += [f"command line: {'.'.join((key, *where))}: {fault}" for where, fault in repeats]
    if repeats:
        return
    fault = _set(tree, path, value)
    if fault:
        tree.faults.append(f"command line: {key}: {fault}")


def _set(tree: Tree, path: KeyPath, value: Any) -> str | None:
    """Sets `value` at `path`, making mappings on the way; returns a fault or nothing."""
    node: Any = tree.values
    true_path: KeyPath = ()
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not part.isdecimal() and len(node) == 1 and isinstance(node[0], (dict, str)):
                node[0] = _mapping(node[0])  # one item: its number may be left out
                node, true_path = node[0], (*true_path, "0")
            elif not part.isdecimal() or int(part) >= len(node):
                return f"{'.'.join(path[:depth])} is a list of {len(node)}. Say which one by its number, from 0."
        elif part == "0" and "0" not in node and not last and true_path:
            continue  # a single mapping stands for a list of one
        slot: Any = int(part) if isinstance(node, list) else part
        true_path = (*true_path, part)
        if last:
            node[slot] = value
            tree.overridden.add(true_path)
            return None
        child = node[slot] if isinstance(node, list) else node.get(slot)
        if child is True:  # a bare switch, then settings of what it switches on
            child = {}
        if child is None:
            tree.overridden.add(true_path)
        elif not isinstance(child, (dict, list, str)):
            return f"{'.'.join(path[: depth + 1])} is {child!r}, which has no keys."
        node[slot] = _mapping(child)
        node = node[slot]
    return None


def _mapping(value: Any) -> Any:
    """`loss: dpo` is short for `loss: {name: dpo}`."""
    if value is None:
        return {}
    return {"name": value} if isinstance(value, str) else value
