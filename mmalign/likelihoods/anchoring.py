"""How much the tokens of an answer hang on its image, as a part of its score."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def anchored_sums(clean: Float[Tensor, " scored"], degraded: Float[Tensor, " scored"], *, best: bool) -> Float[Tensor, ""]:
    """TPO's weights of tokens by how much they hang on the image: sum_t log s_t.

    s_t = sigma(d_t) + 1/2 for the best answer, 3/2 - sigma(d_t) for others,  d_t = z_t(y_t | image) - z_t(y_t | degraded)

    Source: arXiv 2412.14487; alibaba/TPO. The gradient flows through s.
    Args:
        clean, degraded: logits of the target tokens under the image and under the degraded one.
        best: whether the answer is the best of its row.
    Raises:
        ValueError: different numbers of tokens.
    """
    if len(clean) != len(degraded):
        raise ValueError(f"anchored: got {len(clean)} tokens and {len(degraded)} under the degraded image, want the same ones.")
    share: Tensor = torch.sigmoid(clean - degraded)
    return (share + 0.5 if best else 1.5 - share).log().sum()
