import logging
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmalign.cache import TensorStore
from mmalign.errors import UserError

FIELDS = {"mean": ((2, 3), torch.float16), "count": ((), torch.int64)}
FINGERPRINT = {"encoder": "abc", "size": [64, 64], "crop": {"flip": True}}


def records(keys: list[str]) -> dict[str, Tensor]:
    """Return records that can be told from their key: key "7" holds 7, 8, 9 ..."""
    count = torch.tensor([int(key) for key in keys], dtype=torch.int64)
    return {"mean": (count[:, None, None] + torch.arange(6).view(2, 3)).half(), "count": count}


def assert_right(store: TensorStore, keys: list[str]) -> None:
    want = records(keys)
    got = store.get(keys)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert torch.equal(got[name], want[name])


def filled(folder: Path, keys: list[str], part: int = 0) -> TensorStore:
    with TensorStore.open_or_create(folder, fields=FIELDS, fingerprint=FINGERPRINT, part=part) as store:
        for key in keys:
            store.add([key], records([key]))
    return TensorStore.open(folder, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("shape", [(), (1,), (4, 3, 2)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int64", "int32", "uint8", "bool"])
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    kind = getattr(torch, dtype)
    num_bytes = torch.empty((5, *shape), dtype=kind).nbytes
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(kind).view(5, *shape)
    with TensorStore.create(tmp_path / "store", fields={"x": (shape, kind)}, fingerprint={}) as store:
        store.add(list("abcde"), {"x": tensor})
    got = TensorStore.open(tmp_path / "store", fingerprint={}).get(list("abcde"))["x"]
    assert got.dtype == kind and got.shape == tensor.shape
    assert torch.equal(got.reshape(-1).view(torch.uint8), raw)


def test_special_floats_of_bfloat16_survive(tmp_path: Path) -> None:
    tensor = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-40]], dtype=torch.bfloat16)
    with TensorStore.create(tmp_path / "store", fields={"x": ((4,), torch.bfloat16)}, fingerprint={}) as store:
        store.add(["a"], {"x": tensor})
        assert torch.equal(store.get(["a"])["x"].view(torch.int16), tensor.view(torch.int16))


def test_tensors_that_need_gradients_or_are_not_contiguous_are_stored_as_they_read(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(2, 3, 4).transpose(1, 2).requires_grad_()
    with TensorStore.create(tmp_path / "store", fields={"x": ((4, 3), torch.float32)}, fingerprint={}) as store:
        store.add(["a", "b"], {"x": tensor})
        assert torch.equal(store.get(["a", "b"])["x"], tensor.detach())


def test_records_come_in_the_order_asked_and_as_often(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", ["1", "2", "3"])
    assert_right(store, ["3", "1", "1", "2"])
    assert store.get([])["mean"].shape == (0, 2, 3)


def test_what_get_returns_may_be_changed_without_changing_the_store(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", ["1", "2"])
    store.get(["1"])["mean"].zero_()
    assert_right(store, ["1", "2"])


def test_a_key_that_is_there_already_keeps_its_first_record(tmp_path: Path) -> None:
    with TensorStore.create(tmp_path / "store", fields=FIELDS, fingerprint={}) as store:
        assert store.add(["1", "1", "2"], {**records(["1", "9", "2"])}) == 2
        assert store.add(["2", "1"], records(["7", "7"])) == 0
        assert store.add(["2", "3"], records(["7", "3"])) == 1
        assert len(store) == 3
        assert_right(store, ["1", "2", "3"])


def test_missing_lists_distinct_keys_in_their_order(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", ["1", "2"])
    assert store.missing(["5", "1", "4", "5", "2"]) == ["5", "4"]
    assert "1" in store and "5" not in store


def test_an_absent_key_is_named_with_the_remedy(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", ["1"])
    with pytest.raises(UserError, match=r"store: got no record of '8' \(2 of 3 keys are absent\).*Run `mmalign prepare`"):
        store.get(["1", "8", "9", "8"])


def test_a_reader_sees_what_is_added_after_it_opened(tmp_path: Path) -> None:
    reader = filled(tmp_path / "store", ["1"])
    assert_right(reader, ["1"])
    filled(tmp_path / "store", ["2"])
    filled(tmp_path / "store", ["3"], part=1)
    assert_right(reader, ["3", "1", "2"])
    assert len(reader) == 3
    assert reader.num_bytes == 3 * (6 * 2 + 8)


def test_parts_are_read_as_one_and_the_lowest_wins(tmp_path: Path) -> None:
    filled(tmp_path / "store", ["1", "2"], part=1)
    (tmp_path / "other").mkdir()
    with TensorStore.create(tmp_path / "other" / "store", fields=FIELDS, fingerprint=FINGERPRINT) as other:
        other.add(["2", "3"], records(["5", "3"]))
    shutil.copytree(tmp_path / "other" / "store" / "part-00000", tmp_path / "store" / "part-00000")
    store = TensorStore.open(tmp_path / "store", fingerprint=FINGERPRINT)
    assert len(store) == 3
    assert store.get(["3", "2", "1"])["count"].tolist() == [3, 5, 1]


@pytest.mark.parametrize(
    ("keys", "tensors", "words"),
    [
        (["1"], {"mean": records(["1"])["mean"]}, "got fields ['mean'], want ['count', 'mean']"),
        (["1", "2"], records(["1"]), "mean: got ((1, 2, 3), torch.float16), want ((2, 2, 3), torch.float16)"),
        (["1"], {**records(["1"]), "count": torch.ones(1)}, "count: got ((1,), torch.float32), want ((1,), torch.int64)"),
        ([""], records(["1"]), "got key ''"),
        (["a\nb"], records(["1"]), "got key 'a\\nb'"),
    ],
)
def test_records_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, keys, tensors, words) -> None:
    with TensorStore.create(tmp_path / "store", fields=FIELDS, fingerprint={}) as store:
        with pytest.raises(ValueError, match=re.escape(words)):
            store.add(keys, tensors)
        assert len(store) == 0
        assert not list((tmp_path / "store").glob("part-*"))


@pytest.mark.parametrize("field", [("a/b", (2,), torch.float32), ("x", (2, 0), torch.float32), ("x", (2,), torch.complex64)])
def test_fields_that_cannot_be_stored_are_refused(tmp_path: Path, field: tuple[str, tuple[int, ...], torch.dtype]) -> None:
    name, shape, dtype = field
    with pytest.raises(ValueError, match=f"fields: {name}: got shape"):
        TensorStore.create(tmp_path / "store", fields={name: (shape, dtype)}, fingerprint={})
    assert not (tmp_path / "store").exists()


def test_a_mismatched_cache_is_refused_naming_every_difference(tmp_path: Path) -> None:
    filled(tmp_path / "store", ["1"])
    with pytest.raises(UserError) as caught:
        TensorStore.open(tmp_path / "store", fingerprint={"encoder": "xyz", "size": [64, 64], "crop": {"aspect": 1.5}})
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'store'}: the cache was made for something else (got: the cache, want: this run):",
        '  encoder: got "abc", want "xyz"',
        "  crop.flip: got true, want nothing",
        "  crop.aspect: got nothing, want 1.5",
        f"Run `mmalign prepare` into another folder, or delete {tmp_path / 'store'} and run it again.",
    ]


def test_tuples_and_lists_are_the_same_in_a_fingerprint_but_kinds_of_number_are_not(tmp_path: Path) -> None:
    TensorStore.create(tmp_path / "store", fields=FIELDS, fingerprint={"size": (64, 64), "seed": 1})
    assert TensorStore.open(tmp_path / "store", fingerprint={"size": [64, 64], "seed": 1}).fields == FIELDS
    with pytest.raises(UserError, match="seed: got 1, want true"):
        TensorStore.open(tmp_path / "store", fingerprint={"size": [64, 64], "seed": True})


def test_opening_for_other_fields_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "store", ["1"])
    other = {"mean": ((2, 4), torch.bfloat16), "count": ((), torch.int64)}
    with pytest.raises(UserError) as caught:
        TensorStore.open_or_create(tmp_path / "store", fields=other, fingerprint=FINGERPRINT)
    assert "fields.mean.shape: got [2, 3], want [2, 4]" in str(caught.value)
    assert 'fields.mean.dtype: got "float16", want "bfloat16"' in str(caught.value)
    assert "count" not in str(caught.value)


def test_a_reader_that_expects_other_fields_is_refused(tmp_path: Path) -> None:
    fields = {"mean": ((2,), torch.float16)}
    TensorStore.create(tmp_path / "store", fields=fields, fingerprint={"a": 1})
    assert TensorStore.open(tmp_path / "store", fields=fields, fingerprint={"a": 1}).fields == fields
    with pytest.raises(UserError, match=r"fields\.mean\.shape: got \[2\], want \[3\]"):
        TensorStore.open(tmp_path / "store", fields={"mean": ((3,), torch.float16)}, fingerprint={"a": 1})


def test_a_store_is_never_made_over_another_or_among_other_files(tmp_path: Path) -> None:
    filled(tmp_path / "store", ["1"])
    with pytest.raises(UserError, match="got a folder with a cache, want a new one"):
        TensorStore.create(tmp_path / "store", fields=FIELDS, fingerprint=FINGERPRINT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"other files \(thesis.txt\)"):
        TensorStore.open_or_create(tmp_path / "mine", fields=FIELDS, fingerprint=FINGERPRINT)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("header", "words"), [(None, "got no cache"), ("{", "got broken JSON"), ("[]", "no header"), ("{}", "no header")]
)
def test_a_folder_without_a_whole_header_is_refused_with_the_remedy(tmp_path, header, words) -> None:
    if header is not None:
        (tmp_path / "header.json").write_text(header)
    with pytest.raises(UserError, match=rf"{words}.*(Run|run) `mmalign prepare`"):
        TensorStore.open(tmp_path, fingerprint={})


def test_a_list_of_keys_torn_at_any_byte_keeps_its_whole_lines_and_can_be_continued(tmp_path: Path) -> None:
    filled(tmp_path / "whole", ["10", "11", "12"])
    text = (tmp_path / "whole" / "part-00000" / "keys.txt").read_bytes()
    assert text == b"10\n11\n12\n"
    for length in range(len(text) + 1):
        folder = tmp_path / f"torn-{length}"
        shutil.copytree(tmp_path / "whole", folder)
        os.truncate(folder / "part-00000" / "keys.txt", length)
        store = TensorStore.open(folder, fingerprint=FINGERPRINT)
        whole = ["10", "11", "12"][: length // 3]
        assert len(store) == len(whole)
        assert_right(store, whole)
        filled(folder, ["20", "10"])
        assert_right(store, [*whole, "20", "10"])
        assert_right(TensorStore.open(folder, fingerprint=FINGERPRINT), [*whole, "20", "10"])


@pytest.mark.parametrize("cut", ["mean", "count", "absent"])
def test_keys_without_data_count_as_missing_with_one_warning(tmp_path: Path, caplog, cut: str) -> None:
    folder = tmp_path / "store"
    filled(folder, ["1", "2", "3"])
    if cut == "absent":
        (folder / "part-00000" / "mean.bin").unlink()
    else:
        os.truncate(folder / "part-00000" / f"{cut}.bin", {"mean": 12, "count": 8}[cut] * 2 - 1)
    left = [] if cut == "absent" else ["1"]
    store = TensorStore.open(folder, fingerprint=FINGERPRINT)
    with caplog.at_level(logging.WARNING):
        assert store.missing(["1", "2", "3"]) == [key for key in ["1", "2", "3"] if key not in left]
        assert len(store) == len(left)
    assert len(caplog.records) == 1
    assert f"{3 - len(left)} keys have no data" in caplog.text
    filled(folder, ["9"])
    assert (folder / "part-00000" / "keys.txt").read_text().split() == [*left, "9"]
    filled(folder, ["3", "4", "1", "2"])
    assert_right(TensorStore.open(folder, fingerprint=FINGERPRINT), ["1", "2", "3", "4"])


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Have the kernel refuse to let any file of this process grow above `num_bytes`, as a full disc would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [30, 50, 100])
def test_a_full_disc_is_told_and_costs_only_the_records_of_that_call(tmp_path: Path, num_bytes: int) -> None:
    first, more = ["1", "2"], [str(number) for number in range(10, 40)]
    with TensorStore.create(tmp_path / "store", fields=FIELDS, fingerprint={}) as store:
        store.add(first, records(first))
        with no_file_above(num_bytes), pytest.raises(UserError, match=r"part-00000: got 'File too large'.*free space"):
            store.add(more, records(more))
        assert_right(store, first)
        present = [key for key in more if key in store]
        assert (tmp_path / "store" / "part-00000" / "mean.bin").stat().st_size == 12 * len(store)
        assert_right(store, present)
        assert store.add(more, records(more)) == len(more) - len(present)
        assert_right(store, [*first, *more])
    assert_right(TensorStore.open(tmp_path / "store", fingerprint={}), [*first, *more])


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/store: got 'Not a directory' while writing the cache"):
        TensorStore.create(tmp_path / "file" / "store", fields=FIELDS, fingerprint={})


def test_a_second_writer_of_a_part_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    first = TensorStore.create(tmp_path / "store", fields=FIELDS, fingerprint={})
    second = TensorStore.open(tmp_path / "store", fingerprint={})
    with first:
        first.claim()
        with pytest.raises(UserError, match=rf"part-00000: got a second writer while process {os.getpid()} on "):
            second.add(["1"], records(["1"]))
        with TensorStore.open(tmp_path / "store", fingerprint={}, part=1) as other:
            other.add(["2"], records(["2"]))
        first.add(["1"], records(["1"]))
    with second:
        second.add(["3"], records(["3"]))
    assert_right(second, ["1", "2", "3"])


def test_a_pickled_store_is_small_reads_and_holds_no_lock(tmp_path: Path) -> None:
    with TensorStore.create(tmp_path / "store", fields=FIELDS, fingerprint={}) as store:
        keys = [str(number) for number in range(500)]
        store.add(keys, records(keys))
        sent = pickle.dumps(store)
        assert len(sent) < 1000
        copy = pickle.loads(sent)
        assert_right(copy, keys)
        with pytest.raises(UserError, match="second writer"):
            copy.claim()


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, store: TensorStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return self.store.get([str(row) for row in rows])


def test_loader_workers_started_afresh_read_the_store(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", [str(number) for number in range(10)])
    loader = DataLoader(Rows(store), 4, num_workers=1, collate_fn=dict, multiprocessing_context="spawn")
    assert [batch["count"].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# Three scenes of forked writers, each with a store of its own; prints a line of exit codes for each.
WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from mmalign.cache import TensorStore
from mmalign.errors import UserError

FIELDS = {"mean": ((2, 3), torch.float16), "count": ((), torch.int64)}
root = Path(sys.argv[1])


def records(keys):
    count = torch.tensor([int(key) for key in keys], dtype=torch.int64)
    return {"mean": (count[:, None, None] + torch.arange(6).view(2, 3)).half(), "count": count}


def opened(scene, part=0):
    return TensorStore.open_or_create(root / scene, fields=FIELDS, fingerprint={}, part=part)


def forked(work):
    child = os.fork()
    if child == 0:
        os._exit(work())
    return child


def code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def num_bytes(path):
    return path.stat().st_size if path.exists() else 0


def write_for_ever():
    with opened("killed") as store:
        while True:
            first = len(store)
            keys = [str(number) for number in range(first, first + 7)]
            store.add(keys, records(keys))


def fill_share(rank, keys, start):
    while not start.exists():
        pass
    with opened("together", rank) as store:
        for key in store.missing(keys[rank::4]):
            store.add([key], records([key]))
    return 0


def add_as_child(store):
    try:
        store.add(["2"], records(["2"]))
    except UserError as error:
        return 17 if f"process {os.getppid()} on" in str(error) else 18
    return 0


delays = random.Random(0)
codes = []
for _ in range(15):
    before = num_bytes(root / "killed" / "part-00000" / "keys.txt")
    child = forked(write_for_ever)
    while num_bytes(root / "killed" / "part-00000" / "keys.txt") == before:
        time.sleep(0.001)
    time.sleep(delays.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    codes.append(code(child))
print(*codes)

keys = [str(number) for number in range(100)]
children = [forked(lambda rank=rank: fill_share(rank, keys, root / "start")) for rank in range(4)]
(root / "start").touch()
print(*[code(child) for child in children])

with opened("inherited") as store:
    store.add(["1"], records(["1"]))
    print(code(forked(lambda: add_as_child(store))))
    store.add(["3"], records(["3"]))
"""


class Scenes(NamedTuple):
    folder: Path
    exit_codes: dict[str, list[int]]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    folder = tmp_path_factory.mktemp("scenes")
    done = subprocess.run([sys.executable, "-c", WRITERS, str(folder)], check=True, capture_output=True, text=True, timeout=900)
    codes = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    return Scenes(folder, dict(zip(("killed", "together", "inherited"), codes, strict=True)))


def test_writers_killed_at_any_time_leave_whole_records_and_no_lock(scenes: Scenes) -> None:
    assert scenes.exit_codes["killed"] == [-9] * 15
    store = TensorStore.open(scenes.folder / "killed", fingerprint={})
    keys = [str(number) for number in range(len(store))]
    assert len(keys) >= 15 * 7
    assert store.missing(keys) == []
    assert_right(store, keys)
    with store:
        store.add(["100000"], {"mean": torch.zeros(1, 2, 3).half(), "count": torch.tensor([100000])})
    assert_right(store, keys)


def test_four_processes_that_start_together_fill_one_store(scenes: Scenes) -> None:
    assert scenes.exit_codes["together"] == [0, 0, 0, 0]
    store = TensorStore.open(scenes.folder / "together", fingerprint={})
    assert len(store) == 100
    assert_right(store, [str(number) for number in reversed(range(100))])
    assert len(list((scenes.folder / "together").glob("part-*"))) == 4


def test_a_forked_copy_of_a_writer_may_not_write(scenes: Scenes) -> None:
    assert scenes.exit_codes["inherited"] == [17]
    store = TensorStore.open(scenes.folder / "inherited", fingerprint={})
    assert_right(store, ["1", "3"])
    assert "2" not in store
