"""Rows in which every response has an image of its own, and is also scored under the other's: S-VCO and SymMPO."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from mmalign.losses.links import PreferenceLoss, check_beta, check_candidates, check_not_negative, log_loss, weighted


def svco(
    policy: Float[Tensor, "batch 2"],
    reference: Float[Tensor, "batch 2"],
    crossed: Float[Tensor, "batch 2"],
    reference_crossed: Float[Tensor, "batch 2"],
    each_absent: Float[Tensor, "batch 2"],
    reference_each_absent: Float[Tensor, "batch 2"],
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """S-VCO: each response is to be likelier under its image than without one, and likelier without than under the other's.

    sum over both responses of -log sigma(r_own - r_absent) - log sigma(r_absent - r_crossed),  r = beta * (policy - reference)

    Source: Wu et al. 2025 (S-VCO), with the four betas of the published code equal, as they are in its script. No image means a
        prompt without image and placeholder.
    Args:
        policy, reference: summed logps of two responses, each under its own image (view `crossed`).
        crossed, reference_crossed: each under the other's image.
        each_absent, reference_each_absent: each without an image.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
    Raises:
        ValueError: beta is not positive.
    """
    check_candidates("svco", 2, policy, reference)
    check_beta("svco", beta)
    own = beta * (policy - reference)
    absent = beta * (each_absent - reference_each_absent)
    other = beta * (crossed - reference_crossed)
    losses = (log_loss(own - absent) + log_loss(absent - other)).sum(1)
    return PreferenceLoss(weighted(losses, weight), own.detach())


def symmpo(
    policy: Float[Tensor, "batch 3"],
    reference: Float[Tensor, "batch 3"],
    crossed: Float[Tensor, "batch 2"],
    reference_crossed: Float[Tensor, "batch 2"],
    weight: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    symmetric_weight: float = 0.5,
    regulariser: float = 1e-4,
) -> PreferenceLoss:
    """SymMPO: two similar images, each of whose responses is worse under the other image, by equal margins.

    -log sigma(r_1|1 - r_l|1) - symmetric_weight * [log sigma(beta m_1) + log sigma(beta m_2)]
    - log sigma(r_1|1) - log sigma(r_2|2) + regulariser * (m_1 - m_2)^2
    m_1 = D_1|1 - D_2|1,  m_2 = D_2|2 - D_1|2,  D = policy - reference in nats,  r = beta * D,  a|i: response a under image i

    Source: Liu et al. 2025 (SymMPO, arXiv 2506.11712) and its published code.
    Args:
        policy, reference: summed logps of the first image's response, the second image's, each under its own image, and of the
            rejected response under the first image (view `crossed`).
        crossed, reference_crossed: the first response under the second image, and the second under the first.
        weight: factor of each row's loss.
        beta: reward per nat. Published: 0.1.
        symmetric_weight: the paper's lambda. Published: 0.5.
        regulariser: per square nat. Published: 1e-4.
    Raises:
        ValueError: beta is not positive, or a weight negative.
    """
    check_candidates("symmpo", 3, policy, reference)
    check_beta("symmpo", beta)
    check_not_negative("symmpo", "symmetric_weight", symmetric_weight)
    check_not_negative("symmpo", "regulariser", regulariser)
    own, other = policy - reference, crossed - reference_crossed
    first, second = own[:, 0] - other[:, 1], own[:, 1] - other[:, 0]  # m_1, m_2
    losses = (
        log_loss(beta * (own[:, 0] - own[:, 2]))
        + symmetric_weight * (log_loss(beta * first) + log_loss(beta * second))
        + log_loss(beta * own[:, :2]).sum(1)
        + regulariser * (first - second) ** 2
    )
    return PreferenceLoss(weighted(losses, weight), (beta * own).detach())
