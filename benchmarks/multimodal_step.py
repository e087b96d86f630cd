"""One optimiser step of vision DPO and of Blind PO: mmalign against the installed TRL, equal before it is timed.

    python benchmarks/multimodal_step.py --size tiny
    python benchmarks/multimodal_step.py --out benchmarks/results/multimodal_step_cpu.json

A LLaVA of real classes, its vision tower frozen on both sides. Pairs: DPO. Triples (chosen, rejected, blind): `blind_bpo` with
`reduction: mean` against TRL's DPO on both pairs, which is how Blind PO's authors train. Ratios are of process CPU time on one
thread, of variants interleaved in one process; above 1 mmalign is faster.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")

import torch
from measuring import GateError, gate, interleaved
from multimodal_toy import SIZES, Size, examples_of, rows_of, save_model
from report import print_rows, save_plot
from text_parts import timing
from text_step import counts
from text_variants import BETA, DPO, LEARNING_RATE, MAX_GRAD_NORM, RANK, OurTextStep, TrlStep, copy_weights, move_away
from text_variants import our_run as run_of

from mmalign.adapters.image_text import ImageTextAdapter
from mmalign.adapters.options import Lora
from mmalign.losses import LOSSES
from mmalign.objective import Term
from mmalign.records import Example

PEER, AGAIN = "TRL-compact", "TRL-compact, the same twice"
SHIPPED = "TRL as shipped on CPU"
OURS, FEATURES, CACHED = "mmalign", "mmalign, features cached", "mmalign, features and reference cached"
DATA = {"pairs": 2, "BPO triples": 3}
MODES = ("full", "lora")
BPO = Term(name="blind_bpo", loss=LOSSES["blind_bpo"], settings={"beta": BETA, "reduction": "mean"})
GOALS = {OURS: 1.7, CACHED: 2.4}
MEMORY_GOAL = 0.6
HEADS = {"step": "one optimiser step"}
DISCLOSED = (
    "`TRL-compact` is the installed TRL with one function replaced, which decides whether only the answers' positions go "
    "through the output layer (as on CUDA) or all (as shipped on a CPU); all ratios are to it",
    "random weights, images and texts, float32, one thread, no gradient checkpointing on either side; the vision tower is "
    "frozen on both, the projector is trained in full fine-tuning and frozen with LoRA",
    "loading, image processing, collating and tokenising are outside the clock",
    "each step forgets what it remembers of images, since epochs show an image once; cached features are then read from disk",
    "features can be cached where neither tower nor projector is trained: with LoRA. TRL refuses to precompute reference "
    "log-probabilities for images, so there is no such peer",
    "live bytes are those of tensors made during a micro-step, gradients included; weights, the reference and the optimiser's "
    "state are left out",
)


def open_ours(
    folder: Path, *, lora: bool, cache: Path | None = None, features: Path | None = None, caching: int | None = None
) -> Any:
    """Open the policy as `mmalign train` does it; with `caching` as `mmalign prepare` does it."""
    adapter = ImageTextAdapter(
        model=str(folder),
        max_response_length=None,
        lora=Lora(rank=RANK) if lora else None,
        cache=None if cache is None else str(cache),
        features=None if features is None else str(features),
    )
    return adapter.open(seed=0, needs_reference=True, caching=caching)


def open_trainer(folder: Path, examples: Sequence[Example], work: Path, *, lora: bool) -> Any:
    """TRL's trainer on the model, the tower frozen; LoRA on the layers that ours has it on."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    config = DPOConfig(
        output_dir=str(work),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=MAX_GRAD_NORM,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.model.vision_tower.requires_grad_(False)
    layers = r"^model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj$"
    low_rank = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, task_type="CAUSAL_LM") if lora else None
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows_of(examples)),
        processing_class=AutoProcessor.from_pretrained(folder),
        peft_config=low_rank,
    )
    trainer.create_optimizer()
    return trainer


class SeenAnew(OurTextStep):
    """mmalign's own step on an image that it has not met before: nothing that was remembered of it counts."""

    def _prepared(self) -> Any:
        for network in (self.policy.network, self.policy._copy):
            if network is not None:
                network.sight.forget()
        return super()._prepared()


class Side:
    """All variants of a case, on the same weights and data."""

    def __init__(self, data: str, mode: str, size: Size, work: Path, *, peer_beta_factor: float = 1.0) -> None:
        """Args:
        data: of DATA.
        mode: of MODES.
        size: of the toy.
        work: scratch folder.
        peer_beta_factor: other than 1 plants a wrong number in the peers, which the gate must find.
        """
        lora = mode == "lora"
        self.name = f"{data}, {mode}"
        folder = save_model(size, work / "model")
        examples = examples_of(size, DATA[data])
        policy = open_ours(folder, lora=lora)
        move_away(policy)
        trainer = open_trainer(folder, examples, work / "trl", lora=lora)
        copy_weights(policy, trainer)
        term = BPO if data == "BPO triples" else DPO
        how = {"num_examples": 1, "batch_size": 1, "accumulation": 1}
        ours = [policy.collate([policy.item(one, 0) for one in examples])]
        theirs = [trainer.data_collator([dict(row) for row in rows_of(examples)])]
        check_tokens(theirs[0], ours[0], policy.tokenizer.pad_token_id)

        def trl(*, compact: bool = True) -> TrlStep:
            return TrlStep(trainer, theirs, beta=BETA * peer_beta_factor, compact=compact, cached=False, accumulation=1)

        cache = filled_cache(folder, examples, work / "cache", DATA[data])
        self.variants: dict[str, TrlStep | SeenAnew] = {
            PEER: trl(),
            AGAIN: trl(),
            OURS: SeenAnew(run_of(policy, work / "run", **how, term=term), ours, cache=None),
            SHIPPED: trl(compact=False),
        }
        if lora:
            kept = open_ours(folder, lora=True, features=work / "features")
            move_away(kept)
            run = run_of(kept, work / "kept", **how, term=term)
            self.variants[FEATURES] = SeenAnew(run, ours, cache=None)
            self.variants[CACHED] = SeenAnew(run, ours, cache=cache)

    def rows(self, rounds: int) -> list[dict[str, Any]]:
        """The gate, then the clock.

        Raises:
            GateError: a variant's loss or gradient is not the peer's.
        """
        for variant in self.variants.values():  # fills what is cached on the way
            variant.micro_step()
            variant.taken()
        peer, known = counts(self.variants[PEER])
        counted = {PEER: known}
        for name, variant in self.variants.items():
            if name != PEER:
                answer, known = counts(variant)
                counted[name] = known | {"gate": gate(f"{self.name}: {name}", answer, peer)}
        before = os.getloadavg()
        steps = {name: variant.step for name, variant in self.variants.items()}
        for step in steps.values():  # makes the optimisers' states
            step()
        ratios = interleaved(steps, peer=PEER, rounds=rounds)
        rows = []
        for name, ratio in ratios.items():
            limit = counted[PEER]["flops"] / counted[name]["flops"]
            rows.append(
                {"suite": "step", "mode": self.name, "peer": PEER, "rounds": rounds, "variant": name, "goal": GOALS.get(name)}
                | {**timing(ratio), "load": [before, os.getloadavg()], "flop_limit": limit}
                | {"attained_of_limit": ratio.median / limit}
                | {"memory_ratio": counted[name]["step_peak_bytes"] / counted[PEER]["step_peak_bytes"]}
                | {"memory_goal": MEMORY_GOAL if name == OURS else None, **counted[name]}
            )
        return rows


def filled_cache(folder: Path, examples: Sequence[Example], cache: Path, num_candidates: int) -> Any:
    """Reference log-probabilities, as `mmalign prepare` writes them and a run reads them."""
    policy = open_ours(folder, lora=True, cache=cache, caching=0)
    policy.cache.fill_references(policy, examples, num_candidates, nullcontext)
    policy.cache.close()
    return open_ours(folder, lora=True, cache=cache).cache


def check_tokens(theirs: Mapping[str, Any], ours: Mapping[str, Any], pad: int) -> None:
    """Both sides must have read the same tokens.

    Raises:
        GateError: they have not.
    """
    (encoded,) = ours["encoded"]
    mine = [[*encoded.contexts[0], *continuation] for continuation in encoded.continuations]
    rows = [row[mask.bool()].tolist() for row, mask in zip(theirs["input_ids"], theirs["attention_mask"], strict=True)]
    wanted = [*[mine[0]] * (len(mine) - 1), *mine[1:]]
    if rows != wanted or len(encoded.contexts) != 1:
        raise GateError("got other tokens than TRL's. Nothing is timed.")


def document(rows: Sequence[Mapping[str, Any]], size: str) -> dict[str, Any]:
    """What the JSON file holds."""
    packages = ("torch", "trl", "transformers", "accelerate", "peft", "mmalign")
    return {
        "benchmark": "multimodal_step",
        "size": {"name": size, **asdict(SIZES[size])},
        "clock": "process CPU time, one thread, A..Z then Z..A a round, median of the rounds' ratios",
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, shared: `load` is the load average before and after a case",
        "disclosed": list(DISCLOSED),
        "rows": list(rows),
    }


def main(argv: Sequence[str] | None = None, *, show: Callable[[str], None] = print) -> int:
    """Run from the command line; 1 when the gate refuses, 2 without TRL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="full", help="of the toy (default: full)")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA), help="default: both")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="full fine-tuning, LoRA (default: both)")
    parser.add_argument("--rounds", type=int, default=7, help="of the clock; 7 or more for numbers to be quoted")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plant-fault", action="store_true", help="check the gate: a wrong beta in the peer must be refused")
    chosen = parser.parse_args(argv)
    if importlib.util.find_spec("trl") is None:
        show('TRL is not installed. Run `pip install "mmalign[benchmark]"`.')
        return 2
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        for data in chosen.data:
            for mode in chosen.modes:
                with tempfile.TemporaryDirectory(prefix="mmalign-benchmark-") as work:
                    factor = 1.001 if chosen.plant_fault else 1.0
                    rows += Side(data, mode, SIZES[chosen.size], Path(work), peer_beta_factor=factor).rows(chosen.rounds)
                if chosen.out is not None:
                    chosen.out.parent.mkdir(parents=True, exist_ok=True)
                    chosen.out.write_text(json.dumps(document(rows, chosen.size), indent=1) + "\n")
    except GateError as fault:
        show(f"the gate refuses: {fault}")
        return 1
    if chosen.out is not None:
        mine = [row for row in rows if row["variant"] in (OURS, FEATURES, CACHED)]
        save_plot(mine, chosen.out.with_suffix(".png"), label="TRL-compact's time / time")
    print_rows(rows, DISCLOSED, show, HEADS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
