"""Published checkpoint files: read from a path or the hub, and loaded only if every key and shape fits."""

import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmalign.errors import UserError

WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
WRAPPERS = ("state_dict", "model")  # a training script's name for the weights inside its file
PARALLEL = "module."  # before every key that DataParallel saved
SHOWN_KEYS = 20
# On a file that is no pickle, torch's reader stumbles in any of these ways.
FAULTS_OF_UNPICKLING = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    pickle.UnpicklingError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_checkpoint(
    source: str | Path, *, file: str | None = None, revision: str | None = None, place: str = "checkpoint"
) -> dict[str, Tensor]:
    """The weights of a checkpoint file, on the CPU. Pickled code is never run (`weights_only`).

    Weights that a training script wrapped as `{"state_dict": ...}` or `{"model": ...}` are unwrapped, and DataParallel's
    `module.` before every key is taken off.

    Args:
        source: a .pt, .pth, .bin or .safetensors file; a folder; or a hub id such as `xswu/HPSv2`.
        file: which file of the folder or hub id; not read for a file.
        revision: hub branch, tag or commit.
        place: the setting that a message names: `hps_v2.checkpoint`.

    Raises:
        UserError: no such file, not to be had from the hub, or not a file of plain tensors.
    """
    path = checkpoint_path(source, file=file, revision=revision, place=place)
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise UserError(
            f"{place}: got {str(path)!r}, want a file that ends in {', '.join(WEIGHTS_SUFFIXES)}. Name the weights."
        )
    state = _read_safetensors(path, place) if path.suffix == ".safetensors" else _read_pickled(path, place)
    if state and all(key.startswith(PARALLEL) for key in state):
        state = {key.removeprefix(PARALLEL): value for key, value in state.items()}
    return state


def checkpoint_path(
    source: str | Path, *, file: str | None = None, revision: str | None = None, place: str = "checkpoint"
) -> Path:
    """Where the file of a checkpoint lies, fetched from the hub if it is not local. Arguments as `read_checkpoint`.

    Raises:
        UserError: no such file, or not to be had from the hub.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    local = Path(source).expanduser()
    if local.is_file():
        return local
    if (local.is_dir() or _names_hub(str(source))) and file is None:
        raise UserError(f"{place}: got {str(source)!r}, want the name of a file in it as well. Set its file, or name the file.")
    if local.is_dir() and file is not None:
        if not (local / file).is_file():
            raise UserError(f"{place}: got the folder {str(source)!r}, want {file} in it. Put it there, or name another file.")
        return local / file
    if file is None or not _names_hub(str(source)):
        raise UserError(f"{place}: got {str(source)!r}, want a file, a folder or a hub id. Nothing lies there; check the path.")
    try:
        return Path(hf_hub_download(str(source), file, revision=revision))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{place}: got {str(source)!r}, which is no local path, want a hub id that holds {file} ({first_line(error)}). "
            "Check the name and the connection, or download the file and name its path."
        ) from error


def load_checked(
    module: nn.Module, state: Mapping[str, Tensor], *, place: str, rename: Callable[[str], str | None] | None = None
) -> None:
    """Load weights into a module, keys and shapes checked both ways; nothing is loaded if anything does not fit.

    Args:
        module: gets the weights, in its own dtype and on its own device.
        state: the checkpoint's weights.
        place: the setting that a message names.
        rename: checkpoint's key -> module's key, or None to leave the key out (a buffer that is not a weight).

    Raises:
        UserError: keys missing, unexpected, given twice or of another shape, all listed in one message.
    """
    named: dict[str, Tensor] = {}
    twice: list[str] = []
    for key, value in state.items():
        target = key if rename is None else rename(key)
        if target is None:
            continue
        if target in named:
            twice.append(target)
        named[target] = value
    wanted = module.state_dict()
    check_keys(
        place,
        missing=wanted.keys() - named.keys(),
        unexpected=named.keys() - wanted.keys(),
        misshapen={
            key: (tuple(named[key].shape), tuple(wanted[key].shape))
            for key in wanted.keys() & named.keys()
            if named[key].shape != wanted[key].shape
        },
        twice=twice,
    )
    module.load_state_dict(named)


def check_keys(
    place: str,
    *,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    twice: Collection[str] = (),
) -> None:
    """Refuse a checkpoint that does not fit its model.

    Args:
        place: the setting that the message names.
        missing, unexpected: keys that only the model has, and that only the checkpoint has.
        misshapen: key -> the checkpoint's shape and the model's.
        twice: keys that two entries of the checkpoint were mapped to.

    Raises:
        UserError: any of them is not empty; each kind is counted and its first SHOWN_KEYS keys listed.
    """
    shapes = [f"{key} {list(got)} (want {list(want)})" for key, (got, want) in sorted(misshapen.items())]
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": shapes, "twice": sorted(twice)}
    found = [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
    if found:
        raise UserError(
            f"{place}: got a checkpoint with keys {'; '.join(found)}, want exactly the model's. "
            "Name the checkpoint of this model, or the model of this checkpoint."
        )


def first_line(error: Exception) -> str:
    """What an exception says, without its following lines."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(keys[:SHOWN_KEYS]) + more


def _names_hub(source: str) -> bool:
    """`owner/name`: two parts, neither a path's."""
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not source.startswith((".", "~")) and not source.endswith(WEIGHTS_SUFFIXES)


def _read_safetensors(path: Path, place: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(place, path) from error
    return state


def _read_pickled(path: Path, place: str) -> dict[str, Tensor]:
    try:
        # Zipped files can be mapped, so that half a billion weights are not in memory twice.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FAULTS_OF_UNPICKLING as error:
        raise _unreadable(place, path) from error
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"{place}: got {str(path)!r}, want a file of named tensors, a state dict. Save model.state_dict() there."
        )
    return dict(loaded)


def _unreadable(place: str, path: Path) -> UserError:
    return UserError(
        f"{place}: got {str(path)!r}, which is damaged or holds more than tensors, want weights that can be read without "
        "running code. Download the file again, or save its state dict as safetensors."
    )
