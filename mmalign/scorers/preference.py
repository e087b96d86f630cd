"""General preference models of texts: embeddings of answers, whose skew score tells how much one is preferred to another."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmalign.errors import UserError

HEAD_FILES = ("preference_head.json", "preference_head.safetensors")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a head is made of.

    Args:
        width: of the hidden states.
        dim: of an embedding; even.
        prompt_gate: whether the prompt weighs the blocks of two dimensions.
        normalise: divide embeddings by their L2 norm.
    """

    width: int
    dim: int
    prompt_gate: bool = False
    normalise: bool = True


class EmbeddingHead(nn.Module):
    """Hidden states -> preference embeddings, and the weights of their blocks.

    e = W h(answer) [/ |e|],  g = d/2 softmax(V h(prompt) / sqrt(width))

    Source: Zhang et al. 2024 (GPM, arXiv 2410.02197), eq. 4 to 6; the scale of the gate is that of the published training file.
    """

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        """New weights; the global generator is left as it was.

        Args:
            shape: of the head.
            seed: of the weights.
        """
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(shape.width, shape.dim, bias=False)
            self.gate = nn.Linear(shape.width, shape.dim // 2, bias=False) if shape.prompt_gate else None

    def forward(
        self, answer: Float[Tensor, "rows width"], prompt: Float[Tensor, "rows width"]
    ) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows blocks"] | None]:
        """Embeddings, and the blocks' weights or None, in float32.

        Args:
            answer: hidden states at the ends of the answers.
            prompt: the same at the ends of their prompts.
        """
        embedding = self.embed(answer.float())
        if self.shape.normalise:
            embedding = normalize(embedding, dim=-1)
        if self.gate is None:
            return embedding, None
        logits = self.gate(prompt.float()) / self.shape.width**0.5
        return embedding, torch.softmax(logits, -1) * (self.shape.dim // 2)

    def save(self, folder: Path) -> None:
        """Write the head's two files."""
        from safetensors.torch import save_file

        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / HEAD_FILES[1], metadata={"format": "pt"})
        (folder / HEAD_FILES[0]).write_text(json.dumps(asdict(self.shape), indent=2) + "\n", encoding="utf-8")


def open_head(folder: Path) -> EmbeddingHead:
    """A head as `EmbeddingHead.save` wrote it.

    Raises:
        UserError: it is not there, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        head = EmbeddingHead(Shape(**json.loads((folder / HEAD_FILES[0]).read_text(encoding="utf-8"))))
        head.load_state_dict(load_file(folder / HEAD_FILES[1]))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as fault:
        raise UserError(
            f"{folder}: got no preference head ({fault}), want {' and '.join(HEAD_FILES)}. Name the output of a run with "
            "adapter: text_reward and head: gpm."
        ) from fault
    return head.eval()
