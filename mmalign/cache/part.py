"""The files that one writer of a store fills: its list of keys, a flat file of records per field, its lock."""

import fcntl
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mmalign.errors import UserError

logger = logging.getLogger(__name__)

Fields: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]

# numpy has no bfloat16: its bits travel as int16.
NUMPY_DTYPES: dict[torch.dtype, npt.DTypeLike] = {
    torch.bfloat16: np.int16,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


class Part:
    """The records of one writer, as far as their keys are on disk."""

    def __init__(self, folder: Path, fields: Fields) -> None:
        """Read nothing yet; `folder` may be absent."""
        self.folder = folder
        self.num_records = 0
        self.record_bytes = {
            name: math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize for name, (shape, dtype) in fields.items()
        }
        self._fields = fields
        self._keys = folder / "keys.txt"
        self._keys_bytes = 0  # of keys.txt, read so far
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._warned = False

    def read_new_keys(self) -> list[str]:
        """Return the keys of the records finished since the last call, in record order."""
        if _size(self._keys) == self._keys_bytes:
            return []
        with self._keys.open("rb") as file:
            file.seek(self._keys_bytes)
            lines = file.read().split(b"\n")[:-1]  # what follows the last line break is unfinished
        num_whole = min(_size(self._data(name)) // size for name, size in self.record_bytes.items()) - self.num_records
        if len(lines) > num_whole:
            self._warn(len(lines) - num_whole)
            lines = lines[:num_whole]
        self.num_records += len(lines)
        self._keys_bytes += sum(len(line) + 1 for line in lines)
        return [line.decode() for line in lines]

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return all records of a field, mapped from disk."""
        array = self._arrays.get(name)
        if array is None or len(array) < self.num_records:
            shape, dtype = self._fields[name]
            mapped = np.memmap(self._data(name), NUMPY_DTYPES[dtype], mode="r", shape=(self.num_records, *shape))
            array = self._arrays[name] = np.asarray(mapped)
        return array

    def append(self, keys: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write the records, wait until they are on disk, then write their keys; `read_new_keys` takes them in."""
        for name, array in arrays.items():
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            write_at(self._data(name), self.num_records * self.record_bytes[name], data)
        write_at(self._keys, self._keys_bytes, memoryview("".join(f"{key}\n" for key in keys).encode()))

    def drop_tail(self) -> None:
        """Cut off what a killed or failed writer left behind the last whole record."""
        lengths = {self._data(name): self.num_records * size for name, size in self.record_bytes.items()}
        for path, length in {**lengths, self._keys: self._keys_bytes}.items():
            write_at(path, 0, memoryview(b""))
            os.truncate(path, length)
        sync_folder(self.folder)

    def _data(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _warn(self, num_lost: int) -> None:
        if not self._warned:
            logger.warning(
                "%s: %d keys have no data, as after a copy cut short; they count as missing. "
                "Copy the folder again or run `mmalign prepare`.",
                self.folder,
                num_lost,
            )
        self._warned = True


def lock(folder: Path) -> IO[str]:
    """Return the open lock file of a part; closing it, or the end of the process, gives the lock back.

    Raises:
        UserError: another process holds it.
    """
    file = (folder / "writer.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(
            f"{folder}: got a second writer while {holder or 'another process'} is writing, want one. "
            "Wait until it ends, stop it, or prepare into another folder."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


def write_at(path: Path, offset: int, data: memoryview) -> None:
    """Write at an offset, making the file if need be, and wait until the bytes are on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            offset, data = offset + written, data[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's list of names is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def told_by_folder(folder: Path) -> Iterator[None]:
    """Turn a fault of the disk into one UserError with the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: got '{error.strerror}' while writing the cache. Check free space and permissions, or name "
            "another folder, and run again: finished records are kept."
        ) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
