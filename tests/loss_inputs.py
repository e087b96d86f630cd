"""Small float64 inputs for any loss of LOSSES."""

import inspect
from typing import Any

import torch
from torch import Tensor

from mmalign.losses import LOSSES, PreferenceLoss

NUM_CANDIDATES = {
    "rank_dpo": 4,
    "lipo": 4,
    "plackett_luce": 4,
    "exo_listwise": 4,
    "gpo": 4,
    "kto": 1,
    "apo_zero_unpaired": 1,
    "gpm": 1,
    "blind_bpo": 3,
    "bpo": 3,
    "symmpo": 3,
    "opa_dpo": 3,
}
# The others are penalties on further measures of the network.
ON_LOGPS = [name for name, loss in LOSSES.items() if "policy" in inspect.signature(loss).parameters]
# Where a loss is trained on its like: images in test_adapter_diffusion.py, texts in test_text_objectives.py.
OF_IMAGES = {"dro", "mapo", "spo", "rank_dpo", "output_anchor"}
OF_SCORES = {"bradley_terry", "gpm"}  # a model's scores, not its logps
OF_A_TEACHER = {"dckd", "adpa"}  # measured by a second model
# Answers to images, measured under other images too (test_losses_multimodal.py), and what needs a third response.
OF_SIGHT = {
    *("image_preference", "mdpo", "re_align", "chip", "svco", "symmpo", "povid", "vdpo", "tpo_visual", "opa_dpo"),
    *("blind_bpo", "bpo"),
}
OF_TEXTS = sorted(LOSSES.keys() - OF_IMAGES - OF_SCORES - OF_A_TEACHER - OF_SIGHT)
# What a loss is given though its signature has a default for it. Without an anchor KTO takes the mean over the batch: the
# rules for single rows are tested with the anchor given. NLL and CPO divide by the length; ODPO and RPO ask for a gap.
GIVEN = {"kto": {"anchor"}, "nll": {"lengths"}, "cpo": {"lengths"}, "odpo": {"scores"}, "rpo": {"scores"}}


def data(name: str, batch: int = 3, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Logps as diffusion makes them (small, negative, close to the reference) and whatever else the loss requires."""
    generator = torch.Generator().manual_seed(seed)
    k = NUM_CANDIDATES.get(name, 2)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    policy = -0.02 - 0.1 * draw(batch, k)
    values = {"policy": policy, "reference": policy + 2e-3 * (draw(batch, k) - 0.5)}
    values["scores"] = draw(batch, k).sort(dim=1, descending=True).values
    values["labels"] = torch.ones(batch, dtype=torch.float64)
    values["anchor"] = torch.tensor(1e-4, dtype=torch.float64)
    values["lengths"] = 5 + torch.arange(batch * k, dtype=torch.float64).reshape(batch, k)
    values["shared"], values["reference_shared"] = 0.6 * policy, 0.6 * values["reference"]
    values["agreement"], values["draw"] = -draw(batch, k), draw(batch)
    values["gap_mean"], values["gap_std"] = torch.tensor([2e-4, 1e-3], dtype=torch.float64)
    values["gold"], values["gold_lengths"] = policy[:, :1] + 0.01, values["lengths"][:, :1]
    reference, two = values["reference"], slice(0, 2)
    others = {"degraded": slice(0, 1), "greedy": slice(0, 1), "crossed": two, "each_degraded": slice(0, k), "anchored": two}
    for place, (measure, columns) in enumerate({**others, "each_absent": two}.items(), 2):
        values[measure] = policy[:, columns] - 0.01 * place
        values[f"reference_{measure}"] = reference[:, columns] - 0.0101 * place
    values["divergence"] = 1e-4 * (1 + torch.arange(batch * k, dtype=torch.float64).reshape(batch, k))
    parameters = inspect.signature(LOSSES[name]).parameters
    wanted = {key for key, one in parameters.items() if one.default is inspect.Parameter.empty} | GIVEN.get(name, set())
    return {key: value.to(dtype) for key, value in values.items() if key in wanted}


def call(name: str, values: dict[str, Any], **settings: Any) -> PreferenceLoss:
    return LOSSES[name](**values, **settings)


def settings_of(name: str) -> dict[str, Any]:
    """Keyword-only parameters and their defaults."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


def swapped(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two candidates of each pair in the other order."""
    return {key: value.flip(1) if value.ndim == 2 else value for key, value in values.items()}


def rows(values: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {key: value[part] if value.ndim else value for key, value in values.items()}


def tensor(*values: Any) -> Tensor:
    """A float64 tensor of these rows or values."""
    return torch.tensor(values, dtype=torch.float64)
