"""TensorStore: records under content keys, filled by several processes and read memory-mapped by many."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from mmalign.cache.header import check_same, fields_of, make_header, read_header, write_header
from mmalign.cache.part import NUMPY_DTYPES, Fields, Part, lock, told_by_folder
from mmalign.errors import UserError

_ROW_BITS = 40
_ROW_MASK = (1 << _ROW_BITS) - 1


class TensorStore:
    """A growing table of records: one content key, and one tensor of fixed shape per field.

    `create`, `open` and `open_or_create` make one. Several processes fill a store together when each opens it with its
    own `part` (the process index) and slices the keys *before* it asks what is missing, because the others add meanwhile:

        todo = store.missing(keys[rank::world_size])

    A store can be pickled and forked (DataLoader workers): the copy reads, and maps the files when first asked. One
    object serves one thread. Memory: about 250 bytes a record and process for the keys; records stay in the page cache.
    """

    def __init__(self, folder: Path, header: dict[str, Any], part: int = 0) -> None:
        """Use `create`, `open` or `open_or_create` instead: they write or check the header."""
        self.folder = folder
        self.fields = fields_of(header)
        self._header = header
        self._part = part
        self._parts: dict[int, Part] = {}
        self._locations: dict[str, int] = {}  # key -> part << _ROW_BITS | row
        self._lock: IO[str] | None = None
        self._lock_pid = 0

    @classmethod
    def create(cls, folder: Path, *, fields: Fields, fingerprint: Mapping[str, Any], part: int = 0) -> "TensorStore":
        """Start an empty store.

        Args:
            folder: made if absent.
            fields: name -> (shape of one record, dtype).
            fingerprint: JSON values, nested dicts allowed: what the content depends on beyond the keys (weights, dtype,
                preprocessing). `open` compares it.
            part: which part this process writes: the process index.

        Raises:
            UserError: `folder` holds a store or other files, or cannot be written.
        """
        header = make_header(fields, fingerprint)
        if not write_header(folder, header):
            raise UserError(f"{folder}: got a folder with a cache, want a new one. Delete it or name another.")
        return cls(folder, header, part)

    @classmethod
    def open(
        cls, folder: Path, *, fingerprint: Mapping[str, Any], fields: Fields | None = None, part: int = 0
    ) -> "TensorStore":
        """Open an existing store; `fields` None takes those that it has.

        Raises:
            UserError: there is none, its header is broken, or fingerprint or fields differ; every difference is named.
        """
        header = read_header(folder)
        described = {"fields": header["fields"]} if fields is None else {}
        check_same(folder, header, make_header(fields or {}, fingerprint) | described)
        return cls(folder, header, part)

    @classmethod
    def open_or_create(cls, folder: Path, *, fields: Fields, fingerprint: Mapping[str, Any], part: int = 0) -> "TensorStore":
        """Open the store, or create it if there is none; processes that start together all get the same one.

        Raises:
            UserError: as `open`, or the fields differ.
        """
        expected = make_header(fields, fingerprint)
        write_header(folder, expected)
        header = read_header(folder)
        check_same(folder, header, expected)
        return cls(folder, header, part)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the address, not the content: a copy in another process maps the files anew and holds no lock."""
        return TensorStore, (self.folder, self._header, self._part)

    def __len__(self) -> int:
        """Return the number of distinct keys on disk now."""
        self._refresh()
        return len(self._locations)

    def __contains__(self, key: str) -> bool:
        """Tell whether `key` is on disk now."""
        return not self.missing([key])

    @property
    def num_bytes(self) -> int:
        """Bytes of all records on disk now."""
        self._refresh()
        return sum(part.num_records * sum(part.record_bytes.values()) for part in self._parts.values())

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the distinct `keys` that no part holds now, in their order."""
        self._refresh()
        return [key for key in dict.fromkeys(keys) if key not in self._locations]

    def get(self, keys: Sequence[str]) -> dict[str, Shaped[Tensor, "n ..."]]:
        """Return every field of the records of `keys`, in their order, in memory of their own: one gather per field.

        If two parts hold a key, a freshly opened store takes the lower part.

        Raises:
            UserError: a key is absent.
        """
        try:
            locations = [self._locations[key] for key in keys]
        except KeyError:
            self._check_present(keys)
            locations = [self._locations[key] for key in keys]
        rows = np.array([location & _ROW_MASK for location in locations], np.int64)
        parts = [location >> _ROW_BITS for location in locations]
        return {name: self._gather(name, parts, rows) for name in self.fields}

    def add(self, keys: Sequence[str], tensors: Mapping[str, Shaped[Tensor, "n ..."]]) -> int:
        """Append the records of new keys and return how many there were; a key that is there already is skipped.

        When it returns, the records are on disk. Each call waits for the disk: give it whole batches.

        Raises:
            ValueError: names, shapes or dtypes are not those of the fields, or a key is empty or has a line break.
            UserError: another process writes this part, or the disc is full; earlier records stay.
        """
        self._check_records(keys, tensors)
        self.claim()
        self._refresh()
        new: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key not in self._locations:
                new.setdefault(key, row)
        if new:
            rows = torch.tensor(list(new.values()))
            arrays = {name: _to_numpy(tensors[name].detach().cpu()[rows]) for name in self.fields}
            self._append(list(new), arrays)
        return len(new)

    def claim(self) -> None:
        """Become the writer of this part until `close`; `add` does it by itself, a long job does it before it starts.

        The lock is the kernel's (flock): it goes with its process, however that ends.

        Raises:
            UserError: another process holds it; its number and host are told.
        """
        if self._lock is not None and self._lock_pid == os.getpid():
            return
        self.close()  # in a forked child: drop the parent's handle, which leaves the parent's lock alone
        folder = self.folder / f"part-{self._part:05d}"
        with told_by_folder(folder):
            folder.mkdir(exist_ok=True)
            self._lock = lock(folder)
            self._lock_pid = os.getpid()
            self._refresh()
            self._parts[self._part].drop_tail()

    def close(self) -> None:
        """Stop writing; reading goes on."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "TensorStore":
        """Return the store; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    def _refresh(self) -> None:
        """Take in what any writer has finished since the last look."""
        for folder in sorted(self.folder.glob("part-" + "[0-9]" * 5)):
            number = int(folder.name.removeprefix("part-"))
            part = self._parts.setdefault(number, Part(folder, self.fields))
            first = number << _ROW_BITS | part.num_records
            for location, key in enumerate(part.read_new_keys(), first):
                self._locations.setdefault(key, location)

    def _append(self, keys: list[str], arrays: dict[str, npt.NDArray[Any]]) -> None:
        own = self._parts[self._part]
        with told_by_folder(own.folder):
            try:
                own.append(keys, arrays)
            except OSError:
                self._refresh()
                own.drop_tail()
                raise
        self._refresh()

    def _gather(self, name: str, parts: list[int], rows: npt.NDArray[np.int64]) -> Tensor:
        shape, dtype = self.fields[name]
        numbers = set(parts)
        if len(numbers) == 1:
            taken = self._parts[parts[0]].array(name).take(rows, axis=0)
        else:
            taken = np.empty((len(rows), *shape), NUMPY_DTYPES[dtype])
            for number in numbers:
                here = np.array(parts) == number
                taken[here] = self._parts[number].array(name)[rows[here]]
        return torch.from_numpy(taken).view(dtype)

    def _check_present(self, keys: Sequence[str]) -> None:
        if absent := self.missing(keys):
            raise UserError(
                f"{self.folder}: got no record of {absent[0]!r} ({len(absent)} of {len(set(keys))} keys are absent), "
                "want all. Run `mmalign prepare` with the same config and data again."
            )

    def _check_records(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        if tensors.keys() != self.fields.keys():
            raise ValueError(f"{self.folder}: got fields {sorted(tensors)}, want {sorted(self.fields)}.")
        for name, (shape, dtype) in self.fields.items():
            got, want = (tuple(tensors[name].shape), tensors[name].dtype), ((len(keys), *shape), dtype)
            if got != want:
                raise ValueError(f"{self.folder}: {name}: got {got}, want {want}.")
        for key in keys:
            if not key or "\n" in key:
                raise ValueError(f"{self.folder}: got key {key!r}, want text without line breaks.")


def _to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
