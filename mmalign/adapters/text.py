"""The text adapter: prompts and answers -> log-likelihoods under a causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch

from mmalign.adapters.options import Lora
from mmalign.adapters.text_checks import check_blind, check_settings, check_texts
from mmalign.adapters.text_opening import text_parts
from mmalign.adapters.text_policy import TextPolicy
from mmalign.adapters.text_teacher import REMEDIES, TeacherModel
from mmalign.config import Choice, Table
from mmalign.errors import UserError
from mmalign.likelihoods.tokens import GRADED
from mmalign.losses import OF_DIFFERENCES, of_differences
from mmalign.records import Media


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers written during training, always to the same prompts.

    Args:
        prompts: one answer each; users' messages where the tokenizer has a chat template.
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token.
        seed: of the sampler.
    """

    prompts: tuple[str, ...]
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could only fail when the run is nearly over."""
        if not self.prompts:
            raise ValueError("prompts: got none, want one or more, or validation: null.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}, want 1 or more.")
        if self.temperature < 0:
            raise ValueError(f"temperature: got {self.temperature}, want 0 or more.")

    def media(self) -> list[tuple[Media, ...]]:
        """What each prompt shows: nothing."""
        return [()] * len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class TextAdapter:
    """Settings of the text adapter.

    Args:
        model: a causal language model of transformers, folder or hub id, or `tiny`: random weights for smoke runs.
        revision: of the hub's repository.
        tokenizer: folder or hub id; None: the model's.
        gguf_file: file in the model's folder or repository that holds the weights, to read a GGUF model.
        chat_template: Jinja text, or a file of it, instead of the tokenizer's.
        chat_template_kwargs: given to the chat template of every conversation, by its own names, as `enable_thinking: false`.
        template, system_prompt, eos, max_prompt_length, max_response_length: see `language.chat.Encoder`.
        score: response: all tokens of an answer. difference: from the first token on in which the answers of a row differ; what
            they share cancels in differences of pairs.
        token_weights: factors of the log-probabilities of an answer's tokens: `nextquill`, or a function of yours
            `package.module:function` that is given (example, encoded); see `text_reading.weights_of`. None: 1.
        lora: low-rank weights; None: full fine-tuning in float32.
        quantization: frozen weights in 4 or 8 bits (QLoRA); needs lora, a GPU and bitsandbytes.
        dtype: of the frozen weights; auto: that of the mixed precision. Full fine-tuning keeps float32.
        attention: implementation of padded rows, as transformers names it; None: the model's own.
        pack: auto: one row without padding, in which each prompt is run once for all its answers, where the architecture
            allows; True: refuse an architecture that does not; False: padded rows.
        group_by_length: padded rows: number of groups of like length, of which a step takes one; 1: none.
        gradient_checkpointing: recompute activations in the backward pass.
        mismatched: auto: KTO's anchor is measured on answers of other prompts, as published; False: on the batch itself.
        cache: folder of reference log-probabilities, which `mmalign prepare` fills; None: a reference pass each step.
        teacher: a frozen model that the losses `dckd` and `adpa` learn from, in the dtype of frozen weights.
        validation: answers written during training.
        trust_remote_code: run code that comes with the model.
        tiny: changes of the config of `model: tiny`.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    gguf_file: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    template: Literal["auto", "always"] = "auto"
    system_prompt: str | None = None
    eos: Literal["auto", "always", "never"] = "auto"
    max_prompt_length: int | None = 1024
    max_response_length: int | None = 1024
    score: Literal["response", "difference"] = "response"
    token_weights: Annotated[Choice, Table("mmalign.curation.token_effects:TOKEN_WEIGHTS")] | None = None
    lora: Lora | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attention: str | None = None
    pack: Literal["auto"] | bool = "auto"
    group_by_length: int = 8
    gradient_checkpointing: bool = False
    mismatched: Literal["auto"] | bool = "auto"
    cache: str | None = None
    teacher: TeacherModel | None = None
    validation: Answers | None = None
    trust_remote_code: bool = False
    tiny: dict[str, int] | None = None

    side: ClassVar[tuple[str, ...]] = ("lengths", "gold_lengths", "mean_length", "draw")
    errors: ClassVar[bool] = False
    answers: ClassVar[bool] = True
    remedies: ClassVar[Mapping[str, str]] = REMEDIES

    @property
    def measures(self) -> frozenset[str]:
        """What is measured of a pass beside the logps; with a teacher, what it gives."""
        own = frozenset({"shared", "joint", "agreement", "rationale", "exploration", "gold"})
        return own if self.teacher is None else own | self.teacher.measures

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is loaded."""
        check_settings(self)

    def check_losses(self, losses: Sequence[Choice], num_candidates: int) -> None:
        """Refuse an idle teacher, and `score: difference` with a loss that shared tokens would change.

        Raises:
            UserError: names the loss.
        """
        asked = {name for loss in losses for name in inspect.signature(loss.target).parameters}
        if self.teacher is not None and not asked & GRADED:
            names = ", ".join(loss.name for loss in losses)
            raise UserError(f"adapter.teacher: got one, of which {names} learns nothing. Set it to null, or add dckd or adpa.")
        if self.score == "response":
            return
        for loss in losses:
            if num_candidates < 2 or not of_differences(loss.name, loss.settings):
                raise UserError(
                    f"adapter.score: got difference with loss {loss.name}, which depends on more than differences of summed "
                    f"log-ratios within a pair. Set it to response, or choose one of {', '.join(sorted(OF_DIFFERENCES))}."
                )

    def check_sources(self, numbers: Mapping[int, str]) -> None:
        """Refuse prompts with images; see `check_blind`."""
        check_blind(numbers, "text")

    def check_examples(self, kinds: Mapping[tuple[int, tuple[int, ...]], str]) -> None:
        """Refuse examples whose candidates have images; see `check_texts`."""
        check_texts(kinds)

    def open(
        self,
        *,
        device: torch.device | str = "cpu",
        mixed_precision: str = "no",
        seed: int = 0,
        num_candidates: int = 2,
        needs_reference: bool = False,
        caching: int | None = None,
        weights: Path | None = None,
        asked: frozenset[str] = frozenset(),
    ) -> TextPolicy:
        """Load model and tokenizer.

        Args:
            device: where the model runs.
            mixed_precision: no, fp16 or bf16.
            seed: of the LoRA's first weights.
            num_candidates: k of the data.
            needs_reference: whether the loss asks for a reference.
            caching: index of the process, to fill the cache; None: read it.
            weights: tuned weights to start from, as a run left them.
            asked: names of all data that the losses ask for.
        Raises:
            UserError: no such model, or one that does not go with the settings.
        """
        where = torch.device(device)
        parts = text_parts(
            self,
            device=where,
            mixed_precision=mixed_precision,
            seed=seed,
            needs_reference=needs_reference,
            caching=caching,
            weights=weights,
            asked=asked,
        )
        return TextPolicy(self, parts, device=where, num_candidates=num_candidates, caching=caching, asked=asked)
