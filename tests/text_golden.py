"""Numbers of text losses that published code computed (tests/golden/README.md), and how they are compared."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden" / "text"


@cache
def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def case(name: str, of: str) -> dict[str, Tensor]:
    """The arrays of one case of a file, without its name."""
    return {key.removeprefix(f"{of}/"): value for key, value in arrays(name).items() if key.startswith(f"{of}/")}


def assert_equal(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Relative to each element, and to the largest one where cancellation makes an element tiny."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.detach().abs().max()))


def leaf(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def pairs() -> tuple[Tensor, Tensor]:
    """Summed logps of policy and reference of eight pairs, chosen first."""
    stored = arrays("inputs_seq")
    names = ("chosen_logps", "rejected_logps")
    return tuple(torch.stack([stored[part + name] for name in names], 1) for part in ("", "ref_"))


def pair_lengths() -> Tensor:
    """Numbers of tokens of the eight pairs."""
    stored = arrays("inputs_seq")
    return torch.stack([stored["chosen_len"], stored["rejected_len"]], 1).double()


def lists() -> tuple[Tensor, Tensor, Tensor]:
    """Summed logps of policy and reference, and scores, of four lists of four, best first."""
    stored = arrays("inputs_list")
    return stored["policy_logps"], stored["ref_logps"], stored["scores"]


def token_logps(logits: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Summed logps and lengths of the eight golden completions, `(4, 2)` each, chosen first.

    Args:
        logits: of them, or with `rows` of those numbers of the completions, `(4, number / 4)`.
    """
    stored = arrays("inputs_tok")
    ids, mask = (stored[name][slice(None) if rows is None else rows, 1:] for name in ("input_ids", "completion_mask"))
    scored = logits[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0] * mask
    return tuple(torch.stack(values.sum(1).split(4), 1) for values in (scored, mask.to(logits)))
