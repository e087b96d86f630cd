"""One optimiser step of Diffusion-DPO: mmalign against the step structure of the public script, equal before it is timed.

    python benchmarks/diffusion_step.py --size small
    python benchmarks/diffusion_step.py --out benchmarks/results/diffusion_step_cpu.json

Ratios are of process CPU time on one thread, of variants interleaved in one process; above 1 mmalign is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch
from data_path import OURS, PUBLIC, latent_store, pair_loading
from diffusion_toy import SIZES, Size, pairs, save_pipeline
from diffusion_variants import OurStep, PublicStep, move_away, open_ours, our_batches, public_batches
from measuring import Dispatches, GateError, LiveBytes, Ratio, gate, interleaved, resident_bytes
from report import print_rows, save_plot
from torch.utils.flop_counter import FlopCounterMode

MODES = ("full", "lora")
PEER = "public script"
AGAIN = "public script, the same twice"
JOINT = "public script, reference in one pass"
ONLINE = "mmalign, nothing prepared"
CACHED = "mmalign, cached latents and text"
PARTS = "mmalign, cached latents and text, one candidate at a time"
REFERENCE = "mmalign, cached latents, text and reference"
GOALS: dict[tuple[str, str], float] = {
    ("full", CACHED): 1.35,
    ("lora", CACHED): 1.35,
    ("full", REFERENCE): 1.85,
    ("lora", REFERENCE): 1.9,
}
# Reads the numbers of a generator that lives on the host whatever the device: nothing is waited for.
ON_THE_HOST = frozenset({"draws.py:drawn"})
DISCLOSED = (
    "the peer is our own writing of the public script's step from its description, not the script itself",
    f"the peer runs the reference on the chosen and on the rejected image apart; `{JOINT}` runs it once on both, as the "
    "published Salesforce code does; `to joint` is the ratio of median times to that row",
    "random weights and images; CPU, one thread, float32, no gradient checkpointing and no augmentation on either side",
    "reading images, and for the peer tokenising, is outside the clock on both sides (rows `loading`)",
    "by FLOPs the limits are those of this toy, whose UNet and VAE run at different speeds a FLOP; a GPU has other ratios",
    "filling the cache costs one VAE pass an image, one text pass a prompt and one reference pass a draw: it pays where "
    "they are used again (epochs, sweeps); draws that repeat are an option, not the default",
    "the peer's AdamW is torch's default, on a CPU a loop over tensors; ours is fused. Gradients are gated, updates are not",
    "live bytes count tensors made during a step beyond what is held between steps; kernels' own scratch memory is not seen",
)


class Side:
    """Everything of one mode (full fine-tuning or LoRA): the variants, on the same weights, data and draws."""

    def __init__(self, mode: str, size: Size, work: Path, *, peer_beta_factor: float = 1.0) -> None:
        """Args:
        mode: full or lora.
        size: of the toy.
        work: folder that holds `pipeline` and the filled `cache`.
        peer_beta_factor: other than 1 plants a wrong number in the peers, which the gate must find.
        """
        self.mode = mode
        folder, cache, examples = work / "pipeline", work / "cache", pairs(size)
        lora = mode == "lora"
        settings: dict[str, dict[str, Any]] = {
            ONLINE: {},
            CACHED: {"cache": cache},
            PARTS: {"cache": cache},
            REFERENCE: {"cache": cache, "draws": size.draws},
        }
        self.variants: dict[str, Any] = {}
        for name, more in settings.items():
            policy = open_ours(folder, size, lora=lora, **more)
            move_away(policy)
            batches = our_batches(policy, examples, size)
            if name == ONLINE:
                public = public_batches(policy, batches)
                for peer in (PEER, AGAIN, JOINT):
                    self.variants[peer] = PublicStep(policy, folder, public, joint_reference=peer == JOINT)
                    self.variants[peer].beta *= peer_beta_factor
            self.variants[name] = OurStep(policy, batches, work / "runs", size, candidates=1 if name == PARTS else None)
        self.num_batches = len(batches)

    def check(self) -> dict[str, dict[str, float]]:
        """The gate, on every micro-batch.

        Raises:
            GateError: a variant's loss or gradient is not the peer's.
        """
        worst: dict[str, dict[str, float]] = {name: {} for name in self.variants}
        for _ in range(self.num_batches):
            answers = {name: variant.answer() for name, variant in self.variants.items()}
            for name, answer in answers.items():
                for key, value in gate(f"{self.mode}: {name}", answer, answers[PEER]).items():
                    worst[name][key] = max(worst[name].get(key, 0.0), value)
        return worst

    def rows(self, checked: Mapping[str, Mapping[str, float]], rounds: int) -> list[dict[str, Any]]:
        """Counts, then the clock; `checked` is the gate's answer."""
        counted = {name: counts(variant) for name, variant in self.variants.items()}
        ratios = interleaved({name: v.step for name, v in self.variants.items()}, peer=PEER, rounds=rounds)
        rows = []
        for name, ratio in ratios.items():
            limit = counted[PEER]["flops"] / counted[name]["flops"]
            rows.append(
                {"suite": "step", "mode": self.mode, "variant": name, "peer": PEER, "gate": checked[name]}
                | {"goal": GOALS.get((self.mode, name)), **timing(ratio)}
                | {"ratio_to_joint": ratios[JOINT].seconds / ratio.seconds}
                | {"flop_limit": limit, "attained_of_limit": ratio.median / limit, **counted[name]}
            )
        return rows


def counts(variant: PublicStep | OurStep) -> dict[str, Any]:
    """FLOPs, bytes and synchronisations of one micro-step, after a whole step has made the optimiser's state."""
    variant.step()
    with FlopCounterMode(display=False) as flops, LiveBytes() as live, Dispatches() as seen:
        variant.micro_step_of_next()
    variant.drop_gradients()
    waits = {place: number for place, number in seen.waits.items() if place not in ON_THE_HOST}
    return {
        "flops": flops.get_total_flops(),
        "held_bytes": resident_bytes(variant.tensors()),
        "step_peak_bytes": live.peak,
        "host_syncs": sum(waits.values()),
        "host_syncs_at": waits,
        "collectives": seen.collectives,
        "operations": seen.operations,
    }


def timing(ratio: Ratio) -> dict[str, Any]:
    """A ratio as JSON; without a claim where the rounds disagree."""
    return {
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "spread": ratio.spread,
        "reliable": ratio.reliable,
        "cpu_seconds": ratio.seconds,
    }


def prepare(size: Size, work: Path) -> None:
    """Save the toy pipeline and fill the cache as `mmalign prepare` does."""
    folder = save_pipeline(size, work / "pipeline")
    policy = open_ours(folder, size, lora=True, cache=work / "cache", draws=size.draws, caching=0)
    examples = pairs(size)
    assert policy.cache is not None
    policy.cache.fill(policy, examples)
    policy.cache.fill_references(policy, examples, 2, contextlib.nullcontext)
    policy.cache.close()


def data_rows(size: Size, work: Path, rounds: int) -> list[dict[str, Any]]:
    """Goals 16 and 17: loading a pair, and the latent store."""
    rows = []
    for name, ratio in latent_store(size, work, rounds).items():
        goal = 1 / 1.3 if name == "latent store" else None
        rows.append({"suite": "store", "variant": name, "peer": "flat memmap", "goal": goal, **timing(ratio)})
    for side, target in size.decode:
        for name, ratio in pair_loading(side, target, rounds).items():
            goal = (3.5 if target <= 512 else 4.5) if name == OURS else None
            mode = f"{side} -> {target} pixels"
            rows.append({"suite": "loading", "mode": mode, "variant": name, "peer": PUBLIC, "goal": goal, **timing(ratio)})
    return rows


def measure(size: Size, rounds: int, *, modes: Sequence[str] = MODES, peer_beta_factor: float = 1.0) -> list[dict[str, Any]]:
    """All rows.

    Raises:
        GateError: two sides do not compute the same; nothing was timed.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="mmalign-benchmark-") as name:
        work = Path(name)
        prepare(size, work)
        sides = [Side(mode, size, work, peer_beta_factor=peer_beta_factor) for mode in modes]
        checked = [side.check() for side in sides]
        rows = [row for side, fine in zip(sides, checked, strict=True) for row in side.rows(fine, rounds)]
        return rows + data_rows(size, work, rounds)


def document(rows: Sequence[Mapping[str, Any]], size: str, rounds: int) -> dict[str, Any]:
    """What the JSON file holds."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "mmalign")
    return {
        "benchmark": "diffusion_step",
        "size": {"name": size, **vars(SIZES[size])},
        "rounds": rounds,
        "clock": "process CPU time, one thread, A..Z then Z..A a round, median of the rounds' ratios",
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "machine": platform.machine(),
        "disclosed": list(DISCLOSED),
        "rows": list(rows),
    }


def write(rows: Sequence[Mapping[str, Any]], size: str, rounds: int, out: Path) -> None:
    """The JSON file, and a plot beside it where matplotlib is installed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document(rows, size, rounds), indent=1) + "\n")
    save_plot(rows, out.with_suffix(".png"))


def main(argv: Sequence[str] | None = None, *, show: Callable[[str], None] = print) -> int:
    """Run from the command line; 1 when the gate refuses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="of the toy (default: full)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="full fine-tuning, LoRA (default: both)")
    parser.add_argument("--rounds", type=int, default=7, help="of the clock; 7 or more for numbers to be quoted")
    parser.add_argument("--out", type=Path, help="JSON file to write; a plot beside it where matplotlib is installed")
    parser.add_argument("--plant-fault", action="store_true", help="check the gate: a wrong beta in the peer must be refused")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        factor = 1.001 if chosen.plant_fault else 1.0
        rows = measure(SIZES[chosen.size], chosen.rounds, modes=chosen.modes, peer_beta_factor=factor)
    except GateError as fault:
        show(f"the gate refuses: {fault}")
        return 1
    print_rows(rows, DISCLOSED, show)
    if chosen.out is not None:
        write(rows, chosen.size, chosen.rounds, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
