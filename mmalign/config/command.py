"""Reading a config from file and command line, and the command line that every verb wears."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mmalign.config.description import help_text
from mmalign.config.reading import read_tree
from mmalign.config.schema import FAULTY, Faults, Setting, check_dataclass, members, settings_of
from mmalign.errors import UserError

Config = TypeVar("Config")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def read_config(cls: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """An instance of the config class from a YAML file (None: no file) and `a.b=c` overrides, which win.

    `loss.0.beta=3` reaches into a list; `loss.beta=3` does where the list has one item or is written as a single mapping.

    Raises:
        UserError: every fault, one a line: `configs/x.yaml: loss.betta: unknown key. Did you mean beta?`
    """
    loose = [f.name for f in dataclasses.fields(cls) if f.init and not f.kw_only]  # type: ignore[arg-type]
    if loose:
        raise TypeError(
            f"{cls.__name__}: fields {', '.join(loose)} must be keyword-only: @dataclass(frozen=True, kw_only=True)"
        )
    tree = read_tree(path, overrides)
    if tree.faults:
        raise UserError("\n".join(tree.faults))
    faults: Faults = []
    value = check_dataclass(cls, tree.values, (), faults)
    if value is FAULTY:
        raise UserError("\n".join(": ".join(filter(None, (tree.where(p), ".".join(p), fault))) for p, fault in faults))
    return typing.cast(Config, value)


def command_line(cls: type[Any], main: Callable[[Any], Any], argv: Sequence[str] | None = None, *, prog: str = "") -> int:
    """Runs `main(config)` with the config that the arguments name, and returns the exit code.

    Arguments: `CONFIG` or `--config CONFIG`; `a.b=c`, `--a.b c`, `--a-b=c`; a bare `--flag` is true; a positional
    argument that is no YAML file goes to the field marked `metadata={"positional": True}`, several to a tuple. What main
    returns is printed, None is not; its attribute `exit_code`, where it has one, is the exit code. Faults of the user end
    in 2, an interrupt in 130.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    asks = "--help" in argv or "-h" in argv
    _set_up_logging()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that an address may name a module of the working directory
    try:
        if asks:
            tell(help_text(cls, main, prog or Path(sys.argv[0]).name, [word for word in argv if not word.startswith("-")]))
            return 0
        path, overrides = parse_arguments(cls, argv)
        result = main(read_config(cls, path, overrides))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if result is not None:
        tell(result)
    return int(getattr(result, "exit_code", 0))


def tell(text: Any) -> None:
    """Print to a reader who may have seen enough: `mmalign --help | head -1` ends quietly."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered is flushed at exit


def parse_arguments(cls: type[Any], argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config path, or None, and the overrides as `a.b=c`.

    Raises:
        UserError: two configs, a flag that lacks its value, a positional argument that nothing takes.
    """
    path: str | None = None
    overrides: list[str] = []
    listed: dict[str, list[str]] = {}  # positional arguments of a field that takes several
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, value = _flag(cls, word, rest)
        elif _OVERRIDE.match(word):
            overrides.append(word)
            continue
        else:
            key, value = _positional(cls, word), word
            if key != "config" and any(typing.get_origin(m) is tuple for m in members(settings_of(cls)[key].annotation)):
                listed.setdefault(key, []).append(value)
                continue
        if key != "config":
            overrides.append(f"{key}={value}")
        elif path is None:
            path = value
        else:
            raise UserError(f"command line: got two configs, {path} and {value}, want one. Settings are given as a.b=c.")
    return path, overrides + [f"{key}={json.dumps(values)}" for key, values in listed.items()]


def _flag(cls: type[Any], word: str, rest: list[str]) -> tuple[str, str]:
    key, equals, value = word[2:].partition("=")
    key = key.replace("-", "_")
    if equals:
        return key, value
    setting = None if key == "config" else _setting_at(cls, key)
    kinds = set() if setting is None else {m for m in members(setting.annotation) if m is not type(None)}
    if kinds == {bool}:
        return key, rest.pop(0) if rest and rest[0] in ("true", "false") else "true"
    if rest and not rest[0].startswith("--"):
        return key, rest.pop(0)
    if bool in kinds or (setting is None and key != "config"):  # an unknown key is told with all other faults
        return key, "true"
    raise UserError(f"command line: {key}: no value given. Write {word} VALUE.")


def _positional(cls: type[Any], word: str) -> str:
    if word.endswith((".yaml", ".yml")):
        return "config"
    taker = next((name for name, setting in settings_of(cls).items() if setting.positional), None)
    if taker is None and Path(word).exists():
        return "config"
    if taker is None:
        raise UserError(f"command line: got {word!r}, want CONFIG.yaml, key=value or --key value. See --help.")
    return taker


def _setting_at(cls: Any, key: str) -> Setting | None:
    first, *more = key.split(".")
    setting = settings_of(cls).get(first)
    if setting is None or not more:
        return setting
    inner = next((m for m in members(setting.annotation) if dataclasses.is_dataclass(m)), None)
    return None if inner is None else _setting_at(inner, ".".join(more))


class _Calm(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _set_up_logging() -> None:
    if not logging.root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Calm("%(message)s"))
        logging.root.addHandler(handler)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING  # one process of several talks
    for name in ("mmalign", "__main__"):
        logging.getLogger(name).setLevel(level)
