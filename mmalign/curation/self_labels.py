"""SPA: a model labels its own pairs, and knows which of its labels to doubt."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from mmalign.errors import UserError

WINDOW = 50  # margins that the published trainer looks back on


def implicit_rewards(policy: Float[Tensor, "n k"], reference: Float[Tensor, "n k"], beta: float) -> Float[Tensor, "n k"]:
    """Rewards by which a policy judges its own responses: beta (log pi - log pi_ref), summed log-probs in nats.

    Source: SPA (ICLR 2025, arXiv 2406.04412). Published beta: 0.1.
    """
    return beta * (policy - reference)


def confidence_threshold(margins: Sequence[float], quantile: float = 0.1) -> float:
    """The margin below which a label of the model's own is doubted.

    tau = (m_(i) + m_(i+1)) / 2,  m sorted ascending, i = floor(n * quantile) counted from 0

    Source: the SPA trainer, on the last 50 margins: the mean of positions 5 and 6.

    Args:
        margins: of implicit rewards, chosen - rejected, reward units; the last 50 in the published code.
        quantile: share of labels that is doubted. Published: 0.1.

    Raises:
        ValueError: no margins.
        UserError: a quantile outside [0, 1).
    """
    if not margins:
        raise ValueError("confidence_threshold: got no margins, want at least one")
    if not 0 <= quantile < 1:
        raise UserError(f"quantile: got {quantile:g}, want 0 to below 1.")
    ordered = sorted(margins)
    place = int(len(ordered) * quantile)
    return (ordered[place] + ordered[min(place + 1, len(ordered) - 1)]) / 2


def label_probs(margins: Sequence[float], threshold: float, *, smoothing: float = 0.1) -> list[float]:
    """P(label is right) of each pair: 1 above the threshold, 1 - smoothing where the model itself is in doubt.

    Source: SPA, noise-aware preference learning, and label smoothing 0.1 in its published settings.

    Args:
        margins: of implicit rewards, chosen - rejected.
        threshold: of `confidence_threshold`.
        smoothing: 0 to 0.5. The published runs set 0 in the first 20 % of the steps.

    Raises:
        UserError: a smoothing outside [0, 0.5].
    """
    if not 0 <= smoothing <= 0.5:
        raise UserError(f"smoothing: got {smoothing:g}, want 0 to 0.5.")
    return [1.0 if margin > threshold else 1.0 - smoothing for margin in margins]


def decoupled(
    policy: Float[Tensor, "*batch vocab"], reference: Float[Tensor, "*batch vocab"], strength: float
) -> Float[Tensor, "*batch vocab"]:
    """Logits of an imagined better model, by which noise is detected apart from the labels: (1 + l) policy - l reference.

    Source: SPA, de-coupled noise detection. Its public configuration has l = 0, which is off.

    Args:
        policy, reference: next-token logits.
        strength: l, 0 or more.
    """
    return (1 + strength) * policy - strength * reference
