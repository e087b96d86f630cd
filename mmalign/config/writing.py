"""The resolved config as plain values, written beside every result together with the environment it ran in."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import mmalign
from mmalign.config.reading import dump
from mmalign.config.schema import Choice, show
from mmalign.errors import UserError

_PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "open_clip_torch", "pydantic", "numpy", "pillow",
    "safetensors",
)  # fmt: skip


def resolved(instance: Any) -> Any:
    """Plain, YAML-able values with every default filled in; `read_config` reads them back to an equal instance."""
    if isinstance(instance, Choice):
        return {"name": instance.name, **resolved(instance.settings), **resolved(instance.extra)}
    if dataclasses.is_dataclass(instance) and not isinstance(instance, type):
        return {f.name: resolved(getattr(instance, f.name)) for f in dataclasses.fields(instance) if f.init}
    if isinstance(instance, Mapping):
        return {str(key): resolved(value) for key, value in instance.items()}
    if isinstance(instance, (list, tuple)):
        return [resolved(item) for item in instance]
    if isinstance(instance, (set, frozenset)):
        return sorted(resolved(item) for item in instance)
    if isinstance(instance, Enum):
        return instance.value
    return os.fspath(instance) if isinstance(instance, os.PathLike) else instance


def check_folder(folder: Path, *, key: str = "output") -> None:
    """Refuses a folder that cannot be made or written, before any work is done for it. Nothing is made.

    Raises:
        UserError: it is a file or lies below one, or may not be written; the message begins with `key`.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.exists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{key}: got {folder}, want a folder, and {place} is a file. Choose another one.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{key}: got {folder}, want a folder that can be written, and {place} cannot. Choose another one.")


def write_resolved(
    instance: Any, folder: str | Path, *, config: str = "config.yaml", versions: str = "environment.json"
) -> None:
    """Writes config.yaml and environment.json, or under the names given, into `folder`; each complete or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / config, dump(resolved(instance)))
    _replace(folder / versions, json.dumps(environment(), indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def environment() -> dict[str, Any]:
    """Versions of Python and the packages that make numbers, and the git state when mmalign runs from a checkout."""
    return {
        "mmalign": mmalign.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": git_state(Path(mmalign.__file__).parents[1]),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it, or None where `root` is no checkout or there is no git."""
    if not (root / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(status)}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line for each key in which two resolved configs differ: `loss.0.beta: was 5000, is now 2000`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(str(k), old.get(k, _ABSENT), new.get(k, _ABSENT)) for k in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), o, n) for i, (o, n) in enumerate(zip(old, new, strict=True))]
    elif old == new or (old != old and new != new):  # nan is the same setting as nan
        return []
    else:
        return [f"{path}: was {_show(old)}, is now {_show(new)}"]
    return [line for key, o, n in pairs for line in differences(o, n, f"{path}.{key}" if path else key)]


_ABSENT = object()


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else show(value)
