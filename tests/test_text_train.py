"""Every loss for texts in runs of `mmalign train`."""

import math
from pathlib import Path
from typing import Any

import pytest
from loss_inputs import OF_TEXTS
from runs import metrics_of
from text_runs import PAIRS, rows_file, text_weights, train_text

from mmalign.errors import UserError
from mmalign.losses import LOSSES
from mmalign.objective import Objective, Term

LISTS = {"plackett_luce", "lipo", "exo_listwise", "gpo", "info_nca", "nca"}


def needs(name: str) -> dict[str, bool]:
    return Term(name=name, loss=LOSSES[name], settings={}).data


def data_for(name: str) -> dict[str, Any]:
    """Rows that have what a loss needs, and the view of them."""
    wanted = {one for one, required in needs(name).items() if required}
    if "labels" in wanted:
        return {"view": "unpaired"}
    margin = {"margin": 1.5} if name in ("odpo", "rpo") or "margin" in wanted else {}
    extras = {one: " cats" for one in ("rationale", "exploration", "gold") if one in needs(name)}
    paired = name == "mmrlhf"  # a pair with its scores
    ranked = name in LISTS or "scores" in wanted
    rows = [
        {
            "id": str(number),
            "prompt": prompt,
            "candidates": [best, worst, " hello"] if ranked and not paired else [best, worst],
            **({"scores": {"a": [3.0, 1.0, 0.5][: 2 if paired else 3]}} if ranked else {"ranks": [1, 2]}),
            **margin,
            **({"extras": extras} if extras else {}),
        }
        for number, (prompt, best, worst) in enumerate(PAIRS)
    ]
    path = rows_file(rows, f"rows-{name}")
    view = {"name": "pair", "with_scores": True} if paired else {"name": "ranked"} if ranked else "pair"
    return {"importer": {"name": "comparisons", "path": str(path)}, "view": view}


# --- every loss -------------------------------------------------------------------------------------------------------


# The guard is silent where policy and reference agree: test_text_objectives.py tells its gradient elsewhere.
@pytest.mark.parametrize("name", sorted({*OF_TEXTS} - {"chosen_guard"}))
def test_a_loss_trains_the_low_rank_weights(name: str, tmp_path: Path) -> None:
    follows = {"training": {"moving_reference": {"decay": 0.4, "every": 2}}} if name == "tr_dpo" else {}
    output = train_text(tmp_path / "run", loss={"name": name}, data=data_for(name), **follows)
    assert all(math.isfinite(value) for row in metrics_of(output) for value in row.values())
    moved = [float(value.abs().max()) for key, value in text_weights(output).items() if "lora_B" in key]
    assert moved and max(moved) > 0
    referred = Objective([Term(name=name, loss=LOSSES[name], settings={})]).needs_reference
    assert ("logps/ratio_chosen" in metrics_of(output)[0]) == referred


@pytest.mark.parametrize("name", ["dpo", "ld_dpo"])
@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_training_starts_at_ln_2_without_a_margin(name: str, lora: Any, tmp_path: Path) -> None:
    output = train_text(tmp_path / "run", adapter={"lora": lora}, loss={"name": name}, training={"steps": 1})
    first = metrics_of(output)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == 0


# --- KTO's anchor -----------------------------------------------------------------------------------------------------


def test_ktos_anchor_needs_two_rows_in_a_micro_batch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training.batch_size: got 1"):
        train_text(tmp_path / "run", loss={"name": "kto"}, data={"view": "unpaired"}, training={"batch_size": 1})
