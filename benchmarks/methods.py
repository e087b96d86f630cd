"""Every diffusion method from one pretrained base: what it gains, and what its labels turned or drawn at random lead to.

    python benchmarks/methods.py --methods dpo mapo --seeds 0
    python benchmarks/methods.py --out benchmarks/results/methods_cpu.json                     # all, about a quarter of an hour

Each run is `mmalign train` on a config, in a process of its own. Seconds are CPU seconds on one thread. The controls, labels
that are turned or drawn at random, are run at the first seed only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from method_outcomes import LABELS, METHODS, Bed, make_bed, run

from mmalign.digits import Base, Pretraining, default_cache, pretrained
from mmalign.digits_flow import FlowPretraining, pretrained_flow
from mmalign.models.quiet import quiet_libraries

OPENED = (  # what every process would spend half its time on
    "method_outcomes",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "accelerate",
    "datasets",
    "peft",
    "sklearn.datasets",
    "sklearn.linear_model",
    "sklearn.svm",
)
COLUMNS = ("method", "labels", "win rate", "correct", "gain", "diversity", "steps", "CPU s", "peak MB")


def measured(bed: Bed, name: str, labels: str, folder: Path) -> dict[str, Any]:
    """One run as a row. In a process of its own, so that the most memory it had is its own; what is imported counts."""
    with quiet_libraries():
        found = run(bed, METHODS[name], folder, labels=labels)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    steps = METHODS[name].settings["training.steps"]
    return {"method": name, "labels": labels, "seed": bed.seed, "steps": steps, "peak_bytes": peak, **asdict(found)}


def bed_of(kind: str, base: Base, folder: Path, seed: int) -> Bed:
    """A bed with the libraries quiet."""
    with quiet_libraries():
        return make_bed(base, kind, folder, seed)


def rows(
    methods: Sequence[str], labels: Sequence[str], seeds: Sequence[int], work: Path, cache: Path
) -> Iterator[dict[str, Any]]:
    """Every run, one after another, each in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(OPENED))
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as alone:
        for seed in seeds:
            base = pretrained(Pretraining(), seed=seed, cache=cache)
            beds: dict[str, Bed] = {}
            for name in methods:
                kind = METHODS[name].kind
                if kind not in beds:
                    flow = kind == "flow"
                    drawn = pretrained_flow(FlowPretraining(), base, seed=seed, cache=cache) if flow else base
                    beds[kind] = alone.submit(bed_of, kind, drawn, work / f"{kind}-{seed}", seed).result()
                for told in labels if seed == seeds[0] else [told for told in labels if told == "true"]:
                    folder = work / f"{name}-{told}-{seed}"
                    yield alone.submit(measured, beds[kind], name, told, folder).result()


def table(found: Sequence[dict[str, Any]]) -> str:
    """One line a method and kind of label, means over seeds, in Markdown."""
    lines = heading(COLUMNS)
    for name, told in dict.fromkeys((row["method"], row["labels"]) for row in found):
        some = [row for row in found if (row["method"], row["labels"]) == (name, told)]

        def average(key: str, some: Sequence[dict[str, Any]] = some) -> float:
            return mean(float(row[key]) for row in some)

        before, after = average("correct_before"), average("correct_after")
        cells = [name, told, f"{average('win_rate'):.3f}", f"{before:.3f} -> {after:.3f}", f"{after - before:+.3f}"]
        cells += [f"{average('diversity_change'):+.1%}", str(some[0]["steps"])]
        cells += [f"{average('seconds'):.0f}", f"{max(row['peak_bytes'] for row in some) / 2**20:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains(found: Sequence[dict[str, Any]]) -> str:
    """One line a method: its gain at every seed, on true labels, in Markdown."""
    seeds = list(dict.fromkeys(row["seed"] for row in found))
    lines = heading(("method", *(f"seed {seed}" for seed in seeds)))
    for name in dict.fromkeys(row["method"] for row in found):
        by_seed = {row["seed"]: row for row in found if (row["method"], row["labels"]) == (name, "true")}
        cells = [f"{by_seed[seed]['correct_after'] - by_seed[seed]['correct_before']:+.3f}" for seed in seeds]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def heading(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table in Markdown."""
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS), help="what the annotator says")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of base, candidates, training and comparison")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where pretrained bases stay")
    parser.add_argument("--out", type=Path, help="JSON file with every run and what it ran on")
    given = parser.parse_args(arguments)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # told to the processes that train
    found = []
    load = [os.getloadavg()]
    with tempfile.TemporaryDirectory() as work:
        for row in rows(given.methods, given.labels, given.seeds, Path(work), given.cache):
            found.append(row)
            sys.stderr.write(f"{row['method']} {row['labels']} seed {row['seed']}: {row['correct_after']:.3f}\n")
            if given.out is not None:
                load.append(os.getloadavg())
                _write(given.out, found, load)
    sys.stdout.write(table(found) + "\n")
    if len(given.seeds) > 1 and "true" in given.labels:
        sys.stdout.write("\n" + gains(found) + "\n")
    return 0


def _write(file: Path, found: Sequence[dict[str, Any]], load: Sequence[tuple[float, float, float]]) -> None:
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    minutes = sorted(one[0] for one in load)
    setting = {
        "device": "CPU",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load_average_1_min": {"lowest": minutes[0], "median": median(minutes), "highest": minutes[-1]},
        "python": platform.python_version(),
        "packages": packages,
    }
    recipes = {name: dict(METHODS[name].settings) for name in dict.fromkeys(row["method"] for row in found)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"setting": setting, "recipes": recipes, "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
