"""The only training loop. It knows `.logps` of a step's inputs and a loss, and nothing of modality or method."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmalign import checkpoints, metrics
from mmalign.errors import UserError
from mmalign.moving_reference import MovingReference
from mmalign.objective import Objective
from mmalign.sources import Order, Prepared, Stream
from mmalign.training import Training, changed_keys, check_dropout, flat_settings

logger = logging.getLogger(__name__)

TRAINABLE = "trainable.safetensors"
METRICS = "metrics.jsonl"
MOST_SKIPPED = 50  # steps in a row that float16 may lose to overflow


@runtime_checkable
class Policy(Protocol):
    """What the loop asks of an opened adapter."""

    network: nn.Module

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, as a list."""

    def reference(self) -> AbstractContextManager[Callable[..., Tensor]]:
        """The reference network, for the length of the block."""

    def save(self, folder: Path) -> None:
        """Write the trained weights in the library's own format."""

    def validate(self, folder: Path) -> None:
        """Write samples made on fixed seeds."""


@dataclass(kw_only=True)
class Run:
    """The state of one training run."""

    accelerator: Any
    policy: Policy
    objective: Objective
    training: Training
    order: Order
    output: Path
    config: Mapping[str, Any]
    data: str = ""
    total: int
    network: nn.Module = field(init=False)
    optimiser: Any = field(init=False)
    scheduler: Any = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)
    ema: Any = None
    moving: MovingReference | None = None
    step: int = 0
    sums: metrics.Sums = field(default_factory=dict)
    since: tuple[int, float] = (0, 0.0)
    skipped: int = 0  # steps in a row

    def __post_init__(self) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        training = self.training
        self.parameters = list(self.policy.parameters())
        optimiser = training.optimiser.build(self.parameters)
        # The scheduler is stepped once per optimiser step, by us, whatever the number of processes.
        self.scheduler = get_scheduler(
            training.schedule, optimiser, num_warmup_steps=training.warmup_steps, num_training_steps=self.total
        )
        self.network, self.optimiser = self.accelerator.prepare(self.policy.network, optimiser)
        if training.ema_decay is not None:
            self.ema = EMAModel(self.parameters, decay=training.ema_decay)
            self.ema.to(self.accelerator.device)
        if training.moving_reference is not None:
            self.moving = MovingReference(self.parameters, training.moving_reference)
        for stateful in (self.scheduler, self.objective, self.ema, self.moving):
            if stateful is not None:
                self.accelerator.register_for_checkpointing(stateful)
        self.accelerator.register_save_state_pre_hook(self._save_trainable)
        self.accelerator.register_load_state_pre_hook(self._load_trainable)

    # --- one step -------------------------------------------------------------------------------------------------

    def take_step(self, micro_batches: Iterable[Prepared]) -> None:
        """One optimiser step over `accumulation` micro-batches."""
        finite: list[tuple[Tensor, Sequence[str]]] = []
        for number, prepared in enumerate(micro_batches):
            last = number == self.training.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                finite.append(self.micro_step(prepared, sync=last))
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.training.max_grad_norm or math.inf)
        norm = torch.as_tensor(norm, device=self.accelerator.device)
        taken = self._stop_unless_finite(finite, norm)
        self.optimiser.step()  # of an overflown step under loss scaling: lowers the scale, leaves the weights
        self.optimiser.zero_grad(set_to_none=True)
        self.skipped = 0 if taken else self.skipped + 1
        if taken:
            self.scheduler.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
            if self.moving is not None:
                self.moving.follow(self.parameters)
            one = torch.ones_like(norm, dtype=torch.float64)
            self.sums = metrics.add(self.sums, {"grad_norm": (norm.detach().double(), one)})
        elif self.skipped == MOST_SKIPPED:
            raise UserError(
                f"step {self.step + 1}: float16 overflowed in {MOST_SKIPPED} steps in a row. Use mixed_precision bf16, or a "
                "smaller learning_rate."
            )
        self.step += 1

    def micro_step(self, prepared: Prepared, *, sync: bool) -> tuple[Tensor, Sequence[str]]:
        """Gradients of one micro-batch; returns which of its losses are finite, and their ids."""
        training = self.training
        reference, inputs = self._reference(prepared)
        at_once = training.candidate_microbatch or inputs.num_candidates
        # The mean over the step's examples, of which this process and micro-batch hold a share; DDP averages over processes.
        scale = 1 / (len(prepared.ids) * training.accumulation)
        if at_once >= inputs.num_candidates:
            with self.accelerator.autocast():
                measured = inputs.measures(self.network)
            result = self.objective(measured, reference, prepared.side, self._gather)
            self.accelerator.backward(result.losses.sum() * scale)
        else:
            with self.accelerator.autocast():
                measured, inputs = inputs.settle(self.bare)
            leaves = {name: values.detach().requires_grad_() for name, values in measured.items()}
            result = self.objective(leaves, reference, prepared.side, self._gather)
            found = torch.autograd.grad(result.losses.sum() * scale, list(leaves.values()), allow_unused=True)
            gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
            self._backward_in_parts(inputs, gradients, at_once, sync)
        logps = measured["policy"].detach()
        readings = {"logps": logps, **inputs.readings(logps)}
        readings |= {name: values.detach() for name, values in measured.items() if name != "policy" and values.ndim == 2}
        if reference is not None:
            known_of = {"logps": reference["policy"], **inputs.readings(reference["policy"])}
            readings |= {f"{name}/ref": value for name, value in known_of.items()}
        known = {name: prepared.side.get(name) for name in ("labels", "scores", "prob", "lengths", "blind")}
        now = metrics.preference_metrics(result.losses, result.rewards, readings, **known, beta=self.objective.beta())
        self.sums = metrics.add(self.sums, now)
        one = torch.ones((), dtype=torch.float64, device=logps.device)
        self.sums = metrics.add(self.sums, {name: (value * one, one) for name, value in prepared.notes.items()})
        return torch.isfinite(result.losses.detach()), prepared.ids

    def _backward_in_parts(self, inputs: Any, gradients: Mapping[str, Tensor], at_once: int, sync: bool) -> None:
        """Back-propagate some candidates at a time: exact, because the loss sees the network only through its measures."""
        starts = range(0, inputs.num_candidates, at_once)
        for start in starts:
            part = slice(start, start + at_once)
            alone = nullcontext() if sync and start == starts[-1] else self.accelerator.no_sync(self.network)
            with alone:
                with self.accelerator.autocast():
                    measured = inputs.candidates(part).measures(self.network)
                # What is not one a candidate goes whole with the first part, and is missing in the others.
                told = [(measured[name], g) for name, g in gradients.items() if name in measured]
                total = sum((values * (g if values.shape == g.shape else g[:, part])).sum() for values, g in told)
                self.accelerator.backward(total)

    def _reference(self, prepared: Prepared) -> tuple[Mapping[str, Tensor] | None, Any]:
        """The reference's measures where the loss asks for them, and the inputs, with what they keep of the reference."""
        inputs, drift = prepared.inputs, "drift" in self.objective.measures
        if not self.objective.needs_reference:
            return None, inputs
        if prepared.reference is not None and not drift and self.moving is None:
            return prepared.reference, inputs
        who = self.policy.reference() if self.moving is None else self.moving.reference(self.parameters, self.bare)
        with who as network, self.accelerator.autocast():
            measured: tuple[Mapping[str, Tensor], Any] = inputs.refer(network, drift=drift)
        return measured

    @property
    def bare(self) -> nn.Module:
        """The network without the wrapper that synchronises gradients."""
        module: nn.Module = self.accelerator.unwrap_model(self.network)
        return module

    def _gather(self, values: Tensor) -> Tensor:
        """Of all processes, this one's first."""
        if self.accelerator.num_processes == 1:
            return values
        gathered: Tensor = self.accelerator.gather(values)
        return gathered.roll(-self.accelerator.process_index * len(values), 0)

    def _stop_unless_finite(self, finite: list[tuple[Tensor, Sequence[str]]], norm: Tensor) -> bool:
        """Stop before the optimiser has touched a weight; the one host synchronisation of a step.

        Returns: whether the step is taken. Loss scaling overflows by design, and skips the step.
        """
        fine = torch.stack([torch.stack([ok.all() for ok, _ in finite]).all(), torch.isfinite(norm)]).float()
        if self.accelerator.num_processes > 1:
            fine = self.accelerator.reduce(fine, reduction="mean")
        losses_fine, norm_fine = (bool(value == 1) for value in fine.tolist())
        if losses_fine and (norm_fine or self.accelerator.scaler is not None):
            return norm_fine
        bad = [name for ok, ids in finite for good, name in zip(ok.tolist(), ids, strict=True) if not good]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            bad = gather_object(bad)
        what = f"the loss is NaN or infinite for {', '.join(bad[:8])}" if bad else "the gradient is NaN or infinite"
        last = checkpoints.latest(self.output)
        remedy = f"The last checkpoint is {last}." if last else "There is no checkpoint yet."
        raise UserError(
            f"step {self.step + 1}: {what}. {remedy} Look at these samples; try a smaller learning_rate or beta, "
            "training.mixed_precision bf16 instead of fp16."
        )

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """`checkpoint-N`, whole or absent, written by all processes together."""
        from accelerate.utils import broadcast_object_list

        main = self.accelerator.is_main_process
        manager: Any = checkpoints.write_folder(self.output / f"checkpoint-{self.step}") if main else nullcontext(None)
        with manager as folder:
            path = broadcast_object_list([str(folder)])[0]
            self.accelerator.save_state(path)
            if main:
                checkpoints.write_state(Path(path), {"step": self.step, "config": self.config, **self._identity()})
            self.accelerator.wait_for_everyone()
        if main:
            checkpoints.rotate(self.output, self.training.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of the same run.

        Raises:
            UserError: the checkpoint is of another config, dataset or batch.
        """
        checkpoints.check_complete(checkpoint)
        state = checkpoints.read_state(checkpoint)
        changed = changed_keys(state["config"], self.config)
        for name, now in self._identity().items():
            if state.get(name) != now:
                changed.append(f"{name}: was {state.get(name)}, is now {now}")
        if changed:
            raise UserError(
                f"{checkpoint}: is of another run ({'; '.join(changed[:6])}). Resume with the same config, data and effective "
                "batch, or start a new run in another output folder."
            )
        self.accelerator.load_state(str(checkpoint))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # read back on the CPU
        self.step = int(state["step"])
        if self.accelerator.is_main_process:
            metrics.forget_after(self.output / METRICS, self.step)
            checkpoints.remove_after(self.output, self.step)
        self.accelerator.wait_for_everyone()
        logger.info("resumed from %s", checkpoint)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it share beside the config."""
        return {"examples": self.order.num_examples, "per_step": self.order.per_step, "data": self.data}

    def _save_trainable(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        from safetensors.torch import save_file

        weights.clear()
        if self.accelerator.is_main_process:
            # Channels-last weights are not contiguous, which safetensors demands.
            save_file({name: value.contiguous() for name, value in self._trainable().items()}, Path(folder) / TRAINABLE)

    def _load_trainable(self, models: list[nn.Module], folder: str) -> None:
        from safetensors.torch import load_file

        models.clear()
        saved = load_file(Path(folder) / TRAINABLE)
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                parameter.copy_(saved[name])

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.bare.named_parameters() if p.requires_grad}

    # --- reporting ------------------------------------------------------------------------------------------------

    def log(self) -> dict[str, float]:
        """Write the metrics since the last call; the one collective and copy to the host they cost."""
        table = metrics.table(self.sums)
        if self.accelerator.num_processes > 1:
            table = self.accelerator.reduce(table, reduction="sum")
        values = metrics.averages(self.sums, table.tolist())
        before, then = self.since
        self.sums, self.since = {}, (self.step, time.perf_counter())
        seconds = self.since[1] - then
        values["learning_rate"] = self.optimiser.param_groups[0]["lr"]
        values["epoch"] = self.step * self.order.per_step / self.order.num_examples
        values["throughput/examples_per_s"] = (self.step - before) * self.order.per_step / seconds
        values["memory/peak_gb"] = metrics.peak_memory()
        beta = self.objective.beta()
        if beta is not None:
            values["dpo/beta"] = beta
        if self.accelerator.is_main_process:
            with (self.output / METRICS).open("a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.accelerator.log(values, step=self.step)
        return values

    def validate(self, folder: Path) -> None:
        """Samples of the weights that would be saved now."""
        if self.accelerator.is_main_process:
            with self._averaged():
                self.policy.validate(folder)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """The final weights; with a moving average that average, and the last weights in `raw/`."""
        if self.accelerator.is_main_process:
            if self.ema is not None:
                self.policy.save(self.output / "raw")
            with self._averaged():
                self.policy.save(self.output)
        self.accelerator.wait_for_everyone()

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.ema is None else _Averaged(self.ema, self.parameters)


class _Averaged(AbstractContextManager[None]):
    """The moving average in place of the weights, for the length of a block."""

    def __init__(self, ema: Any, parameters: list[nn.Parameter]) -> None:
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)

    def __exit__(self, *exception: object) -> None:
        self.ema.restore(self.parameters)


def fit(
    policy: Policy,
    objective: Objective,
    stream: Stream,
    training: Training,
    *,
    accelerator: Any,
    num_examples: int,
    seed: int,
    output: Path,
    config: Mapping[str, Any],
    data: str = "",
    resume: Path | None = None,
) -> Path:
    """Train the policy; returns the output folder with the final weights.

    Args:
        policy: an opened adapter.
        objective: the loss.
        stream: an opened source.
        training: lengths, sizes, precision.
        accelerator: from `start`.
        num_examples: of the dataset, which decides epochs and order.
        seed: of the order of the examples, and of dropout.
        output: folder for checkpoints, metrics and the final weights.
        config: the resolved config; a checkpoint of another config is not resumed.
        data: fingerprint of the examples; nor is a checkpoint of other data.
        resume: a checkpoint folder to go on from.
    Raises:
        UserError: the loss or gradient is not finite, or the checkpoint is of another run.
    """
    order = Order(
        num_examples=num_examples,
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        seed=seed,
        num_processes=accelerator.num_processes,
        process=accelerator.process_index,
        groups=getattr(stream, "groups", ()),
        mix=getattr(stream, "mix", None),
    )
    total = training.num_steps(num_examples, order.per_step)
    torch.manual_seed(seed + accelerator.process_index)  # dropout; every other draw has a generator of its own
    check_dropout(policy.network, training)
    run = Run(
        accelerator=accelerator,
        policy=policy,
        objective=objective,
        training=training,
        order=order,
        output=output,
        config=config,
        data=data,
        total=total,
    )
    if hasattr(stream, "state_dict"):
        accelerator.register_for_checkpointing(stream)
    if resume is not None:
        run.resume(resume)
    if training.trackers:
        where = {"wandb": {"dir": str(output)}}
        accelerator.init_trackers("mmalign", config=flat_settings(config), init_kwargs=where)
    _steps(run, stream)
    if training.checkpoint_every:
        run.save_checkpoint()
    run.save()
    run.validate(run.output / "validation" / f"step-{run.step}")  # last: a fault here costs no weights
    accelerator.end_training()
    return output


def _steps(run: Run, stream: Stream) -> None:
    from tqdm import tqdm

    training = run.training
    batches = iter(stream.batches(run.order, run.step, run.total))
    run.network.train()
    run.since = (run.step, time.perf_counter())
    bar = tqdm(total=run.total, initial=run.step, desc="train", disable=not run.accelerator.is_main_process)
    with bar:
        while run.step < run.total:
            run.take_step(next(batches) for _ in range(training.accumulation))
            bar.update()
            last = run.step == run.total
            if last or run.step % training.log_every == 0:
                bar.set_postfix_str(_postfix(run.log()))
            start = time.perf_counter()
            # Before the checkpoint, so that a run killed in between makes these samples again.
            if not last and training.validate_every and run.step % training.validate_every == 0:
                run.validate(run.output / "validation" / f"step-{run.step}")
            if not last and training.checkpoint_every and run.step % training.checkpoint_every == 0:
                run.save_checkpoint()
            run.since = (run.since[0], run.since[1] + time.perf_counter() - start)  # not counted as throughput


def _postfix(values: Mapping[str, float]) -> str:
    shown = [f"loss {values['loss']:.4f}"]
    if "rewards/accuracies" in values:
        shown.append(f"accuracy {values['rewards/accuracies']:.2f}")
    return ", ".join([*shown, f"{values['throughput/examples_per_s']:.2g} examples/s", f"{values['memory/peak_gb']:.1f} GB"])
