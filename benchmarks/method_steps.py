"""One step of MaPO, RankDPO, SPO and Diffusion-DRO against the structure of the public scripts, equal before it is timed.

    python benchmarks/method_steps.py --quick
    python benchmarks/method_steps.py --out benchmarks/results/method_steps_cpu.json

Ratios are of process CPU time on one thread, of variants interleaved in one process; above 1 mmalign is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch
from diffusion_step import counts, timing
from measuring import GateError, LiveBytes, gate, interleaved
from method_iteration import APPROXIMATE, LATENT, spo_iteration_side
from method_toys import TOYS, Toy, save
from method_variants import (
    ONLINE,
    OURS,
    PARTS,
    PEER,
    Opening,
    Side,
    dro_side,
    gate_states,
    mapo_side,
    rank_dpo_side,
    spo_side,
)
from report import MB, print_rows, save_plot
from torch.utils.flop_counter import FlopCounterMode

SIDES: dict[str, Callable[[Opening], Side]] = {
    "mapo": mapo_side,
    "rank_dpo": rank_dpo_side,
    "spo": spo_side,
    "spo_iteration": spo_iteration_side,
    "dro": dro_side,
}
HEADS = {
    "mapo": "MaPO, one pair",
    "rank_dpo": "RankDPO, one list of 4",
    "spo": "SPO's training phase, pairs of successors of one x_t, guidance",
    "spo sampling": "SPO's sampling phase, a prompt, with decoding and a step-aware CLIP",
    "spo_iteration": "SPO, an iteration: a prompt is sampled, and its 16 pairs are trained on",
    "dro": "Diffusion-DRO, an update of several micro-steps with its sampling",
    "dro sampling": "Diffusion-DRO, the sampling of own states alone",
}
GOALS: dict[tuple[str, str, str], float] = {
    ("spo", "sd15", OURS): 1.95,
    ("spo_iteration", "sd15", OURS): 1.2,
    ("spo_iteration", "sd15", APPROXIMATE): 2.0,
    ("spo_iteration", "sd15", LATENT): 2.0,
    ("dro", "sd15", OURS): 1.5,
    ("dro sampling", "sd15", OURS): 1.85,
}
DISCLOSED = (
    "the peers are our own writing of the public scripts' structure from its description, not the scripts; RankDPO has no "
    "public code, its peer is the plain loop over the images of a list",
    "random weights and images; CPU, one thread, float32, no gradient checkpointing and no augmentation on either side; the "
    "published MaPO runs checkpoint, which costs a further pass of each image on both sides or on neither",
    "reading images, and for the peer tokenising, is outside the clock on both sides; filling the cache costs one VAE pass an "
    "image and one text pass a prompt, and pays where they are used again",
    "what costs a GPU nothing costs a small network on a CPU much: the loops over candidates and over samples' schedulers are "
    "part of the ratios, and ratios above the FLOP limit are theirs",
    "DRO: an update has 4 micro-steps of 4 images (published 16 of 4), for which one policy samples on both sides, as there; "
    "the public structure samples 4 states in each, mmalign all 16 at once, sorted by how far they go. With one micro-step an "
    "update its batch would shrink from 4 rows, with 16 from 64",
    "DRO: the draws are the first seed's whose own states stop after about 10.5 of 20 steps on average, as draws do",
    "DRO: mmalign's sampling reads once where its rows end (`.tolist()`, which `syncs` cannot see on a CPU), and waits no more",
    "SPO: both sides have their prompts encoded ahead. In its sampling phase (a prompt, 4 successors, 20 steps) the public "
    "structure forwards no state twice either: mmalign only saves the scorer's text tower, once a prompt instead of once an "
    "image. Both decode the successors of a prompt together",
    "SPO on SDXL's toy: pairs that share x_t. With the published 3 inner steps one pair in four does, the others have two x_t "
    "each, where nothing can be saved (FLOP limit of all: 1.14), so that the goal is that of SD 1.5 alone",
    "SPO, an iteration: every gap is enough, which gives 16 pairs a prompt, the most there can be (2 optimiser steps of 8; "
    "published batch 10); where fewer pass the threshold, sampling is more of it and the exact ratio lower",
    "SPO, an iteration, the two rows with other judges: which pairs come of them is not the peer's and is not gated; that "
    "training on their pairs gives the peer's losses and gradients is",
    "SD3's toy reads a prompt longer than its image, and no public script trains MaPO or RankDPO on it",
    "RankDPO's beta (20), MaPO's slope (100) and the distance of SPO's policy from its reference (no ratio is clamped) are "
    "chosen so that float32 can pass the gate; they cost no time",
    "the peer's AdamW is torch's default, on a CPU a loop over tensors; ours is fused. Gradients are gated, updates are not",
    "live bytes count tensors made during a micro-step beyond what is held between steps",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method on one toy, all weights or LoRA."""

    method: str
    family: str
    lora: bool

    @property
    def mode(self) -> str:
        """In the words of the table."""
        return f"{self.family} toy, {'LoRA' if self.lora else 'full'}"


CASES = (
    Case(method="mapo", family="sd15", lora=False),
    Case(method="mapo", family="sdxl", lora=False),
    Case(method="mapo", family="sd3", lora=True),
    Case(method="rank_dpo", family="sd15", lora=False),
    Case(method="rank_dpo", family="sdxl", lora=True),
    Case(method="rank_dpo", family="sd3", lora=True),
    Case(method="spo", family="sd15", lora=True),
    Case(method="spo", family="sdxl", lora=True),
    Case(method="spo_iteration", family="sd15", lora=True),
    Case(method="dro", family="sd15", lora=False),
)
MEMORY = Case(method="rank_dpo", family="sd15", lora=False)


def opening(case: Case, toys: Mapping[str, Toy], work: Path, fault: float = 1.0) -> Opening:
    """Save the toy, and say how its policies are opened."""
    toy = toys[case.family]
    return Opening(
        toy=toy,
        folder=save(toy, work / "pipeline"),
        lora=case.lora,
        work=work,
        needs_reference=case.method != "mapo",
        independent=case.method == "rank_dpo",
        fault=fault,
    )


def check(case: Case, side: Side) -> dict[str, dict[str, float]]:
    """The gate, on every micro-batch and on whatever is computed beside the step.

    Raises:
        GateError: a variant's loss, gradient or own states are not the peer's.
    """
    worst: dict[str, dict[str, float]] = {name: {} for name in side.variants}
    for _ in range(side.num_batches):
        answers = {name: variant.answer() for name, variant in side.variants.items()}
        for name, answer in answers.items():
            wanted = side.twins[name]() if name in side.twins else answers[PEER]
            for key, value in gate(f"{case.method}, {case.mode}: {name}", answer, wanted).items():
                worst[name][key] = max(worst[name].get(key, 0.0), value)
    for what, variants in {**side.apart, **side.states}.items():
        wanted = variants[PEER]()
        for name, compute in variants.items():
            gap = gate_states(f"{case.method} {what}, {case.mode}: {name}", compute(), wanted)
            worst[name]["states_gap"] = gap
    return worst


def step_rows(case: Case, side: Side, checked: Mapping[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Counts, then the clock; `checked` is the gate's answer."""
    timed = {name: variant for name, variant in side.variants.items() if name != ONLINE}
    counted = {name: counts(variant) for name, variant in timed.items()}
    ratios = interleaved({name: variant.step for name, variant in timed.items()}, peer=PEER, rounds=rounds)
    rows = []
    for name, ratio in ratios.items():
        limit = counted[PEER]["flops"] / counted[name]["flops"]
        rows.append(
            {"suite": case.method, "mode": case.mode, "variant": name, "peer": PEER, "gate": checked[name]}
            | {"goal": GOALS.get((case.method, case.family, name)), **timing(ratio)}
            | {"flop_limit": limit, "attained_of_limit": ratio.median / limit, **counted[name]}
        )
    return rows


def apart_rows(case: Case, side: Side, rounds: int) -> list[dict[str, Any]]:
    """What is timed beside the step: DRO's sampling."""
    rows = []
    for what, variants in side.apart.items():
        flops = {}
        for name, compute in variants.items():
            with FlopCounterMode(display=False) as counter:
                compute()
            flops[name] = counter.get_total_flops()
        for name, ratio in interleaved(variants, peer=PEER, rounds=rounds).items():
            suite, limit = f"{case.method} {what}", flops[PEER] / flops[name]
            rows.append(
                {
                    "suite": suite,
                    "mode": case.mode,
                    "variant": name,
                    "peer": PEER,
                    "goal": GOALS.get((suite, case.family, name)),
                }
                | {**timing(ratio), "flops": flops[name], "flop_limit": limit, "attained_of_limit": ratio.median / limit}
            )
    return rows


def memory_rows(toys: Mapping[str, Toy], work: Path, fault: float = 1.0) -> list[dict[str, Any]]:
    """RankDPO's bytes by k: the whole list at once, and one candidate at a time. After the gate, as everything."""
    rows = []
    case = MEMORY
    for k in toys[case.family].sizes:
        folder = work / f"k{k}"
        side = rank_dpo_side(opening(case, toys, folder, fault), k)
        check(case, side)
        for name in (PEER, OURS, PARTS):
            variant = side.variants[name]
            variant.step()
            with LiveBytes() as live:
                variant.micro_step_of_next()
            variant.drop_gradients()
            rows.append(
                {"suite": "rank_dpo memory", "mode": case.mode, "variant": name, "num_candidates": k}
                | {"step_peak_bytes": live.peak, "gradient_bytes": _gradient_bytes(variant)}
            )
    return rows


def _gradient_bytes(variant: Any) -> int:
    parameters = variant.parameters.values() if hasattr(variant, "parameters") else variant.run.parameters
    return sum(p.numel() * p.element_size() for p in parameters)


def measure(toys: Mapping[str, Toy], rounds: int, *, cases: Sequence[Case] = CASES, fault: float = 1.0) -> list[dict[str, Any]]:
    """All rows; every case passes its gate before its clock starts, and one that does not ends it all.

    Raises:
        GateError: two sides do not compute the same; nothing was timed.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="mmalign-benchmark-") as name:
        rows: list[dict[str, Any]] = []
        for number, case in enumerate(cases):
            side = SIDES[case.method](opening(case, toys, Path(name) / f"case-{number}", fault))
            rows += step_rows(case, side, check(case, side), rounds)
            rows += apart_rows(case, side, rounds)
        if MEMORY in cases:
            rows += memory_rows(toys, Path(name), fault)
    return rows


def document(rows: Sequence[Mapping[str, Any]], size: str, rounds: int) -> dict[str, Any]:
    """What the JSON file holds."""
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "mmalign")
    return {
        "benchmark": "method_steps",
        "size": {"name": size, **{name: vars(toy) for name, toy in TOYS[size].items()}},
        "rounds": rounds,
        "clock": "process CPU time, one thread, A..Z then Z..A a round, median of the rounds' ratios",
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "machine": f"{platform.machine()} CPU, shared with other work",
        "disclosed": list(DISCLOSED),
        "rows": list(rows),
    }


def kept_rows(out: Path, rows: Sequence[Mapping[str, Any]], size: str) -> list[dict[str, Any]]:
    """Rows of a file of this size whose suite and mode are not measured anew."""
    if not out.is_file():
        return []
    before = json.loads(out.read_text())
    new = {(row["suite"], row["mode"]) for row in rows}
    return [row for row in before["rows"] if before["size"]["name"] == size and (row["suite"], row["mode"]) not in new]


def print_memory(rows: Sequence[Mapping[str, Any]], show: Callable[[str], None]) -> None:
    """The memory of RankDPO by k, without the gradients, which every variant has."""
    mode = next((row["mode"] for row in rows if row["suite"] == "rank_dpo memory"), None)
    if mode is None:
        return
    show(f"\nRankDPO, {mode}: step + MB without gradients, by the number of candidates")
    for name in (PEER, OURS, PARTS):
        here = [row for row in rows if row["suite"] == "rank_dpo memory" and row["variant"] == name]
        told = "   ".join(
            f"k = {row['num_candidates']}: {(row['step_peak_bytes'] - row['gradient_bytes']) / MB:.1f}" for row in here
        )
        show(f"  {name:<34}  {told}")


def main(argv: Sequence[str] | None = None, *, show: Callable[[str], None] = print) -> int:
    """Run from the command line; 1 when the gate refuses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks and one round: no numbers to be quoted")
    parser.add_argument("--methods", nargs="+", choices=list(SIDES), default=list(SIDES), help="which (default: all)")
    parser.add_argument(
        "--families", nargs="+", choices=list(TOYS["full"]), default=list(TOYS["full"]), help="which (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of the clock; 7 or more for numbers to be quoted")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write, whose other cases stay; a plot beside it where matplotlib is installed"
    )
    parser.add_argument(
        "--plant-fault", action="store_true", help="check the gate: a wrong factor in the peers must be refused"
    )
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    size, rounds = ("tiny", 1) if chosen.quick else ("full", chosen.rounds)
    cases = [case for case in CASES if case.method in chosen.methods and case.family in chosen.families]
    try:
        rows = measure(TOYS[size], rounds, cases=cases, fault=1.001 if chosen.plant_fault else 1.0)
    except GateError as fault:
        show(f"the gate refuses: {fault}")
        return 1
    print_rows([row for row in rows if row["suite"] in HEADS], DISCLOSED, show, HEADS)
    print_memory(rows, show)
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [row | {"rounds": rounds, "load": list(os.getloadavg())} for row in rows]
        rows = [*kept_rows(chosen.out, rows, size), *rows]
        chosen.out.write_text(json.dumps(document(rows, size, rounds), indent=1) + "\n")
        save_plot(rows, chosen.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
