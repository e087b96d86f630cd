"""Side data of examples as tensors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import UserError
from mmalign.records import SIDE_DEFAULTS


def side_tensors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Side data of a batch; what only some examples have takes its neutral value in the others.

    Raises:
        UserError: only some examples have a value that has no neutral one.
    """
    names = sorted({name for row in rows for name in row})
    for name in names:
        if name not in SIDE_DEFAULTS and any(name not in row for row in rows):
            raise UserError(f"data: only some examples have {name}, want all or none. Complete or filter the rows.")
    return {name: torch.tensor([row.get(name, SIDE_DEFAULTS.get(name)) for row in rows]) for name in names}
