"""General preference models of texts: embeddings of answers, whose skew score tells how much one is preferred to another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.scorers.conversation import ConversationReader, Prompt, Template, open_reader, padded, told, weights_of

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


@dataclass(frozen=True, kw_only=True)
class PreferenceScorer:
    """A general preference model that compares every text with the same others (see `gpm_reward`)."""

    name: str
    model: Any
    head: EmbeddingHead
    reader: ConversationReader
    opponents: tuple[str, ...]
    batch_size: int
    judges: ClassVar[str] = "texts"

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Mean skew score over the opponents: positive where a text is preferred to them."""
        mine, gate = self._embedded(prompts, texts)
        repeated = [prompt for prompt in prompts for _ in self.opponents]
        theirs = self._embedded(repeated, self.opponents * len(prompts))[0]
        mean = theirs.view(len(prompts), len(self.opponents), -1).mean(1)  # the skew score is linear in the opponent
        blocks = mine[:, 0::2] * mean[:, 1::2] - mine[:, 1::2] * mean[:, 0::2]
        return (blocks if gate is None else blocks * gate).sum(1)

    def _embedded(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        rows = [self.reader(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        embeddings = torch.zeros(len(rows), self.head.shape.dim)
        gates = torch.zeros(len(rows), self.head.shape.dim // 2) if self.head.gate is not None else None
        order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]))
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            ids, mask = (one.to(self.model.device) for one in padded([rows[n][0] for n in group], 0))
            hidden = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
            places = torch.arange(len(group), device=hidden.device)
            prompt_last = torch.tensor([rows[n][1] - 1 for n in group], device=hidden.device)
            embedding, gate = self.head(hidden[places, mask.sum(1) - 1], hidden[places, prompt_last])
            embeddings[group] = embedding.cpu()
            if gates is not None and gate is not None:
                gates[group] = gate.cpu()
        return embeddings, gates


def gpm_reward(
    *,
    model: str,
    opponents: tuple[str, ...],
    template: Template = "always",
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None,
    max_length: int = 4096,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 8,
    device: str = "auto",
) -> PreferenceScorer:
    """How much a general preference model prefers an answer to given ones: mean skew score over the opponents.

    score(y) = mean over opponents o of s(y > o | prompt)

    Preferences may be cyclic, so that there is no score but against someone: the same answers for all.

    Source: Zhang et al. 2024 (GPM), where the others are samples of the policy.
    Args:
        model: the output of a run of `adapter: text_reward` with `head: gpm`.
        opponents: answers that every text is compared with.
        template, chat_template_kwargs, max_length, dtype, batch_size, device: as `text_reward`.
    Raises:
        UserError: no such model, or no opponents.
    """
    from transformers import AutoModel

    if not opponents:
        raise UserError("gpm_reward.opponents: got none, want one or more answers to compare with.")
    folder = weights_of(model)
    head = open_head(Path(folder))
    how: dict[str, Any] = {"template": template, "max_length": max_length, "template_kwargs": chat_template_kwargs}
    reader = open_reader(model, revision=None, **how)
    try:
        network = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError) as fault:
        raise UserError(f"gpm_reward.model: cannot open {model} ({told(fault)}). Name the output of a run.") from fault
    where = torch_device(device)
    return PreferenceScorer(
        name="gpm_reward",
        model=network.to(where).eval().requires_grad_(False),
        head=head.to(where).requires_grad_(False),
        reader=reader,
        opponents=opponents,
        batch_size=batch_size,
    )
