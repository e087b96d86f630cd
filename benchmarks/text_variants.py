"""The two sides of the text comparison: a step of TRL's DPOTrainer, and the step of mmalign."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusion_variants import answer_of, cycle
from measuring import Answer, GateError
from text_toy import rows_of
from torch import Tensor

from mmalign.adapters.options import Lora
from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_cache import ReferenceBank
from mmalign.adapters.text_policy import TextPolicy
from mmalign.config import Choice
from mmalign.loop import Run  # the micro step and the optimiser step of `fit`, without its log and checkpoints
from mmalign.losses import LOSSES
from mmalign.objective import Objective, Term
from mmalign.optimisers import OPTIMISERS
from mmalign.records import Example
from mmalign.sources import Order
from mmalign.training import Training, start

# Published: 0.1, with which the rounding of a float32 sum of a thousand nats (1e-4) is too much for the gate.
# Beta costs no time; the policy is moved the farther.
BETA = 0.02
DISTANCE = 0.05  # of the policy from its reference, in standard deviations of each tensor
LORA_DISTANCE = 0.2  # the same of low-rank weights, in their own units
LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0
RANK = 8
SEED = 0


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """TRL sends only the answers' positions through the output layer, as it does on CUDA; on a CPU it sends all.

    That is decided by one function, under the name by which `trl.trainer.utils` knows it. The kernel asks under its own and
    goes on in torch.
    """
    from trl.trainer import utils

    before = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = before


def open_trainer(folder: Path, examples: Sequence[Example], work: Path, *, lora: bool) -> Any:
    """TRL's trainer on a model folder: float32, no checkpointing (TRL's default is on), no truncation."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
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
    low_rank = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    dataset = Dataset.from_list(rows_of(examples))
    trainer = DPOTrainer(model=str(folder), args=config, train_dataset=dataset, peft_config=low_rank)
    trainer.create_optimizer()
    return trainer


def trl_batches(trainer: Any, rows: Sequence[Any], batch_size: int) -> list[dict[str, Tensor]]:
    """What TRL's collator makes of its own tokens, with the reference's log-probabilities as its precomputation stores them."""
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    batches = [trainer.data_collator(group) for group in groups]
    with as_on_cuda():
        for batch in batches:
            chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
            batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return batches


class TrlStep:
    """`training_step` of TRL's DPOTrainer, then clipping and the optimiser, as transformers' Trainer calls them.

    What the Trainer does around that (callbacks, its own log, the loader) is left out.
    """

    def __init__(
        self,
        trainer: Any,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        beta: float,
        compact: bool,
        cached: bool,
        accumulation: int,
    ) -> None:
        """Args:
        trainer: opened; variants may share it.
        batches: of `trl_batches`.
        beta: of DPO.
        compact: whether the output layer sees what it sees on CUDA.
        cached: whether the reference's log-probabilities are taken from the batches.
        accumulation: micro-batches a step.
        """
        self.trainer, self.compact, self.cached = trainer, compact, cached
        self.batches = cycle(batches)
        self.accumulation = accumulation
        self.beta, self.loss = beta, 0.0

    def micro_step(self) -> None:
        """Gradients of the next micro-batch, which stay."""
        batch, trainer = dict(next(self.batches)), self.trainer
        if not self.cached:
            batch = {name: value for name, value in batch.items() if not name.startswith("ref_")}
        trainer.precompute_ref_logps, trainer.beta = self.cached, self.beta
        trainer.current_gradient_accumulation_steps = self.accumulation
        with as_on_cuda() if self.compact else contextlib.nullcontext():
            self.loss = trainer.training_step(trainer.model, batch)

    def taken(self) -> Answer:
        """Loss and gradients of the last micro-batch, which are taken away."""
        loss = float(self.loss) * self.accumulation
        return answer_of(loss, {plain_name(name): p for name, p in self.trained().items()})

    def step(self) -> None:
        """One optimiser step."""
        for _ in range(self.accumulation):
            self.micro_step()
        self.trainer.accelerator.clip_grad_norm_(self.trainer.model.parameters(), MAX_GRAD_NORM)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()

    def trained(self) -> dict[str, Any]:
        """The trained parameters."""
        return {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}


class OurTextStep:
    """mmalign's own step: `policy.prepare`, then `micro_step` and `take_step` of the training loop."""

    def __init__(self, run: Run, batches: Sequence[Any], *, cache: ReferenceBank | None) -> None:
        """Args:
        run: of the policy; variants may share it.
        batches: collated micro-batches.
        cache: of the reference's log-probabilities; None: a reference pass each micro-step.
        """
        self.run, self.cache = run, cache
        self.policy: Any = run.policy
        self.batches = cycle(batches)

    def micro_step(self) -> None:
        """Gradients of the next micro-batch, which stay."""
        self.run.sums = {}
        self.run.micro_step(self._prepared(), sync=True)

    def taken(self) -> Answer:
        """Loss and gradients of the last micro-batch, which are taken away."""
        total, count = self.run.sums["loss"]
        parameters = {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}
        return answer_of(float(total / count), parameters)

    def step(self) -> None:
        """One optimiser step."""
        self.run.take_step(self._prepared() for _ in range(self.run.training.accumulation))

    def _prepared(self) -> Any:
        self.policy.cache = self.cache
        return self.policy.prepare(next(self.batches))


def open_ours(folder: Path, *, lora: bool, cache: Path | None = None, caching: int | None = None) -> TextPolicy:
    """Open the policy as `mmalign train` does it; with `caching` as `mmalign prepare` does it."""
    adapter = TextAdapter(
        model=str(folder),
        max_prompt_length=None,
        max_response_length=None,
        lora=Lora(rank=RANK) if lora else None,
        cache=None if cache is None else str(cache),
    )
    return adapter.open(seed=SEED, needs_reference=True, caching=caching)


def filled_cache(folder: Path, examples: Sequence[Example], cache: Path) -> ReferenceBank:
    """Reference log-probabilities of all pairs, as `mmalign prepare` writes them and a run reads them."""
    policy = open_ours(folder, lora=True, cache=cache, caching=0)
    assert policy.cache is not None
    policy.cache.fill_references(policy, examples, 2, contextlib.nullcontext)
    policy.cache.close()
    read = open_ours(folder, lora=True, cache=cache).cache
    assert read is not None
    return read


DPO = Term(name="dpo", loss=LOSSES["dpo"], settings={"beta": BETA})


def our_run(policy: TextPolicy, work: Path, *, num_examples: int, batch_size: int, accumulation: int, term: Term = DPO) -> Run:
    """The run of a policy that was opened."""
    optimiser = Choice(name="adamw", target=OPTIMISERS["adamw"], settings={"learning_rate": LEARNING_RATE})
    training = Training(
        steps=1_000_000,
        batch_size=batch_size,
        accumulation=accumulation,
        optimiser=optimiser,
        schedule="constant",
        max_grad_norm=MAX_GRAD_NORM,
        mixed_precision="no",
    )
    objective = Objective([term])
    if objective.of_differences:  # as `experiment.open_policy` does
        policy.oppose()
    run = Run(
        accelerator=start(training, work),
        policy=policy,
        objective=objective,
        training=training,
        order=Order(num_examples=num_examples, batch_size=batch_size, accumulation=accumulation, seed=SEED),
        output=work,
        config={},
        total=1_000_000,
    )
    run.network.train()
    return run


def our_batches(policy: TextPolicy, examples: Sequence[Example], batch_size: int) -> list[Any]:
    """Collated micro-batches."""
    groups = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    return [policy.collate([policy.item(one, 0) for one in group]) for group in groups]


def move_away(policy: TextPolicy) -> None:
    """Move the policy a little from its reference, always by the same: at equality every loss is log 2, and proves little."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            lora = policy.settings.lora is not None
            distance = LORA_DISTANCE if lora else DISTANCE * float(parameter.std(correction=0))
            parameter += distance * torch.randn(parameter.shape, generator=generator)


def copy_weights(policy: TextPolicy, trainer: Any) -> None:
    """Give TRL's policy the weights of ours."""
    own = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(own[plain_name(name)])


def check_tokens(trainer: Any, batches: Sequence[Any]) -> None:
    """Both sides must have read the same tokens.

    Raises:
        GateError: they have not.
    """
    encoded = [one for batch in batches for one in batch["encoded"]]
    for number, (row, one) in enumerate(zip(trainer.train_dataset, encoded, strict=True)):
        theirs = [row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")]
        ours = [[*one.contexts[0], *continuation] for continuation in one.continuations]
        if theirs != ours or len(one.contexts) != 1 or any(one.given):
            raise GateError(f"pair {number}: got other tokens than TRL's. Nothing is timed.")


def plain_name(name: str) -> str:
    """A parameter's name without what PEFT puts before it."""
    return name.removeprefix("base_model.model.")
