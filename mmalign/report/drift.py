"""How a training run moved, read from its metrics."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.report.findings import Curve, TrainingDrift


def training_drift(run: Path) -> TrainingDrift:
    """Implicit-reward accuracy and error drift of a training run, from its metrics.jsonl.

    drift of the chosen (rejected) error = mse/chosen - mse/ref_chosen  (mse/rejected - mse/ref_rejected)

    Raises:
        UserError: no metrics.jsonl there, a line that is no JSON object, or none of the metrics in it.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"run: got {run}, want the output folder of a training run, with metrics.jsonl. Check the path.")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: got no JSON ({error}), want one object a line. Remove the line.") from error
        rows.append(row if isinstance(row, dict) else {})
    drift = TrainingDrift(
        accuracy=_curve(rows, "rewards/accuracies"),
        chosen_error=_curve(rows, "mse/chosen", minus="mse/ref_chosen"),
        rejected_error=_curve(rows, "mse/rejected", minus="mse/ref_rejected"),
    )
    if not drift.named():
        raise UserError(
            f"{path}: got no rewards/accuracies and no mse/*, want at least one. Give the run of a preference loss."
        )
    return drift


def _curve(rows: Sequence[dict[str, Any]], name: str, *, minus: str | None = None) -> Curve | None:
    wanted = [name] if minus is None else [name, minus]
    kept = [(index, row) for index, row in enumerate(rows) if all(isinstance(row.get(key), int | float) for key in wanted)]
    if not kept:
        return None
    return Curve(
        steps=tuple(float(row.get("step", index)) for index, row in kept),
        values=tuple(row[name] - (0.0 if minus is None else row[minus]) for _, row in kept),
    )
