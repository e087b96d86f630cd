"""Preference losses: pure functions of `(batch, k)` log-likelihoods.

What stands before the star of a signature is data, which the loop supplies by name; what stands after it are settings.
"""

from __future__ import annotations

from collections.abc import Callable

from mmalign.losses.denoising import dro, mapo, spo
from mmalign.losses.links import PreferenceLoss
from mmalign.losses.listwise import rank_dpo
from mmalign.losses.pairwise import bradley_terry, dpo, hinge, ipo, robust
from mmalign.losses.pointwise import batch_mean_ratio, kto, output_anchor, sft

__all__ = ["LOSSES", "MEASURES", "STATISTICS", "PreferenceLoss"]

LOSSES: dict[str, Callable[..., PreferenceLoss]] = {
    "dpo": dpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "dro": dro,
    "mapo": mapo,
    "rank_dpo": rank_dpo,
    "spo": spo,
    "bradley_terry": bradley_terry,
    "kto": kto,
    "sft": sft,
    "output_anchor": output_anchor,
}

# Data that are means over the batch of all processes: name -> the values of (policy, reference) to average.
STATISTICS = {"anchor": batch_mean_ratio}

# Data that the likelihood measures in the same pass as the logps.
MEASURES = frozenset({"drift"})
