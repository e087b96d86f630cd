"""Preference losses: pure functions of `(batch, k)` log-likelihoods.

What stands before the star of a signature is data, which the loop supplies by name; what stands after it are settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmalign.losses.batchwise import aot, aot_unpaired, beta_dpo
from mmalign.losses.blind import blind_bpo
from mmalign.losses.calibrated import apo_down, apo_zero, cal_dpo, sppo
from mmalign.losses.denoising import dro, mapo, spo
from mmalign.losses.dpo_variants import discopop, dove, dpop, exo, tr_dpo, wpo
from mmalign.losses.graded import odpo, rpo
from mmalign.losses.image_contrasts import svco, symmpo
from mmalign.losses.image_scores import ddpo, mmrlhf, opa_dpo, povid, tpo_visual, vdpo
from mmalign.losses.image_terms import chip, image_preference, mdpo, re_align
from mmalign.losses.lengths import davir_dpo, ld_dpo, length_dpo, ln_dpo
from mmalign.losses.links import PreferenceLoss
from mmalign.losses.listwise import exo_listwise, info_nca, lipo, nca, plackett_luce, rank_dpo
from mmalign.losses.pairwise import dpo, hinge, ipo, robust
from mmalign.losses.pointwise import apo_zero_unpaired, bco, gpo, kto, output_anchor, sft
from mmalign.losses.reference_free import alphapo, asft, cpo, orpo, simpo, slic
from mmalign.losses.reward_models import bradley_terry, gpm
from mmalign.losses.statistics import STATISTICS, Statistic
from mmalign.losses.terms import adpa, chosen_anchor, chosen_guard, dckd, nll, rationale, selm, tpo

__all__ = [
    "KNOWN_AS",
    "LOSSES",
    "MEASURES",
    "OF_DIFFERENCES",
    "OF_ERRORS",
    "OF_SCORERS",
    "OF_TOKENS",
    "OF_VARIANT",
    "STATISTICS",
    "PreferenceLoss",
    "Statistic",
    "of_differences",
]

LOSSES: dict[str, Callable[..., PreferenceLoss]] = {
    "dpo": dpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "tr_dpo": tr_dpo,
    "exo": exo,
    "discopop": discopop,
    "dpop": dpop,
    "wpo": wpo,
    "dove": dove,
    "ln_dpo": ln_dpo,
    "ld_dpo": ld_dpo,
    "davir_dpo": davir_dpo,
    "length_dpo": length_dpo,
    "odpo": odpo,
    "rpo": rpo,
    "slic": slic,
    "simpo": simpo,
    "alphapo": alphapo,
    "cpo": cpo,
    "orpo": orpo,
    "asft": asft,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sppo": sppo,
    "cal_dpo": cal_dpo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "beta_dpo": beta_dpo,
    "dro": dro,
    "mapo": mapo,
    "rank_dpo": rank_dpo,
    "spo": spo,
    "bradley_terry": bradley_terry,
    "gpm": gpm,
    "kto": kto,
    "sft": sft,
    "output_anchor": output_anchor,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
    "gpo": gpo,
    "plackett_luce": plackett_luce,
    "info_nca": info_nca,
    "nca": nca,
    "exo_listwise": exo_listwise,
    "lipo": lipo,
    "nll": nll,
    "chosen_guard": chosen_guard,
    "chosen_anchor": chosen_anchor,
    "rationale": rationale,
    "selm": selm,
    "tpo": tpo,
    "dckd": dckd,
    "adpa": adpa,
    "blind_bpo": blind_bpo,
    "bpo": blind_bpo,
    "image_preference": image_preference,
    "mdpo": mdpo,
    "re_align": re_align,
    "chip": chip,
    "svco": svco,
    "symmpo": symmpo,
    "ddpo": ddpo,
    "mmrlhf": mmrlhf,
    "povid": povid,
    "vdpo": vdpo,
    "tpo_visual": tpo_visual,
    "opa_dpo": opa_dpo,
}

# Names of other libraries (TRL's `loss_type` first) and of papers -> what is written here.
KNOWN_AS = {
    "sigmoid": "dpo",
    "sigmoid_norm": "ln_dpo",
    "exo_pair": "exo",
    "nca_pair": "nca with beta: 0.1 (TRL's default)",
    "bco_pair": "bco with shifted: false",
    "sppo_hard": "sppo with beta: 0.1 (TRL's default; its loss is twice this one)",
    "kto_pair": "kto with data.view: unpaired",
    "dpo_norm": "ln_dpo",
    "cdpo": "dpo with label_smoothing: 0.1 (the probability of a wrong label)",
    "rdpo": "robust (to wrong labels), or length_dpo (R-DPO, against length)",
    "r_dpo": "length_dpo",
    "smaug": "dpop",
    "rso": "hinge",
    "list_mle": "plackett_luce",
    "step_dpo": "dpo with data.view: step",
    "iterative_rpo": "dpo and nll, a list of two losses",
    "mpo": "dpo, bco and nll, a list of losses with their weights",
    **{name: f"dpo with divergence: {name}" for name in ("forward_kl", "reverse_kl", "js", "alpha")},
    "js_divergence": "dpo with divergence: js",
    "alpha_divergence": "dpo with divergence: alpha",
}

# Losses of the log-ratio of one candidate less that of the other, and of nothing else that the logps tell.
OF_DIFFERENCES = frozenset(
    {"dpo", "tr_dpo", "robust", "ipo", "hinge", "exo", "discopop", "odpo", "rpo", "ld_dpo", "aot", "beta_dpo"}
)

# Losses that read logps as -1/2 * mean squared error, and mean nothing on any others.
OF_ERRORS = frozenset({"mapo"})
OF_SCORERS = frozenset({"bradley_terry", "gpm"})  # losses that train a scorer, of which the logps are the scores


def of_differences(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether what both candidates begin with cancels in a loss with these settings, and its gradients by both are opposite."""
    summed = name != "ipo" or settings.get("normalise") == "none"
    return name in OF_DIFFERENCES and summed and settings.get("divergence", "reverse_kl") == "reverse_kl"


# Data that the likelihood measures in the same pass as the logps; the reference's stand under `reference_<name>`.
MEASURES = frozenset(
    {
        "drift",
        "shared",
        "joint",
        "agreement",
        "rationale",
        "exploration",
        "gold",
        "teacher_divergence",
        "advantage",
        "degraded",
        "redrawn",
        "each_degraded",
        "each_absent",
        "crossed",
        "greedy",
        "divergence",
        "anchored",
        "rival",
        "degraded_rival",
        "tokens",
        "each_degraded_tokens",
    }
)
OF_TOKENS = frozenset({"tokens", "each_degraded_tokens"})  # those of them that have one value a token

# Measures that a loss asks for under one of its variants alone, by the loss and the variant.
OF_VARIANT = {
    "opa_dpo": {"released": frozenset(f"{of}{name}" for of in ("", "reference_") for name in OF_TOKENS)},
    "mdpo": {"released": frozenset({"reference_redrawn"})},
    "re_align": {"released": frozenset({"rival", "reference_rival", "degraded_rival", "reference_degraded_rival"})},
}
