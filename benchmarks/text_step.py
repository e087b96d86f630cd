"""One optimiser step of DPO on texts: mmalign against the installed TRL, equal before it is timed.

    python benchmarks/text_step.py --size tiny
    python benchmarks/text_step.py --out benchmarks/results/text_step_cpu.json
    python benchmarks/text_step.py --modes full --vocabs 32k --ratios 4:1 --out FILE          # rows of other cases stay in FILE

Ratios are of process CPU time on one thread, of variants interleaved in one process; above 1 mmalign is faster. TRL runs twice:
as shipped on a CPU, and with the head behaviour it has on CUDA (the headline, `TRL-compact`).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")

import torch
from measuring import Answer, Dispatches, GateError, LiveBytes, gate, interleaved
from report import print_rows, save_plot
from text_parts import head_rows, timing, tokenising_rows
from text_toy import SIZES, VARIED, WIDE, Case, Size, pairs, save_model
from text_variants import (
    BETA,
    OurTextStep,
    TrlStep,
    check_tokens,
    copy_weights,
    filled_cache,
    move_away,
    open_ours,
    open_trainer,
    our_batches,
    our_run,
    trl_batches,
)
from torch.utils.flop_counter import FlopCounterMode

MODES = ("full", "lora")
PEER = "TRL-compact"
AGAIN = "TRL-compact, the same twice"
SHIPPED = "TRL as shipped on CPU"
PEER_CACHED = "TRL-compact, reference precomputed"
OURS = "mmalign"
CACHED = "mmalign, reference cached"
SLOW = (SHIPPED, PEER_CACHED)
GOALS: dict[tuple[str, str, str], float] = {
    ("32k", "1:1", OURS): 1.5,
    ("32k", "4:1", OURS): 1.65,
    ("32k", "8:1", OURS): 1.75,
    **{("128k", ratio, OURS): 1.7 for ratio in ("1:1", "4:1", "8:1")},
    **{(vocab, "1:1", CACHED): 2.1 for vocab in ("32k", "128k")},
    **{(vocab, "4:1", CACHED): 2.3 for vocab in ("32k", "128k")},
    **{(vocab, "8:1", CACHED): 2.5 for vocab in ("32k", "128k")},
    ("32k", VARIED, OURS): 2.0,
    ("32k", WIDE, OURS): 2.5,
}
MEMORY_GOALS = {"32k": 0.6, "128k": 0.7}
PARTS = ("step", "head", "tokenising")
HEADS = {
    "step": "one optimiser step of DPO",
    "memory": "live bytes of a micro-step",
    "head": "the output layer alone, forward and backward",
    "tokenising": "tokenising pairs",
}
# Reads a number that lives on the host whatever the device.
ON_THE_HOST = frozenset({"tokens.py:_layout"})
DISCLOSED = (
    "`TRL-compact` is the installed TRL with one function replaced, which decides whether only the answers' positions go "
    "through the output layer (as on CUDA) or all (as shipped on a CPU); all ratios are to it",
    "on a CPU TRL folds logits in torch, in about twelve elementwise passes; its Triton kernel on CUDA does not pay these. The "
    "FLOP limit is what may be hoped for on a GPU, not the CPU's ratio",
    "random weights and texts, float32, one thread, no gradient checkpointing on either side (TRL's default is on)",
    "fixed lengths have no padding on either side; `varied lengths` has TRL's random padding against packed rows; where a step "
    "is one micro-batch of all its pairs, TRL as shipped on a CPU is left out, which would take about 20 GB",
    "glibc's allocator is left as it comes: it gives large blocks back to the system and takes them anew, page by page, which "
    "TRL pays more for. With `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` it keeps them, as CUDA's allocator does; "
    "`allocator` tells what was set",
    "loading, collating and tokenising are outside the clock; our `prepare`, which lays out the tokens, is inside it, and so "
    "are the metrics of both sides. What transformers' Trainer does around `training_step` is not",
    "a cached reference is paid for by one pass over the data: it pays where it is used again (epochs, sweeps). TRL has the "
    "same, for texts: `TRL-compact, reference precomputed`",
    "live bytes are those of tensors made during a micro-step, gradients included; weights, the reference and the optimiser's "
    "state are equal on both sides and left out, as is kernels' own scratch memory",
    "`syncs` are `.item()` and truth tests of tensors in a micro-step; masks as indices, which also wait on CUDA, are not seen",
)


def mm_in_place(target: Any, left: Any, right: Any, *, out_shape: Any = None, **_: Any) -> int:
    """FLOPs of `addmm_`, which torch's counter does not know."""
    return int(2 * left[0] * left[1] * right[1])


class Side:
    """All variants of a case, on the same weights and data."""

    def __init__(self, case: Case, size: Size, folder: Path, work: Path, *, peer_beta_factor: float = 1.0) -> None:
        """Args:
        case: what is compared.
        size: of the toy.
        folder: the model.
        work: scratch folder.
        peer_beta_factor: other than 1 plants a wrong number in the peers, which the gate must find.
        """
        self.case = case
        batch_size, accumulation = case.batches(size)
        examples = pairs(size, case)
        cache = filled_cache(folder, examples, work / "cache")
        policy = open_ours(folder, lora=case.lora)
        move_away(policy)
        trainer = open_trainer(folder, examples, work / "trl", lora=case.lora)
        copy_weights(policy, trainer)
        run = our_run(policy, work / "run", num_examples=len(examples), batch_size=batch_size, accumulation=accumulation)
        ours = our_batches(policy, examples, batch_size)
        check_tokens(trainer, ours)
        theirs = trl_batches(trainer, list(trainer.train_dataset), batch_size)
        beta = BETA * peer_beta_factor

        def trl(batches: Any, *, compact: bool = True, cached: bool = False) -> TrlStep:
            return TrlStep(trainer, batches, beta=beta, compact=compact, cached=cached, accumulation=accumulation)

        self.variants: dict[str, TrlStep | OurTextStep] = {
            PEER: trl(theirs),
            **({AGAIN: trl(theirs)} if case.again else {}),
            OURS: OurTextStep(run, ours, cache=None),
            CACHED: OurTextStep(run, ours, cache=cache),
            **({SHIPPED: trl(theirs, compact=False)} if case.ratio != WIDE else {}),
            PEER_CACHED: trl(theirs, cached=True),
        }
        self.num_batches = len(ours)

    def check(self) -> dict[str, dict[str, Any]]:
        """The gate on every micro-batch, and the counts of the last one.

        Raises:
            GateError: a variant's loss or gradient is not the peer's.
        """
        known: dict[str, dict[str, Any]] = {name: {"gate": {}} for name in self.variants}
        for _ in range(self.num_batches):
            peer, counted = counts(self.variants[PEER])
            known[PEER] |= counted
            for name, variant in self.variants.items():
                answer = peer
                if name != PEER:
                    answer, counted = counts(variant)
                    known[name] |= counted
                worst = known[name]["gate"]
                for key, value in gate(f"{self.case.name}: {name}", answer, peer).items():
                    worst[key] = max(worst.get(key, 0.0), value)
        return known

    def rows(self, checked: Mapping[str, Mapping[str, Any]], rounds: int) -> list[dict[str, Any]]:
        """The clock; `checked` is the gate's answer. What is slow and no goal hangs on is timed in fewer rounds."""
        case, before = self.case, os.getloadavg()
        steps = {name: variant.step for name, variant in self.variants.items()}
        steps[PEER](), steps[OURS]()  # makes the optimisers' states
        slow = {name: step for name, step in steps.items() if name in (PEER, *SLOW)}
        fast = {name: step for name, step in steps.items() if name not in SLOW}
        few = max(1, rounds // 3)
        ratios = {name: (few, ratio) for name, ratio in interleaved(slow, peer=PEER, rounds=few).items()}
        ratios |= {name: (rounds, ratio) for name, ratio in interleaved(fast, peer=PEER, rounds=rounds).items()}
        rows = []
        for name in self.variants:
            number, ratio = ratios[name]
            counted, peer = checked[name], checked[PEER]
            limit = peer["flops"] / counted["flops"]
            rows.append(
                {"suite": "step", "mode": case.name, "peer": PEER, "rounds": number, "variant": name}
                | {"goal": GOALS.get((case.vocab, case.ratio, name)), **timing(ratio), "load": [before, os.getloadavg()]}
                | {"flop_limit": limit, "attained_of_limit": ratio.median / limit}
                | {"memory_ratio": counted["step_peak_bytes"] / peer["step_peak_bytes"], "memory_goal": None, **counted}
            )
        return rows

    def memory_rows(self, checked: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Live bytes of the last micro-step of the gate, and what of them are not gradients."""
        if self.case.ratio in (VARIED, WIDE):
            return []
        found = {name: checked[name]["step_peak_bytes"] for name in (PEER, OURS)}
        gradients = sum(4 * parameter.numel() for parameter in self.variants[PEER].trained().values())  # type: ignore[union-attr]
        return [
            {"suite": "memory", "mode": self.case.name, "peer": PEER, "variant": name, "step_peak_bytes": peak}
            | {"gradient_bytes": gradients, "memory_ratio": peak / found[PEER]}
            | {"memory_ratio_without_gradients": (peak - gradients) / (found[PEER] - gradients)}
            | {"memory_goal": MEMORY_GOALS.get(self.case.vocab) if name == OURS else None}
            for name, peak in found.items()
        ]


def counts(variant: TrlStep | OurTextStep) -> tuple[Answer, dict[str, Any]]:
    """The answer of the next micro-batch, and FLOPs, bytes and synchronisations of the micro-step that gives it."""
    from accelerate import Accelerator

    gathered: list[None] = []
    before = Accelerator.gather
    Accelerator.gather = lambda self, tensor: gathered.append(None) or before(self, tensor)
    try:
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: mm_in_place})
        with counter as flops, LiveBytes() as live, Dispatches() as seen:
            variant.micro_step()
    finally:
        Accelerator.gather = before
    answer = variant.taken()
    waits = {place: number for place, number in seen.waits.items() if place not in ON_THE_HOST}
    return answer, {
        "flops": flops.get_total_flops(),
        "step_peak_bytes": live.peak,
        "host_syncs": sum(waits.values()),
        "host_syncs_at": waits,
        "collectives": len(gathered) + seen.collectives,
        "operations": seen.operations,
    }


def cases_of(size: Size, vocabs: Sequence[str], ratios: Sequence[str], modes: Sequence[str]) -> list[Case]:
    """All combinations; lengths vary with the smallest vocabulary only. The first case times the peer twice."""
    first = next(iter(size.vocabs))
    return [
        Case(vocab=vocab, ratio=ratio, lora=mode == "lora", again=vocab == first and ratio == next(iter(size.lengths)))
        for vocab in vocabs
        for ratio in ratios
        for mode in modes
        if ratio not in (VARIED, WIDE) or vocab == first
    ]


def case_rows(case: Case, size: Size, rounds: int, *, peer_beta_factor: float = 1.0) -> list[dict[str, Any]]:
    """All rows of a case.

    Raises:
        GateError: two sides do not compute the same; nothing was timed.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="mmalign-benchmark-") as name:
        work = Path(name)
        folder = save_model(size, size.vocabs[case.vocab], work / "model")
        side = Side(case, size, folder, work, peer_beta_factor=peer_beta_factor)
        checked = side.check()
        rows = [*side.memory_rows(checked), *side.rows(checked, rounds)]
    del side
    gc.collect()
    return rows


def document(rows: Sequence[Mapping[str, Any]], size: str) -> dict[str, Any]:
    """What the JSON file holds."""
    packages = ("torch", "trl", "transformers", "accelerate", "peft", "mmalign")
    return {
        "benchmark": "text_step",
        "size": {"name": size, **vars(SIZES[size])},
        "clock": "process CPU time, one thread, A..Z then Z..A a round, median of the rounds' ratios",
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, shared: `load` is the load average before and after a case",
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "disclosed": list(DISCLOSED),
        "rows": list(rows),
    }


def write(rows: Sequence[Mapping[str, Any]], size: str, out: Path) -> list[Mapping[str, Any]]:
    """The JSON file, and a plot beside it where matplotlib is installed; returns all rows.

    Rows of other cases that the file holds, of the same size, stay.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(out.read_text()) if out.exists() else {"size": {"name": size}, "rows": []}
    fresh = {(row["suite"], row["mode"]) for row in rows}
    kept = [row for row in old["rows"] if old["size"]["name"] == size and (row["suite"], row["mode"]) not in fresh]
    every = sorted([*kept, *rows], key=lambda row: (list(HEADS).index(row["suite"]), row["mode"]))
    out.write_text(json.dumps(document(every, size), indent=1) + "\n")
    shown = [row for row in every if row["variant"] in (OURS, CACHED)]
    save_plot(shown, out.with_suffix(".png"), label="TRL-compact's time / time")
    return every


def main(argv: Sequence[str] | None = None, *, show: Callable[[str], None] = print) -> int:
    """Run from the command line; 1 when the gate refuses, 2 without TRL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="of the toy (default: full)")
    parser.add_argument("--vocabs", nargs="+", help="default: all of the size")
    parser.add_argument("--ratios", nargs="+", help=f"prompt : answer, {VARIED} or {WIDE} (default: all)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="full fine-tuning, LoRA (default: both)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=7, help="of the clock; 7 or more for numbers to be quoted")
    parser.add_argument("--out", type=Path, help="JSON file; rows of other cases in it stay")
    parser.add_argument("--plant-fault", action="store_true", help="check the gate: a wrong beta in the peer must be refused")
    chosen = parser.parse_args(argv)
    if importlib.util.find_spec("trl") is None:
        show('TRL is not installed. Run `pip install "mmalign[benchmark]"`.')
        return 2
    torch.set_num_threads(1)
    size = SIZES[chosen.size]
    rows: list[dict[str, Any]] = []

    def keep(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        if chosen.out is not None:
            write(rows, chosen.size, chosen.out)

    try:
        if "step" in chosen.parts:
            ratios = chosen.ratios or [*size.lengths, VARIED, WIDE]
            for case in cases_of(size, chosen.vocabs or list(size.vocabs), ratios, chosen.modes):
                keep(case_rows(case, size, chosen.rounds, peer_beta_factor=1.001 if chosen.plant_fault else 1.0))
        if "head" in chosen.parts:
            keep(head_rows(size, chosen.vocabs or list(size.vocabs), chosen.rounds))
        if "tokenising" in chosen.parts:
            keep(tokenising_rows(size, chosen.rounds))
    except GateError as fault:
        show(f"the gate refuses: {fault}")
        return 1
    print_rows(rows, DISCLOSED, show, HEADS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
