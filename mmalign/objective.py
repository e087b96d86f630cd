"""A weighted sum of losses, its demands on the data, and the only state a loss may have: an automatic beta, and what its
statistics remember of earlier batches.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import UserError
from mmalign.losses import LOSSES, MEASURES, OF_TOKENS, OF_VARIANT, STATISTICS, PreferenceLoss, of_differences

OF_VIEWS = ("labels", "scores", "prob", "margin", "weight", "beta_scale")  # side data that a view gives; adapters give others
REFERENCE = "reference_"  # before the name of a measure: the reference's
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AutoBeta:
    """`beta: auto`: beta follows the data so that the typical pair has a given gradient factor sigma(-margin).

    beta = -logit(target) / EMA(mean |delta|),  delta = log-ratio margin of the pair in nats

    Source: the auto-beta of SimpleTuner's flow DPO as described in its documentation; here gathered over processes, and with
        the beta of this project's convention.
    Args:
        target: gradient factor of a pair with the mean |delta|; below 0.5. Published: 0.2.
        decay: of the moving average, per micro-batch.
        minimum, maximum: bounds of beta; the maximum is used until policy and reference differ.
    """

    target: float = 0.2
    decay: float = 0.9
    minimum: float = 1.0
    maximum: float = 10000.0

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        if not 0.0 < self.target < 0.5:
            raise ValueError(f"target: got {self.target}, want a gradient factor between 0 and 0.5.")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay: got {self.decay}, want at least 0 and below 1.")
        if not 0.0 < self.minimum <= self.maximum:
            raise ValueError(f"minimum: got {self.minimum}, want a positive number up to maximum ({self.maximum}).")
        if math.isinf(self.maximum):
            raise ValueError(f"maximum: got {self.maximum}, want a finite number.")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss of the sum: a function, its settings, and its share."""

    name: str
    loss: Callable[..., PreferenceLoss]
    settings: Mapping[str, Any]
    weight: float = 1.0

    @property
    def data(self) -> dict[str, bool]:
        """The positional parameters that its variant takes: name -> whether it must be there."""
        parameters = inspect.signature(self.loss).parameters.values()
        variants = OF_VARIANT.get(self.name, {}).items()
        needless = {name for variant, names in variants if self.settings.get("variant") != variant for name in names}
        return {
            p.name: p.default is inspect.Parameter.empty
            for p in parameters
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in needless
        }

    @property
    def num_candidates(self) -> int | None:
        """The k that the signature demands (`"batch 2"`), or None for any."""
        return self.columns("policy") or self.columns("joint") or self.columns("anchored")

    def columns(self, name: str) -> int | None:
        """How many columns the signature demands of a measure, or None for any number."""
        parameters = inspect.signature(self.loss, eval_str=True).parameters
        annotation = parameters[name].annotation if name in parameters else None
        shapes = [one.dim_str for one in (annotation, *get_args(annotation)) if hasattr(one, "dim_str")]
        last = (shapes or [""])[0].split()[-1:]
        return int(last[0]) if last and last[0].isdigit() else None


class Objective:
    """The loss of a run: `(policy, reference, side data) -> PreferenceLoss`; the rewards are the first term's."""

    def __init__(self, terms: Sequence[Term], auto_beta: AutoBeta | None = None) -> None:
        """Args:
        terms: at least one loss; their sum, weighted, is the objective.
        auto_beta: how `beta: auto` is found.
        """
        self.terms = tuple(terms)
        self.auto_beta = auto_beta or AutoBeta()
        self.mean_abs_delta = 0.0
        self.memory: dict[str, Float[Tensor, " 2"]] = {}  # of statistics: their value, and of how many values it is the mean

    @property
    def needs_reference(self) -> bool:
        """Whether any term asks for the reference's logps, for another measure of it, or for what is taken from both."""
        names = {name for term in self.terms for name in term.data}
        taken = {"drift", *STATISTICS}
        return any(name == "reference" or name.startswith(REFERENCE) or name in taken for name in names)

    @property
    def measures(self) -> frozenset[str]:
        """What the likelihood must measure beside the logps."""
        return MEASURES & {name.removeprefix(REFERENCE) for term in self.terms for name in term.data}

    @property
    def of_differences(self) -> bool:
        """Whether the gradients by both logps of a pair are opposite, as all terms see their difference alone."""
        return all(LOSSES.get(term.name) is term.loss and of_differences(term.name, term.settings) for term in self.terms)

    @property
    def of_batches(self) -> tuple[str, ...]:
        """The terms that see several rows at once; a mean that is remembered over batches may grow by one row at a time."""
        remembered = {name for name, one in STATISTICS.items() if one.reduce == "mean" and one.memory is not None}
        return tuple(term.name for term in self.terms if set(term.data) & (set(STATISTICS) - remembered))

    @property
    def asked(self) -> frozenset[str]:
        """Names of everything that any term can use, wherever it comes from."""
        return frozenset(name for term in self.terms for name in term.data)

    @property
    def data(self) -> frozenset[str]:
        """Names of all side data that any term can use."""
        return frozenset(name for term in self.terms for name in term.data if not _measured(name))

    def check(self, side: Collection[str], num_candidates: int) -> None:
        """Refuse data that the losses can't be computed on.

        Raises:
            UserError: a needed name is missing, the number of candidates is not the loss's, or nothing is there for an
                automatic beta to follow.
        """
        passed_over = sorted({"prob", "margin", "weight", "beta_scale"} & set(side) - self.data)
        if passed_over:
            names = ", ".join(term.name for term in self.terms)
            raise UserError(
                f"loss: the data have {' and '.join(passed_over)} (soft ties are prob 0.5), which {names} would pass over. "
                "Choose a loss that takes them (dpo does), data.view.ties: drop, or data without the column."
            )
        for term in self.terms:
            needed = {name for name, required in term.data.items() if required and not _measured(name)}
            missing = sorted(needed - set(side))
            if missing:
                have = ", ".join(sorted({*OF_VIEWS} & set(side))) or "none"
                raise UserError(
                    f"loss.{term.name}: needs the data {', '.join(missing)}, the view gives {have}. "
                    "Choose another data.view (ranked gives scores, pair does with with_scores: true, unpaired gives labels) "
                    "or another loss."
                )
            self._check_beta(term, num_candidates)
            if term.num_candidates not in (None, num_candidates):
                raise UserError(
                    f"loss.{term.name}: got {num_candidates} candidates a prompt, want {term.num_candidates}. "
                    f"Choose another data.view (pair gives 2, ranked all, unpaired and best 1) or another loss."
                )

    def try_out(self, side: Mapping[str, Any], num_candidates: int) -> None:
        """Compute every term once where policy and reference agree: what it refuses is told before anything is loaded.

        Args:
            side: side data of one example.
            num_candidates: k.
        Raises:
            UserError: the loss refuses its settings, or is not finite where policy and reference agree.
        """
        trial = Objective(self.terms, self.auto_beta)  # whose statistics are forgotten
        twice = {name: torch.tensor([value, value], dtype=torch.float32) for name, value in side.items()}
        for term in self.terms:
            names = {name.removeprefix(REFERENCE) for name in term.data if _measured(name)} - set(STATISTICS)
            alike = {name: self._alike(term, name, num_candidates) for name in {"policy", *(names - {"reference"})}}
            try:
                result = term.loss(**trial._arguments(term, alike, alike, twice, _alone, {}))
            except ValueError as fault:
                raise UserError(f"loss.{fault}") from fault
            if not torch.isfinite(result.losses).all():
                raise UserError(
                    f"loss.{term.name}: is not finite where policy and reference agree, with {dict(term.settings)}. "
                    "Correct its settings."
                )

    def try_settings(self) -> None:
        """Compute every term that is ours on made-up data: settings that no data would go with are told with the config.

        Raises:
            UserError: the loss refuses its settings, has an automatic beta without a reference, or its share is negative: it
                would be turned round. All shares are zero.
        """
        if not any(term.weight for term in self.terms):
            raise UserError(f"loss.{self.terms[0].name}.weight: got 0 of all losses, want one of them above zero.")
        for term in self.terms:
            if not (math.isfinite(term.weight) and term.weight >= 0):
                raise UserError(f"loss.{term.name}.weight: got {term.weight}, want zero or more. Correct the weight.")
            self._check_beta(term, term.num_candidates)
            if LOSSES.get(term.name) is term.loss:
                known = {name: required for name, required in term.data.items() if not _measured(name)}
                needed, everything = ({name for name in known if known[name] or more} for more in (False, True))
                counts = (2, 3) if term.num_candidates is None else (term.num_candidates,)
                tries = [(names, k) for k in counts for names in (needed, everything - {"prob", "mask"})]
                faults = list(takewhile(bool, (self._fault_of(term, names, k) for names, k in tries)))
                if len(faults) == len(tries):
                    raise UserError(str(faults[1]))

    @staticmethod
    def _check_beta(term: Term, num_candidates: int | None) -> None:
        """Refuse an automatic beta that has nothing to follow."""
        if term.settings.get("beta") == "auto" and ("reference" not in term.data or num_candidates == 1):
            raise UserError(
                f"loss.{term.name}.beta: got auto, want a number: auto follows the margins of policy against reference "
                "between candidates, which this loss on this view does not have."
            )

    def _fault_of(self, term: Term, names: Collection[str], num_candidates: int) -> UserError | None:
        """What a loss refuses in made-up data with these names, if anything."""
        side = {name: self._made_up(term, name, num_candidates) for name in names}
        try:
            Objective([term], self.auto_beta).try_out(side, num_candidates)
        except UserError as fault:
            return fault
        return None

    def __call__(
        self,
        measured: Mapping[str, Float[Tensor, "batch m"]],
        reference: Mapping[str, Float[Tensor, "batch m"]] | None,
        side: Mapping[str, Tensor],
        gather: Gather | None = None,
    ) -> PreferenceLoss:
        """The weighted sum of the terms' losses.

        Args:
            measured: what the likelihood measured of the policy: `policy`, its logps, and `measures`.
            reference: the same of the reference, where a term asks for it.
            side: side data.
            gather: values with the batch first -> those of all processes, this one's first. None: one process.
        """
        gather = gather or _alone
        self._follow(measured["policy"], reference, gather)
        total: PreferenceLoss | None = None
        told: dict[str, Tensor] = {}  # a statistic that several terms ask for is told, and remembered, once
        for term in self.terms:
            result = term.loss(**self._arguments(term, measured, reference, side, gather, told))
            losses = term.weight * result.losses
            total = (
                PreferenceLoss(losses, result.rewards)
                if total is None
                else PreferenceLoss(total.losses + losses, total.rewards)
            )
        assert total is not None
        return total

    def beta(self) -> float | None:
        """The first term's beta as it stands, None where it has none."""
        return self._settings(self.terms[0]).get("beta")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        memory = {name: value.tolist() for name, value in self.memory.items()}
        return {"mean_abs_delta": self.mean_abs_delta, "memory": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.mean_abs_delta = float(state["mean_abs_delta"])
        self.memory = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["memory"].items()}

    @staticmethod
    def _alike(term: Term, name: str, num_candidates: int) -> Tensor:
        """A measure of two rows, where policy and reference agree."""
        k = term.columns(name) or term.columns(REFERENCE + name) or num_candidates
        return torch.full((2, k, 4) if name in OF_TOKENS else (2, k), -1.0)

    @staticmethod
    def _made_up(term: Term, name: str, num_candidates: int) -> float | tuple[float, ...]:
        """Side data of one example: scores that fall, ones elsewhere."""
        annotation = inspect.signature(term.loss, eval_str=True).parameters[name].annotation
        shapes = [one.dim_str for one in (annotation, *get_args(annotation)) if hasattr(one, "dim_str")]
        axes = (shapes or ["batch"])[0].split()
        if len(axes) < 2:
            return 1.0
        columns = int(axes[-1]) if axes[-1].isdigit() else num_candidates
        falling = tuple(1 - n / columns for n in range(columns))
        return falling if name == "scores" else (1.0,) * columns

    def _settings(self, term: Term) -> dict[str, Any]:
        settings = dict(term.settings)
        if settings.get("beta") == "auto":
            auto = self.auto_beta
            wanted = -math.log(auto.target / (1 - auto.target))
            beta = auto.maximum if self.mean_abs_delta == 0 else wanted / self.mean_abs_delta
            settings["beta"] = min(max(beta, auto.minimum), auto.maximum)
        return settings

    def _arguments(
        self,
        term: Term,
        measured: Mapping[str, Tensor],
        reference: Mapping[str, Tensor] | None,
        side: Mapping[str, Tensor],
        gather: Gather,
        told: dict[str, Tensor],
    ) -> dict[str, Any]:
        arguments = self._settings(term)
        for name in term.data:
            if name in measured:
                arguments[name] = measured[name]
            elif name == "reference":
                arguments[name] = None if reference is None else reference["policy"]
            elif name in STATISTICS and reference is not None:
                if name not in told:
                    told[name] = self._statistic(name, measured, reference, gather)
                arguments[name] = told[name]
            elif name.startswith(REFERENCE) and reference is not None and name.removeprefix(REFERENCE) in reference:
                arguments[name] = reference[name.removeprefix(REFERENCE)]
            elif name in side:
                arguments[name] = side[name]
        return arguments

    def _statistic(self, name: str, measured: Mapping[str, Tensor], reference: Mapping[str, Tensor], gather: Gather) -> Tensor:
        """A statistic of the batches of all processes, mixed with what is remembered of earlier ones; no synchronisation.

        KTO's anchor is taken on mismatched completions where the likelihood measures them.
        """
        statistic = STATISTICS[name]
        which = "mismatched" if name == "anchor" and "mismatched" in measured else "policy"
        values = statistic.values(measured[which].detach(), reference[which].detach())
        if statistic.reduce == "all":
            return gather(values.movedim(1, 0)).movedim(0, 1)
        everyone = gather(values)
        if statistic.reduce == "std" and everyone.numel() < 2:  # one value has no spread: what is remembered stands
            return self.memory[name][0].to(values) if name in self.memory else values.new_zeros(())
        now = everyone.mean() if statistic.reduce == "mean" else everyone.std()
        if statistic.memory is None:
            return now
        pair = torch.stack([now.double(), now.new_tensor(everyone.numel()).double()])
        if name in self.memory:
            old = self.memory[name].to(pair)
            count = old[1] + pair[1]
            share = pair[1] / count if statistic.memory == "running" else 1 - statistic.memory
            pair = torch.stack([old[0] + share * (pair[0] - old[0]), count])
        self.memory[name] = pair
        return pair[0].to(now)

    def _follow(self, policy: Tensor, reference: Mapping[str, Tensor] | None, gather: Gather) -> None:
        """Update the automatic beta; the only device synchronisation of a step, and only with `beta: auto`."""
        if reference is None or all(term.settings.get("beta") != "auto" for term in self.terms):
            return
        ratios = (policy - reference["policy"]).detach()
        now = float(gather((ratios[:, :1] - ratios[:, -1:]).abs().flatten()).mean())
        if math.isfinite(now):
            decay = self.auto_beta.decay if self.mean_abs_delta > 0 else 0.0
            self.mean_abs_delta = decay * self.mean_abs_delta + (1 - decay) * now


def _measured(name: str) -> bool:
    """Whether the likelihood or the objective gives this datum, not the view."""
    return name in {"policy", "reference"} | MEASURES | set(STATISTICS) or name.removeprefix(REFERENCE) in MEASURES


def _alone(values: Tensor) -> Tensor:
    return values
