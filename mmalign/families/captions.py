"""Caption features of different lengths as tensors of one shape, and back: what varies in length can be cached and batched."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mmalign.errors import UserError


def padded(
    captions: Sequence[Float[Tensor, "_ dim"]], length: int
) -> tuple[Float[Tensor, "n {length} dim"], Float[Tensor, "n {length}"]]:
    """Captions with zeros behind them, and a mask: 1 for a token, 0 for padding.

    Args:
        length: in tokens, of the longest caption that the family takes.
    Raises:
        UserError: a longer caption.
    """
    longest = max(len(caption) for caption in captions)
    if longest > length:
        raise UserError(f"prompt: got {longest} tokens, want at most {length}. Shorten the prompt.")
    embeds = torch.stack([torch.nn.functional.pad(caption, (0, 0, 0, length - len(caption))) for caption in captions])
    counts = torch.tensor([len(caption) for caption in captions], device=embeds.device)
    return embeds, (torch.arange(length, device=embeds.device) < counts[:, None]).float()


def lengths(mask: Shaped[Tensor, "n length"]) -> list[int]:
    """Tokens of each caption. The host waits for the device, once."""
    counts: list[int] = mask.bool().sum(dim=1).tolist()
    return counts


def trimmed(
    embeds: Float[Tensor, "n length dim"], mask: Shaped[Tensor, "n length"]
) -> tuple[Float[Tensor, "n longest dim"], Shaped[Tensor, "n longest"] | None]:
    """Captions without the padding that all of them have, and their mask; no mask where none is padded any more."""
    counts = lengths(mask)
    longest = max(counts)
    return embeds[:, :longest], None if min(counts) == longest else mask[:, :longest].bool()
