"""A training run as a config, and its parts built from it: what `train` and `prepare` share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from mmalign import checkpoints
from mmalign.adapters import ADAPTERS
from mmalign.config import Choice, Table, read_config, resolved
from mmalign.errors import UserError
from mmalign.importers import IMPORTERS
from mmalign.loss_data import check_extras, check_gaps, without_effect
from mmalign.losses import KNOWN_AS, LOSSES, OF_ERRORS, OF_SCORERS
from mmalign.objective import AutoBeta, Objective, Term
from mmalign.records import SIDE_DEFAULTS, VIEWS, Comparison, Content, Dropped, Example, Examples
from mmalign.sources import SOURCES, Offline, Shape
from mmalign.sources.prepared import check_answers, check_samples
from mmalign.training import Training, changed_keys

logger = logging.getLogger(__name__)

Loss = Annotated[
    Choice, Table(LOSSES, extra={"weight": (float, 1.0)}, widen={"beta": float | Literal["auto"]}, known_as=KNOWN_AS)
]

# What rows may bring that no view's settings tell, each alone.
OF_ROWS: tuple[Mapping[str, Any], ...] = ({}, {"margin": 1.0}, {"prob": 0.5})
# What a source that makes samples of its own wants of the adapter.
MAKES = {"rollouts": check_samples, "replay": check_samples, "online_pairs": check_answers, "self_play": check_answers}
# Adapters of models that make samples -> by loss of scorers, the adapter that trains one of what they make.
SCORERS_OF: dict[str, Mapping[str, str]] = {
    "text": {"bradley_terry": "text_reward", "gpm": "text_reward"},
    "image_text": {},
    "diffusion": {"bradley_terry": "step_reward"},
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which rows, and how the candidates of a row become examples."""

    importer: Annotated[Choice, Table(IMPORTERS)] = field(metadata={"help": "the format, with its path"})
    view: Annotated[Choice, Table(VIEWS)] = field(
        default=Choice(name="pair", target=VIEWS["pair"]), metadata={"help": "candidates of a row -> examples"}
    )
    limit: int | None = field(default=None, metadata={"help": "only the first rows"})
    check_images: int = field(
        default=500, metadata={"help": "images that are decoded before a run begins, to find damaged ones"}
    )

    def __post_init__(self) -> None:
        """Refuse a number without meaning."""
        if self.check_images < 0:
            raise ValueError(f"check_images: got {self.check_images}, want 0 or more.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: got {self.limit}, want 1 or more, or null for all rows.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: adapter, data, source, loss, training."""

    output: Path = field(metadata={"help": "folder for checkpoints, metrics and the tuned weights"})
    seed: int = field(default=0, metadata={"help": "of the order of examples, the noise and the first weights"})
    adapter: Annotated[Choice, Table(ADAPTERS)] = field(metadata={"help": "the modality, with its model"})
    data: Data
    source: Annotated[Choice, Table(SOURCES)] = field(
        default=Choice(name="offline", target=SOURCES["offline"], settings={"num_workers": 0}),
        metadata={"help": "where examples come from"},
    )
    loss: tuple[Loss, ...] = field(metadata={"help": "one loss, or a list of losses with their weights"})
    auto_beta: AutoBeta = field(default=AutoBeta(), metadata={"help": "how `beta: auto` is found"})
    training: Training
    resume: str | None = field(default=None, metadata={"help": "`latest`, or a checkpoint folder of this run"})
    overwrite: bool = field(default=False, metadata={"help": "start again in an output folder that holds a run"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan and stop"})

    def __post_init__(self) -> None:
        """Refuse what only several keys together tell; a run that goes on began by the rules of its time."""
        if not self.loss:
            raise ValueError("loss: got an empty list, want at least one loss.")
        try:
            if self.resume is None:  # else that of a run that has begun, which `find_checkpoint` sees to
                _check_together(self)
        except UserError as fault:
            raise ValueError(str(fault)) from fault
        if getattr(self.source.target, "online", False) and self.training.epochs is not None:
            raise ValueError(
                f"training.epochs: got {self.training.epochs} with source {self.source.name}, whose pairs have no "
                "number of their own. Set training.steps instead, and epochs to null."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, want 0 to {2**32 - 1}.")


def read_run(path: Path) -> TrainConfig:
    """The config of a run that has begun, to examine it or to compare with it; combinations of settings are not refused.

    Its `resume` is set: it is no config of a new run.

    Raises:
        UserError: the file cannot be read, or has settings that are not known.
    """
    return read_config(TrainConfig, path, ["resume=latest"])


def read_examples(data: Data) -> tuple[Examples, str]:
    """The examples of a config, and a line that says how many rows were used, dropped and why.

    Raises:
        UserError: no data there, faulty rows, or none that the view can use.
    """
    imported = data.importer.build()
    rows = imported.dataset
    if data.limit is not None:
        rows = rows.select(range(min(data.limit, len(rows))))
    examples = Examples(rows, partial(data.view.target, **data.view.settings))
    if len({k for k, _ in examples.kinds}) > 1:
        kinds = "; ".join(f"{where}: {k}" for (k, _), where in list(examples.kinds.items())[:4])
        raise UserError(
            f"data: examples of one run must have one number of candidates, got {kinds}. Set data.view.num_candidates, or "
            "filter the rows."
        )
    faults = f"; {len(imported.faults)} faulty rows left out, first: {imported.faults[0]}" if imported.faults else ""
    passed, pairs = "", data.view.settings.get("pairs")
    if pairs == "best_worst" and examples.widest > 2:
        passed = "; of more than 2 candidates the best and the worst alone (data.view.pairs: best_vs_rest, or all)"
    if pairs == "best_vs_rest" and examples.undecided:
        passed = f"; in {examples.undecided} rows others are as good as the best, and above none (data.view.pairs: all)"
    return examples, examples.summary() + passed + faults + imported.rules()


def check_images(examples: Examples, count: int) -> None:
    """Decode the first images, so that a small data set is known to be whole before a run writes anything.

    Raises:
        UserError: a damaged or missing image, with its row.
    """
    checked = 0
    for index in range(len(examples)):
        if checked >= count:
            return
        for sample in examples[index].samples:
            for media in (*sample.prompt.media(), *sample.completion.media()):
                media.inspect()
                checked += 1


def build_objective(config: TrainConfig, examples: Examples) -> Objective:
    """The sum of the config's losses, checked against what the source gives, and tried out.

    Raises:
        UserError: a loss needs data that the view does not give, wants another number of candidates, would pass over soft
            labels or margins, or has a setting that it refuses.
    """
    objective = Objective(_terms(config.loss), config.auto_beta)
    shape = seen_by_losses(config, examples)
    _check_losses(config, shape.num_candidates)
    objective.check(shape.side, shape.num_candidates)
    _check_measures(config, objective, shape.measures)
    objective.try_out(shape.side, shape.num_candidates)
    _check_errors(objective, shape)
    check_gaps(config.loss, examples)
    if isinstance(config.source.build(), Offline):
        check_extras(objective, examples)
    told = without_effect(config.loss, objective, adapter=config.adapter, source=config.source, view=config.data.view)
    for note in told:
        logger.warning("%s", note)
    return objective


def _check_together(config: TrainConfig) -> None:
    """Refuse losses that do not go with their settings, the adapter or the reference, whatever the data."""
    objective = Objective(_terms(config.loss), config.auto_beta)
    _check_scorers(config)
    objective.try_settings()
    if SOURCES.get(config.source.name) is config.source.target and config.source.name in MAKES:
        MAKES[config.source.name](config.adapter.build(), config.source.name)
    _check_losses(config, num_candidates=2)
    _check_measures(config, objective, config.adapter.build().measures)
    _check_reference(config, objective, config.source.build())
    _check_view(config, objective)


def _check_view(config: TrainConfig, objective: Objective) -> None:
    """Refuse losses that the view gives what they want of no row: rows of several sizes are made up for it.

    Views, sources and losses that are not ours, and views that want more of a row than an order, are not tried.
    """
    view, source = config.data.view, config.source
    chosen: list[tuple[Mapping[str, Any], Choice]] = [(VIEWS, view), (SOURCES, source), *((LOSSES, one) for one in config.loss)]
    if any(table.get(one.name) is not one.target for table, one in chosen):
        return
    required = {name for term in objective.terms for name, must in term.data.items() if must}
    brought = {name: 1.0 for name in SIDE_DEFAULTS if name in required}  # by the rows: no view's settings tell
    faults: list[UserError] = []
    for count in (2, view.settings.get("num_candidates") or 3, 1):
        try:
            examples = view.build(_made_up(count, view.settings))
            if isinstance(examples, Dropped):
                continue
            shape = seen_by_losses(config, examples)
            shape = replace(shape, side={**brought, **shape.side})
            objective.check(shape.side, shape.num_candidates)
            _check_errors(objective, shape)
        except UserError as fault:
            faults.append(fault)
            continue
        tried = [_fault_of(objective, {**shape.side, **more}, shape.num_candidates) for more in OF_ROWS]
        if None in tried:
            return
        faults += [fault for fault in tried if fault is not None]
    if faults:
        raise faults[0]


def _fault_of(objective: Objective, side: Mapping[str, Any], num_candidates: int) -> UserError | None:
    try:
        objective.try_out(side, num_candidates)
    except UserError as fault:
        return fault
    return None


def _made_up(count: int, settings: Mapping[str, Any]) -> Comparison:
    """A row of this many answers, the first of which is the best, that a view with these settings can order and weigh."""
    judge, level = settings.get("by", "auto"), settings.get("baseline") or 0.0
    step = (
        settings.get("temperature", 1.0) / count
        if settings.get("baseline") is not None
        else 2 * settings.get("min_gap", 0.0) or 1.0
    )
    ranked = judge == "ranks" and count > 1
    return Comparison(
        id="made-up",
        prompt=Content(text="?"),
        candidates=tuple(Content(text=str(n)) for n in range(count)),
        scores={judge if judge not in ("auto", "ranks") else "score": tuple(level + step * (count - n) for n in range(count))},
        ranks=tuple(float(n + 1) for n in range(count)) if ranked else None,
    )


def _check_errors(objective: Objective, shape: Shape) -> None:
    """Refuse losses of denoising errors where the log-likelihoods are none."""
    wrong = sorted(OF_ERRORS & {term.name for term in objective.terms})
    if wrong and not shape.errors:
        raise UserError(
            f"loss.{wrong[0]}: reads log-likelihoods as denoising errors, which these are not. Choose a loss without a "
            "reference that takes log-probabilities, as simpo, or adapter: diffusion with source: offline."
        )


def _check_scorers(config: TrainConfig) -> None:
    """Refuse losses that train a scorer where no scorer is trained."""
    name = config.adapter.name
    if ADAPTERS.get(name) is not config.adapter.target or name not in SCORERS_OF:
        return
    for loss in config.loss:
        if LOSSES.get(loss.name) is loss.target and loss.name in OF_SCORERS:
            trained = SCORERS_OF[name].get(loss.name)
            remedy = f"want adapter: {trained}. Set it, or choose" if trained else f"which none of adapter {name} is. Choose"
            raise UserError(f"loss.{loss.name}: trains a reward model, {remedy} another loss, as dpo.")


def _check_losses(config: TrainConfig, num_candidates: int) -> None:
    """Ask the adapter, where it has something to say about losses."""
    check = getattr(config.adapter.build(), "check_losses", None)
    if check is not None:
        check(config.loss, num_candidates)


def _check_measures(config: TrainConfig, objective: Objective, known: frozenset[str]) -> None:
    """Refuse losses that ask for more than can be measured."""
    lacking = sorted(objective.measures - known)
    if lacking:
        remedies: Mapping[str, str] = getattr(config.adapter.target, "remedies", {})
        told = [f"{remedies[name]}, or leave" for name in lacking if name in remedies]
        raise UserError(
            f"loss: asks for {' and '.join(lacking)}, which adapter {config.adapter.name} with source {config.source.name} "
            f"does not measure. {told[0] if told else 'Leave'} the loss that needs it out."
        )


def _terms(losses: Sequence[Choice]) -> list[Term]:
    return [Term(name=one.name, loss=one.target, settings=one.settings, weight=one.extra.get("weight", 1.0)) for one in losses]


def seen_by_losses(config: TrainConfig, examples: Sequence[Example]) -> Shape:
    """What the losses will see: what the source makes of the examples, and what the adapter adds."""
    shape: Shape = config.source.build().shape(examples)
    adapter = config.adapter.build()
    if hasattr(adapter, "num_scores"):
        shape = replace(shape, num_candidates=adapter.num_scores(shape.num_candidates))
    ones: dict[str, Any] = {"lengths": (1.0,) * shape.num_candidates, "gold_lengths": (1.0,), "mean_length": 1.0, "draw": 0.5}
    side = {**{name: ones.get(name, (1.0,)) for name in adapter.side}, **shape.side}
    measures = adapter.measures if shape.errors or not adapter.errors else frozenset()
    return replace(shape, side=side, errors=shape.errors and adapter.errors, measures=measures)


def open_policy(config: TrainConfig, examples: Examples, objective: Objective, accelerator: Any, **more: Any) -> Any:
    """The adapter's policy on this process's device.

    Raises:
        UserError: the examples are not of the adapter's kind, or the model cannot be opened.
    """
    adapter = config.adapter.build()
    source = config.source.build()
    source.check(examples, adapter)
    if config.adapter.settings.get("buckets") is not None and not isinstance(source, Offline):
        raise UserError(f"adapter.buckets: got them with source: {config.source.name}, want source: offline. Set it to null.")
    policy = adapter.open(
        device=accelerator.device,
        mixed_precision=accelerator.mixed_precision,
        seed=config.seed,
        num_candidates=source.shape(examples).num_candidates,
        needs_reference=objective.needs_reference and config.training.moving_reference is None,
        asked=objective.asked,
        **more,
    )
    if "mean_length" in objective.asked & set(adapter.side):
        policy.survey(examples)
    if objective.of_differences and hasattr(policy, "oppose"):
        policy.oppose()
    if getattr(adapter, "swaps", False):
        policy.meet(examples)
    return policy


def _check_reference(config: TrainConfig, objective: Objective, source: Any) -> None:
    """Refuse a setting of the reference that nothing would ask for."""
    names = ", ".join(term.name for term in objective.terms)
    if config.training.moving_reference is None and any(term.name == "tr_dpo" for term in objective.terms):
        raise UserError(
            "loss.tr_dpo: is dpo by another name where the reference stays. Set training.moving_reference (published: decay "
            "0.4, every 512), or choose dpo."
        )
    if config.training.moving_reference is not None and not objective.needs_reference:
        raise UserError(f"training.moving_reference: {names} asks for no reference. Set it to null, or choose another loss.")
    settings = config.adapter.settings
    bank = "draws" if "draws" in settings else "cache"  # of texts a cache holds nothing else
    if bank == "cache" and settings.get("cache") is not None and not objective.needs_reference:
        raise UserError(
            f"adapter.cache: got {settings['cache']}, which would hold log-probabilities of the reference, and {names} asks "
            "for none. Set it to null, or choose another loss."
        )
    cached = settings.get("cache") is not None and settings.get(bank) is not None
    unread = config.training.moving_reference is not None or not isinstance(source, Offline)
    if cached and unread and objective.needs_reference:
        what = "a moving reference" if config.training.moving_reference is not None else f"source: {config.source.name}"
        raise UserError(
            f"adapter.{bank}: got {settings[bank]}, a bank of reference logps, with {what}, which cannot use it. Set {bank} to "
            "null."
        )


def check_output(config: TrainConfig) -> None:
    """Refuse to write over a run, or among other files.

    Raises:
        UserError: the output folder holds a run, and neither `resume` nor `overwrite` is set; or it holds something else.
    """
    output = config.output
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file, want a folder. Choose another output.")
    inside = config.resume is not None and (
        config.resume == "latest" or Path(config.resume).parent.resolve() == output.resolve()
    )
    if config.dry_run or inside or not output.exists():
        return
    others = [path.name for path in output.iterdir() if not path.name.startswith(".")]
    ours = (output / "config.yaml").exists() and (output / "environment.json").exists()
    if others and not ours:
        raise UserError(
            f"output: {output} holds other files ({sorted(others)[0]}), want a new or empty folder. Choose another."
        )
    if others and not config.overwrite:
        raise UserError(
            f"output: {output} holds a run already. Go on with resume=latest, choose another output, or set "
            "overwrite=true to start again there."
        )


def find_checkpoint(config: TrainConfig, accelerator: Any) -> Path | None:
    """The checkpoint that `resume` names; None for a new run, or one that was killed before its first checkpoint.

    Before it looks, it clears up what killed runs left in the output folder.

    Raises:
        UserError: there is none, and no run of the same config either.
    """
    if config.resume is None:
        return None
    if accelerator.is_main_process and not config.dry_run:
        checkpoints.remove_leftovers(config.output)
    accelerator.wait_for_everyone()
    found = checkpoints.latest(config.output) if config.resume == "latest" else Path(config.resume)
    begun = config.output / "config.yaml"
    if found is None and begun.exists():
        changed = changed_keys(resolved(read_run(begun)), resolved(config))
        if changed:
            raise UserError(f"{begun}: is of another run ({'; '.join(changed[:6])}). Set overwrite=true instead of resume.")
        _check_together(config)  # it begins by the rules of today
        logger.info("%s holds a run without a checkpoint yet: it starts again", config.output)
        return None
    if found is None or not found.is_dir():
        raise UserError(
            f"resume: got {config.resume}, and {config.output} holds no checkpoint. Leave resume out to start anew, and set "
            "training.checkpoint_every to have checkpoints."
        )
    checkpoints.check_complete(found)
    return found
