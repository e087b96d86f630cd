"""What losses want of the rows that no single row tells, checked before a run; and settings that would do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.adapters.image_text import OF_DEGRADED
from mmalign.adapters.text_policy import EXTRAS
from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.losses import LOSSES
from mmalign.objective import Objective
from mmalign.records import Examples

# Losses whose method is in the pairs that a source makes: loss -> (source, the plain loss for given pairs).
OF_SOURCES = {"spo": ("rollouts", "dpo"), "dro": ("replay", "hinge")}


def check_gaps(losses: Sequence[Choice], examples: Examples) -> None:
    """Refuse gaps below zero where a loss takes their logarithm.

    Raises:
        UserError: says how many there are, and where the first is.
    """
    if examples.against and any(loss.target is LOSSES["odpo"] for loss in losses):
        number = f"{examples.against} of {len(examples)} examples (first: {examples.first_against})"
        raise UserError(
            f"loss.odpo: {number} have a chosen answer that is scored below the rejected one, of whose gap there is no "
            "logarithm. Leave them out with "
            "data.view.margin: gap, or let the scores order the pairs (data.view.by: their name)."
        )


def check_extras(objective: Objective, examples: Examples) -> None:
    """Refuse further completions that some examples lack: the run would stop at the first of them.

    Raises:
        UserError: names the row of the first one.
    """
    for name in sorted(objective.measures & set(EXTRAS)):
        if lacking := len(examples) - examples.extras[name]:
            raise UserError(
                f"{examples.first_lacking(name)}: has no {name}, which the loss asks for, as {lacking} of {len(examples)} "
                "examples. Add it, or filter the rows."
            )


def without_effect(
    losses: Sequence[Choice], objective: Objective, *, adapter: Choice, source: Choice, view: Choice
) -> list[str]:
    """Settings that the losses pass over, and losses that want one to be what they are called."""
    told, settings = [], adapter.settings
    names = {loss.name for loss in losses}
    if "ddpo" in names and settings.get("token_weights", ()) is None:
        told.append("loss ddpo is dpo where all tokens weigh alike. Set adapter.token_weights: changed_segments (gamma: 5).")
    if settings.get("degradation") is not None and not objective.measures & OF_DEGRADED:
        told.append(
            f"adapter.degradation: got {settings['degradation'].name}, which no loss asks for ({', '.join(sorted(names))}). "
            "Set it to null, or add a loss that does, as mdpo."
        )
    for loss, (wanted, plain) in OF_SOURCES.items():
        if loss in names and source.name == "offline":
            told.append(
                f"loss {loss} on given pairs is not the method of that name, whose pairs the policy makes. "
                f"Set source: {wanted} (with adapter diffusion), or take loss {plain}."
            )
    if "gpo" in names and view.name == "ranked" and not view.settings.get("raw_scores"):
        told.append(
            "loss gpo: the scores of data.view ranked are 0 to 1, and gpo wants them below zero where a candidate is not "
            "preferred. Set data.view.raw_scores: true on mean skew scores (scorer gpm_reward), or take sppo with target: "
            "scores."
        )
    return told
