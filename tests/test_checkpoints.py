import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmalign.checkpoints import COMPLETE, latest, read_state, remove_leftovers, rotate, write_folder, write_state
from mmalign.errors import UserError


def save(folder: Path, step: int, text: str = "") -> Path:
    final = folder / f"checkpoint-{step}"
    with write_folder(final) as temporary:
        write_state(temporary, {"step": step, "text": text})
        (temporary / "model").mkdir()
        (temporary / "model" / "weights.bin").write_bytes(bytes([step % 256]) * 1000)
    return final


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    with write_folder(tmp_path / "run" / "checkpoint-5") as temporary:
        (temporary / "weights.bin").write_bytes(b"abc")
        assert latest(tmp_path / "run") is None
        assert not (tmp_path / "run" / "checkpoint-5").exists()
    assert latest(tmp_path / "run") == tmp_path / "run" / "checkpoint-5"
    assert (tmp_path / "run" / "checkpoint-5" / "weights.bin").read_bytes() == b"abc"
    assert hidden(tmp_path / "run") == []


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_and_keeps_the_last_checkpoint(tmp_path: Path, fault: type[BaseException]) -> None:
    save(tmp_path, 1)
    with pytest.raises(fault), write_folder(tmp_path / "checkpoint-2") as temporary:
        (temporary / "weights.bin").write_bytes(b"half")
        raise fault
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert latest(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disc_is_told_with_the_remedy_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    fault = r"checkpoint-2: got 'No space left on device'.*intact\. Free some space"
    with pytest.raises(UserError, match=fault) as caught, write_folder(tmp_path / "checkpoint-2") as temporary:
        (temporary / "weights.bin").write_bytes(b"half")
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"more")
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_other_faults_of_the_system_keep_their_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_folder(tmp_path / "checkpoint-2") as temporary:
        (temporary / "absent.bin").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, "first")
    save(tmp_path, 3, "second")
    assert read_state(tmp_path / "checkpoint-3")["text"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_latest_counts_steps_as_numbers_and_ignores_other_names(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    assert latest(tmp_path) is None
    for step in (9, 10, 2):
        save(tmp_path, step)
    for name in ("checkpoint-final", "checkpoint-99x", "checkpoint-011", ".checkpoint-50.tmp-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / COMPLETE).write_text('{"files": {}}')
    (tmp_path / "checkpoint-77").write_text("a file")
    assert latest(tmp_path) == tmp_path / "checkpoint-10"


def damage_marker(checkpoint: Path) -> None:
    (checkpoint / COMPLETE).unlink()


def damage_marker_text(checkpoint: Path) -> None:
    (checkpoint / COMPLETE).write_text("{")


def damage_size(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model" / "weights.bin", 999)


def damage_list(checkpoint: Path) -> None:
    (checkpoint / "model" / "weights.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_marker, "no readable complete.json"),
        (damage_marker_text, "no readable complete.json"),
        (damage_size, "model/weights.bin has 999 bytes instead of 1000"),
        (damage_list, "model/weights.bin is missing"),
    ],
)
def test_a_damaged_copy_is_passed_over_with_a_warning(tmp_path, caplog, damage, words) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "checkpoint-1"
    assert f"{tmp_path / 'checkpoint-2'}: ignored" in caplog.text
    assert words in caplog.text


def test_rotation_deletes_the_oldest_and_never_the_newest(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    rotate(tmp_path, 5)
    assert len(list(tmp_path.iterdir())) == 4
    rotate(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    rotate(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-11"]
    with pytest.raises(UserError, match="got 0, want at least 1"):
        rotate(tmp_path, 0)


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damage_size(save(tmp_path, 2))
    rotate(tmp_path, 1)
    assert latest(tmp_path) == tmp_path / "checkpoint-1"


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "absent")
    save(tmp_path, 1)
    for name in (".checkpoint-2.tmp-123", ".checkpoint-1.old-123", ".checkpoint-0.trash-9", ".git", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".trainer_state.json.tmp-123").write_text("{")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "checkpoint-1", "notes"]


def test_a_checkpoint_is_put_back_when_its_replacement_never_came(tmp_path: Path) -> None:
    save(tmp_path, 4, "first").rename(tmp_path / ".checkpoint-4.old-123")
    (tmp_path / ".checkpoint-4.tmp-123").mkdir()
    remove_leftovers(tmp_path)
    assert read_state(tmp_path / "checkpoint-4")["text"] == "first"
    assert hidden(tmp_path) == []


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {"step": 3, "best": 0.1 + 0.2, "tiny": 5e-324, "name": "\u00e9\u2603", "list": [1, None, True]}
    write_state(tmp_path, {"step": 2})
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("text", "words"), [(None, "no such file"), ("{", "broken JSON"), ("[1]", "got list")])
def test_a_broken_state_is_named_with_the_remedy(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(UserError, match=rf"trainer_state\.json: got .*{words}|{words}.*Resume from another checkpoint"):
        read_state(tmp_path)


# Forks one run per number n; the run kills itself with SIGKILL just before its n-th file operation.
KILLED_RUNS = """
import json, os, signal, sys
from pathlib import Path
from mmalign.checkpoints import rotate, write_folder, write_state

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}
root = Path(sys.argv[1])


def run(folder, kill_at):
    count = 0

    def watch(event, arguments):
        nonlocal count
        count += event in WATCHED
        if event in WATCHED and count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    for step, text in ((1, "a"), (1, "b"), (2, "a")):
        with write_folder(folder / f"checkpoint-{step}") as temporary:
            write_state(temporary, {"step": step, "text": text})
            (temporary / "weights.bin").write_bytes(bytes([step]) * 100_000)
        print(json.dumps([kill_at, step, text]), flush=True)
        rotate(folder, 1)


kill_at = 0
killed = True
while killed:
    kill_at += 1
    folder = root / str(kill_at)
    child = os.fork()
    if child == 0:
        run(folder, kill_at)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_a_run_killed_before_any_file_operation_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUNS, str(tmp_path)], check=True, capture_output=True, text=True, timeout=1200
    )
    saved: dict[int, list[tuple[int, str]]] = {}
    for line in done.stdout.splitlines():
        kill_at, step, text = json.loads(line)
        saved.setdefault(kill_at, []).append((step, text))
    num_runs = len(list(tmp_path.iterdir()))
    assert num_runs > 40
    assert saved[num_runs] == [(1, "a"), (1, "b"), (2, "a")]
    order = [(0, ""), *saved[num_runs], (99, "")]
    for kill_at in range(1, num_runs + 1):
        folder = tmp_path / str(kill_at)
        remove_leftovers(folder)
        newest = latest(folder)
        told = saved.get(kill_at, [(0, "")])[-1]
        found = (0, "")
        if newest is not None:
            state = read_state(newest)
            found = (state["step"], state["text"])
            assert newest.name == f"checkpoint-{found[0]}"
            assert (newest / "weights.bin").read_bytes() == bytes([found[0]]) * 100_000
        assert found in (told, order[order.index(told) + 1]), f"killed before operation {kill_at}"
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        for name in names:
            assert f"checkpoint-{read_state(folder / name)['step']}" == name, f"killed before operation {kill_at}"
            assert (folder / name / "weights.bin").stat().st_size == 100_000
        save(folder, 50)
        assert latest(folder) == folder / "checkpoint-50"
