"""The ring as it is run: the commands of the Syn-Pic recipe, processes that share the work, kills, and checkpoints compared."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judging_processes import free_port
from PIL import Image
from runs import forget_accelerate

from mmalign import cli, generate, score
from mmalign.config import read_config
from mmalign.generate import GenerateConfig
from mmalign.records import Comparison, comparison, ranked, read
from mmalign.score import ScoreConfig

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
TWO_CPU = CONFIGS / "accelerate" / "two_cpu.yaml"

# Each command in a fork, with a meeting point of its own, so that the imports are paid once. Run by `accelerate launch`.
# A command with "kill" is killed by SIGKILL, in all processes, when so many files (or lines of them) are there: looked at
# between any two calls of its own, so that it cannot outrun the look, and by a thread while it waits.
SEVERAL = """
import json, os, runpy, signal, sys, threading, time, traceback
from pathlib import Path
import accelerate, datasets, diffusers, peft, slow_scorer
from diffusers import StableDiffusionPipeline, StableDiffusion3Pipeline

class KillWhen:
    def __init__(self, pattern, count, lines):
        self.folder, self.pattern, self.count, self.lines, self.due = Path.cwd(), pattern, count, lines, 0

    def look(self, *_):
        if time.monotonic() < self.due:
            return
        files = list(self.folder.glob(self.pattern))
        if (sum(file.read_bytes().count(b"\\n") for file in files) if self.lines else len(files)) >= self.count:
            os.kill(os.getpid(), signal.SIGKILL)
        self.due = time.monotonic() + 0.002

    def watch(self):
        while True:
            self.look()
            time.sleep(0.002)

for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text()), 1):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    os.environ.update(MASTER_PORT=str(int(os.environ["FIRST_PORT"]) + number), TORCHELASTIC_USE_AGENT_STORE="False")
    try:
        if "kill" in job:
            killer = KillWhen(*job["kill"])
            threading.Thread(target=killer.watch, daemon=True).start()
            sys.setprofile(killer.look)
        sys.argv[1:] = job["words"]
        runpy.run_module(f"mmalign.{job['verb']}", run_name="__main__", alter_sys=True)  # as -m does
    except SystemExit:
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(0)
"""


SLOW = "scorers={name: 'slow_scorer:slow'}"


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with the two processes of configs/accelerate/two_cpu.yaml."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO_CPU), "--main_process_port", "0"]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "1", "FIRST_PORT": str(free_port())}
    return subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, env=environment, timeout=1200)


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("cache-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


CANDIDATES = str(CONFIGS / "generate" / "smoke_syn_pic.yaml")


def made(output: Path, *words: str) -> Path:
    generate.main(read_config(GenerateConfig, CANDIDATES, [f"output={output}", "device=cpu", *words]))
    return output


def judged(data: Path, output: Path, *words: str) -> Path:
    return score.main(read_config(ScoreConfig, None, [f"data={data}", f"output={output}", *words])).output


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, cache_home: Path) -> Path:
    """What one process makes without a stop."""
    folder = tmp_path_factory.mktemp("one")
    made(folder / "candidates")
    judged(folder / "candidates", folder / "judged.jsonl", "scorers=[colourfulness, brightness]", "batch_size=3")
    judged(folder / "candidates", folder / "slow.jsonl", SLOW, "batch_size=3")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, one: Path) -> Path:
    """What two processes of `accelerate launch` make, and what is left where they are killed."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("half", "candidates"):
        shutil.copytree(one / "candidates", folder / f"{name}_of_one")
    cut = folder / "half_of_one"  # as one process leaves it that is killed: some images, no rows
    (cut / "comparisons.jsonl").unlink()
    for name in ("000001-01.png", "000002-00.png", "000003-02.png", "000003-03.png"):
        (cut / "media" / name).unlink()
    words = [CANDIDATES, "device=cpu"]
    whole = "candidates_of_one"
    jobs: list[dict[str, Any]] = [
        {"verb": "generate", "words": [*words, "output=candidates"]},
        {"verb": "generate", "words": [*words, "output=half_of_one"]},
        {"verb": "generate", "words": [*words, "output=killed"], "kill": ["killed/media/*.png", 5, False]},
        {"verb": "score", "words": [whole, "output=judged.jsonl", "scorers=[colourfulness, brightness]", "batch_size=3"]},
        {
            "verb": "score",
            "words": [whole, "output=slow.jsonl", SLOW, "batch_size=3"],
            "kill": ["slow.jsonl.judgements.jsonl.part-*", 2, True],
        },
    ]
    (folder / "several.py").write_text(SEVERAL)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch(folder, "several.py", "jobs.json")
    (folder / "stderr").write_text(done.stderr)
    (folder / "stdout").write_text(done.stdout)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that name the output or the moment."""
    own = ("config.yaml", "environment.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in own}


@pytest.mark.parametrize("name", ["candidates", "half_of_one"])
def test_two_processes_generate_byte_for_byte_what_one_does(one: Path, two: Path, name: str) -> None:
    assert (two / name / "comparisons.jsonl").is_file(), (two / "stderr").read_text()[-3000:]
    assert contents(two / name) == contents(one / "candidates")


def test_killed_in_two_processes_generate_goes_on_in_one_and_redoes_no_finished_batch(one: Path, two: Path) -> None:
    killed = two / "killed"
    there = {path.name: path.stat().st_mtime_ns for path in (killed / "media").glob("[0-9]*.png")}
    assert 5 <= len(there) < 16, "killed half-way"
    assert not (killed / "comparisons.jsonl").exists()
    config = read_config(GenerateConfig, CANDIDATES, [f"output={killed}", "device=cpu"])
    assert generate.main(config).num_images == 16 - len(there)
    for path in (killed / "media").glob(".*.partial"):
        path.unlink()
    assert contents(killed) == contents(one / "candidates")
    assert {name: (killed / "media" / name).stat().st_mtime_ns for name in there} == there


def test_two_processes_score_byte_for_byte_what_one_does(one: Path, two: Path) -> None:
    for name in ("judged.jsonl.judgements.jsonl", "judged.jsonl"):
        assert (two / name).is_file(), (two / "stderr").read_text()[-3000:]
    assert (two / "judged.jsonl.judgements.jsonl").read_bytes() == (one / "judged.jsonl.judgements.jsonl").read_bytes()
    assert [plain(row) for row in rows_of(two / "judged.jsonl")] == [plain(row) for row in rows_of(one / "judged.jsonl")]
    assert not list(two.glob("judged*part-*"))
    told = (two / "stdout").read_text()
    assert told.count("4 comparisons, 8 verdicts given") == 1, "one process tells, of all"


def test_killed_in_two_processes_score_goes_on_in_one_and_keeps_every_verdict(one: Path, two: Path) -> None:
    parts = list(two.glob("slow.jsonl.judgements.jsonl.part-*"))
    given = {line for part in parts for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}
    assert 2 <= len(given) < 4, "killed half-way"
    assert not (two / "slow.jsonl").exists()
    with open(parts[0], "ab") as file:
        file.write(b'{"comparison": "torn')
    data = two / "candidates_of_one"
    config = read_config(ScoreConfig, None, [f"data={data}", f"output={two / 'slow.jsonl'}", SLOW, "batch_size=3"])
    result = score.main(config)
    assert (result.num_kept, result.num_judged) == (len(given), 4 - len(given))
    journal = (two / "slow.jsonl.judgements.jsonl").read_bytes()
    assert journal == (one / "slow.jsonl.judgements.jsonl").read_bytes()
    assert given <= set(journal.splitlines(keepends=True))
    assert not list(two.glob("slow*part-*"))


def rows_of(path: Path) -> list[Comparison]:
    return [comparison(row) for row in read(path)]


def plain(row: Comparison) -> tuple[Any, ...]:
    """A row with the bytes of its images in place of where they lie."""
    return row.id, row.prompt.text, row.scores, row.provenance, [c.images[0].read() for c in row.candidates]


def recipe() -> list[list[str]]:
    """The commands at the head of the smoke config."""
    head = Path(CANDIDATES).read_text().split("prompts:")[0]
    return [shlex.split(line) for line in re.findall(r"^#   (mmalign .*)$", head, flags=re.MULTILINE)]


def run(*words: str) -> None:
    forget_accelerate()
    assert cli.main(list(words)) == 0, words


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory, cache_home: Path) -> Iterator[Path]:
    """The recipe's commands in a fresh folder, then images of the base, of each checkpoint and of the result."""
    folder = tmp_path_factory.mktemp("ring")
    (folder / "configs").symlink_to(CONFIGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        commands = recipe()
        assert [words[:2] for words in commands] == [["mmalign", verb] for verb in ("generate", "score", "rank", "train")]
        for _, *words in commands:
            run(*words, *(["training.optimiser.learning_rate=0.03"] if words[0] == "train" else []))
        sampled = ["--family", "sd15", "--model", "tiny", "--prompts", "[a red disc, a blue disc]", "--num-candidates", "3"]
        sampled += ["--steps", "2", "--seed", "1", "device=cpu"]
        run("generate", *sampled, "--output", "runs/before")
        tuned = "runs/smoke_syn_pic/tuned"
        for name in ("checkpoint-2", "checkpoint-4"):
            run("generate", *sampled, "--lora", f"{tuned}/{name}", "--output", f"runs/{name}")
        run("generate", *sampled, "--lora", tuned, "--output", "runs/after")
        compared = [
            "--before",
            "runs/before",
            "--after",
            "runs/after",
            "--checkpoints",
            "[runs/checkpoint-2, runs/checkpoint-4]",
        ]
        judges = ["--scorers", "[colourfulness, brightness]", "--held-out", "sharpness"]
        run("evaluate", *compared, *judges, "--run", tuned, "--output", "runs/report")
        yield folder / "runs"


def test_the_recipe_ranks_the_candidates_of_two_families_by_two_judges(turned: Path) -> None:
    rows = rows_of(turned / "smoke_syn_pic" / "ranked.jsonl")
    assert [row.prompt.text for row in rows] == ["a red disc", "a blue disc", "a green disc", "a black disc"]
    for row in rows:
        assert set(row.scores) == {"colourfulness", "brightness", "phi"}
        assert [p["generator"] for p in row.provenance] == ["small-unet"] * 2 + ["small-flow"] * 2
        assert [p["family"] for p in row.provenance] == ["sd15", "sd15", "sd3", "sd3"]
        assert len({p["seed"] for p in row.provenance}) == 4
        for entry in row.provenance:
            known = {"model", "scheduler", "steps", "guidance_scale", "size", "dtype", "versions"}
            assert known < entry.keys() and entry["versions"]["diffusers"]
            assert entry["guidance_scale"] == (5.0 if entry["family"] == "sd3" else 7.5)
        (example,) = ranked(row)
        assert example.side["scores"] == tuple(sorted(row.scores["phi"], reverse=True))


def test_the_run_trained_on_those_lists(turned: Path) -> None:
    tuned = turned / "smoke_syn_pic" / "tuned"
    card = (tuned / "README.md").read_text()
    assert "4 rows: 4 examples" in card
    losses = [json.loads(line)["loss"] for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and all(np.isfinite(losses))


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(c.images[0].open()).astype(int) for row in rows_of(folder) for c in row.candidates])


def test_a_checkpoint_is_sampled_by_its_path_and_the_last_one_is_the_result(turned: Path) -> None:
    before, at2, at4, after = (pixels(turned / name) for name in ("before", "checkpoint-2", "checkpoint-4", "after"))
    assert np.array_equal(at4, after)
    assert not np.array_equal(before, at2) and not np.array_equal(at2, at4)
    (row, *_) = rows_of(turned / "checkpoint-2")
    assert row.provenance[0]["lora"].endswith("tuned/checkpoint-2")
    assert set(row.provenance[0]["files"]) == {"lora"}


def test_the_report_shows_the_same_seeds_before_at_each_checkpoint_and_after(turned: Path) -> None:
    report = turned / "report"
    results = json.loads((report / "results.json").read_text())
    assert [one["step"] for one in results["checkpoints"]] == [2, 4]
    assert results["checkpoints"][1]["scorers"] == results["scorers"], "the last checkpoint is the result"
    assert results["last_step"] == 4 and results["over_optimisation"]["rule"]
    with Image.open(report / "checkpoints.png") as sheet:
        assert sheet.size == (2 * 40 + 4 * 128 + 3 * 4, 2 * 40 + 6 * (128 + 30))
    page = (report / "report.html").read_text()
    assert page.count("Mean of ") == 2 * 3 and "before · step 2 · step 4 · after" in page
