"""Reward models of texts: a causal language model's backbone with a head that judges a text at its last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.errors import UserError
from mmalign.language.opening import without_dropout
from mmalign.language.tiny import TINY, tiny_folder
from mmalign.likelihoods import Texts, padded_texts
from mmalign.losses.reward_models import skew_score
from mmalign.scorers.preference import EmbeddingHead

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}  # of a score, from the model's own


class ScoreNetwork(nn.Module):
    """A sequence classifier of transformers with one label: texts -> a score each, the head in float32.

    Args:
        model: of `AutoModelForSequenceClassification`, with `num_labels=1`.
    Raises:
        UserError: its scores are not those of a linear head at the last token.
    """

    def __init__(self, model: Any) -> None:
        """Check its scores against the model's own."""
        super().__init__()
        self.model = model
        if not hasattr(model, "score"):
            raise UserError(
                f"adapter.model: got {type(model).__name__}, want a causal language model's backbone. Choose another."
            )
        self._check()

    def forward(self, texts: Texts) -> Float[Tensor, "batch k"]:
        """A score for each text."""
        states = hidden_at(self.model.base_model, texts, texts.last)
        with torch.autocast(states.device.type, enabled=False):
            scores: Tensor = self.model.score(states)
        return scores.view(-1, texts.num_candidates)

    def _check(self) -> None:
        draw = torch.Generator().manual_seed(0)
        pad = self.model.config.get_text_config().pad_token_id
        rows = [torch.randint(self.model.config.get_text_config().vocab_size, (n,), generator=draw).tolist() for n in (5, 3)]
        texts = padded_texts(rows, (1, 1), 1, pad=pad).to(self.model.device)
        mask = torch.arange(texts.ids.shape[1]).to(texts.ids.device)[None] <= texts.last[:, None]
        training = self.model.training
        with torch.no_grad():
            self.model.eval()
            ours = self(texts)
            dtype = next(self.model.base_model.parameters()).dtype
            with torch.autocast(ours.device.type, dtype=dtype, enabled=dtype != torch.float32):  # a float32 head beside a LoRA
                theirs = self.model(input_ids=texts.ids, attention_mask=mask.long(), use_cache=False).logits.float()
            self.model.train(training)
        off = float((ours - theirs).abs().max())
        if not off <= max(TOLERANCE.get(one.dtype, TOLERANCE[torch.bfloat16]) for one in self.model.parameters()):
            raise UserError(
                f"adapter.model: got {type(self.model).__name__}, whose scores are {off:.3g} off those of a head at the last "
                "token, want a causal language model's. Choose another model."
            )


class PreferenceNetwork(nn.Module):
    """A general preference model: pairs of texts -> the skew score of the first over the second.

    Args:
        model: of `AutoModel`.
        head: its embeddings.
    """

    def __init__(self, model: Any, head: EmbeddingHead) -> None:
        """Keep both."""
        super().__init__()
        self.model, self.head = model, head

    def forward(self, texts: Texts) -> Float[Tensor, "batch 1"]:
        """One score a pair."""
        embeddings, gate = self.embeddings(texts)
        return skew_score(embeddings[:, 0], embeddings[:, 1], None if gate is None else gate[:, 0], normalised=False)[:, None]

    def embeddings(self, texts: Texts) -> tuple[Float[Tensor, "batch k dim"], Float[Tensor, "batch k blocks"] | None]:
        """Preference embeddings of all texts, and the weights that their prompts give to blocks."""
        hidden = self.model(input_ids=texts.ids, attention_mask=None, use_cache=False).last_hidden_state
        rows = torch.arange(len(texts.last), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            embedding, gate = self.head(hidden[rows, texts.last].float(), hidden[rows, texts.prompt_last].float())
        shape = (-1, texts.num_candidates)
        return embedding.view(*shape, embedding.shape[-1]), None if gate is None else gate.view(*shape, gate.shape[-1])


def hidden_at(backbone: Any, texts: Texts, places: Tensor) -> Float[Tensor, "rows width"]:
    """Last hidden states at one place of each text, in float32.

    No mask is needed for rows padded on the right: no token attends to what follows it.
    """
    hidden = backbone(input_ids=texts.ids, attention_mask=None, use_cache=False).last_hidden_state
    states: Tensor = hidden[torch.arange(len(places), device=hidden.device), places].float()
    return states


def open_backbone(
    name: str,
    *,
    scalar: bool,
    pad: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tiny: Mapping[str, Any] | None = None,
    **known: Any,
) -> Any:
    """A backbone of transformers without dropout, in evaluation mode, with a scalar head or none.

    Args:
        name: folder or hub id of a causal language model or of a reward model, or `tiny`.
        scalar: with a head of one number, new where the model has none.
        pad: the padding token, by which the model finds a text's end.
        seed: of a new head; the global generator is left as it was.
        dtype: of the weights.
        device: where it runs.
        tiny: changes of the config of a tiny model.
        known: further arguments of `from_pretrained`: revision, trust_remote_code, attn_implementation.
    Raises:
        UserError: no model there, or none that can have such a head.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    folder = str(tiny_folder(tiny)) if name == TINY else name
    asked = {key: value for key, value in known.items() if key != "attn_implementation"}
    try:
        config = without_dropout(AutoConfig.from_pretrained(folder, **asked))
        config.get_text_config().pad_token_id = pad
        opener: Any = AutoModel
        if scalar:
            config.num_labels = 1
            opener = AutoModelForSequenceClassification
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = opener.from_pretrained(folder, config=config, dtype=dtype, **known)
    except (OSError, ValueError, ImportError, RuntimeError) as fault:
        told = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise UserError(
            f"adapter.model: cannot open {name} as the backbone of a reward model ({told}). Name a folder or a hub id of a "
            "causal language model, or of a reward model with one label."
        ) from fault
    return model.to(device).eval()


def padding_token(tokenizer: Any) -> int:
    """A token to pad with that ends no text: sequence classifiers look for the last token that is another one.

    The tokenizer's padding token, unless it ends texts too; then another special token, else the first of the vocabulary.
    """
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}
    added = sorted(tokenizer.get_added_vocab().values())
    wanted = [tokenizer.pad_token_id, tokenizer.unk_token_id, *added, 0]
    found: int = next(token for token in wanted if token is not None and token not in ends)
    return found
