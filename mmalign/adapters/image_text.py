"""The image_text adapter: prompts with images and answers -> log-likelihoods under a multimodal language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch

from mmalign.adapters.image_text_opening import image_text_parts
from mmalign.adapters.options import Lora
from mmalign.adapters.text_checks import check_settings, check_texts
from mmalign.adapters.text_policy import TextPolicy
from mmalign.config import Choice, Table
from mmalign.errors import UserError
from mmalign.likelihoods.tokens import RIVALS, TOKENS
from mmalign.multimodal.degradations import check_degradation
from mmalign.records import Media

OF_DEGRADED = frozenset(
    {"degraded", "redrawn", "each_degraded", "greedy", "anchored"}
)  # measures that a degraded image is shown for


@dataclass(frozen=True, kw_only=True)
class SightedAnswers:
    """Answers written during training, always to the same prompts and images.

    Args:
        prompts: one answer each; users' messages where the processor has a chat template.
        images: files, one a prompt, null where it shows nothing; empty: no prompt shows anything.
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token.
        seed: of the sampler.
    """

    prompts: tuple[str, ...]
    images: tuple[str | None, ...] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could only fail when the run is nearly over."""
        if not self.prompts:
            raise ValueError("prompts: got none, want one or more, or validation: null.")
        if self.images and len(self.images) != len(self.prompts):
            raise ValueError(f"images: got {len(self.images)} for {len(self.prompts)} prompts, want one each, or none at all.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}, want 1 or more.")
        if self.temperature < 0:
            raise ValueError(f"temperature: got {self.temperature}, want 0 or more.")

    def media(self) -> list[tuple[Media, ...]]:
        """What each prompt shows."""
        return [
            () if path is None else (Media(path=path, where="adapter.validation.images"),)
            for path in self.images or (None,) * len(self.prompts)
        ]


@dataclass(frozen=True, kw_only=True)
class ImageTextAdapter:
    """Settings of the image_text adapter.

    Args:
        model: a multimodal language model of transformers, folder or hub id, or `tiny`: random weights for smoke runs.
        revision: of the hub's repository.
        chat_template: Jinja text, or a file of it, instead of the processor's.
        chat_template_kwargs: given to the chat template of every conversation, by its own names.
        template, system_prompt, eos, max_prompt_length, max_response_length, as_video, num_frames: see
            `multimodal.processing`. Prompts with images are never cut: longer ones than `max_prompt_length`, images included,
            are refused.
        processor: further arguments of the processor, such as `max_pixels` or `do_image_splitting`.
        degradation: what is shown instead of the images, once drawn for an example and epoch, where a loss asks for
            `degraded`, `each_degraded`, `greedy` or `anchored`.
        token_weights: factors of the log-probabilities of an answer's tokens, as of the adapter text.
        lora: low-rank weights on the linear layers of the language model; None: full fine-tuning in float32.
        tower: train the vision tower too, in full or by LoRA; its layers behind the one whose states are the features (LLaVA's
            last) stay as they are, which the plan tells. Published: frozen.
        projector: train what maps features to embeddings; auto: in full fine-tuning, not with a LoRA.
        quantization, dtype, attention, group_by_length, gradient_checkpointing, mismatched, trust_remote_code: as of the
            adapter text.
        pack: auto: one row without padding, in which a prompt and its images are run once for all its answers, where the
            architecture allows; True: refuse an architecture that does not; False: padded rows.
        cache: folder of reference log-probabilities, which `mmalign prepare` fills; None: a reference pass each step.
        features: folder of image features, filled on the way; None: they are kept in memory alone. Wants a frozen tower and
            projector.
        validation: answers written during training.
        tiny: `family` and changes of the config of `model: tiny`.
    """

    model: str
    revision: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    template: Literal["auto", "always"] = "auto"
    system_prompt: str | None = None
    eos: Literal["auto", "always", "never"] = "auto"
    max_prompt_length: int | None = None
    max_response_length: int | None = 1024
    as_video: bool = False
    num_frames: int | None = None
    processor: dict[str, bool | int | float | str] = field(default_factory=dict)
    degradation: Annotated[Choice, Table("mmalign.multimodal.degradations:DEGRADATIONS")] | None = None
    token_weights: Annotated[Choice, Table("mmalign.curation.token_effects:TOKEN_WEIGHTS")] | None = None
    lora: Lora | None = None
    tower: bool = False
    projector: Literal["auto"] | bool = "auto"
    quantization: Literal["4bit", "8bit"] | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attention: str | None = None
    pack: Literal["auto"] | bool = "auto"
    group_by_length: int = 8
    gradient_checkpointing: bool = False
    mismatched: Literal["auto"] | bool = "auto"
    cache: str | None = None
    features: str | None = None
    validation: SightedAnswers | None = None
    trust_remote_code: bool = False
    tiny: dict[str, int | str] | None = None

    measures: ClassVar[frozenset[str]] = frozenset(
        {
            "shared",
            "agreement",
            "rationale",
            "exploration",
            "gold",
            "each_absent",
            "crossed",
            "divergence",
            *RIVALS,
            *TOKENS,
            *OF_DEGRADED,
        }
    )
    side: ClassVar[tuple[str, ...]] = ("lengths", "gold_lengths", "mean_length", "draw")
    errors: ClassVar[bool] = False
    remedies: ClassVar[Mapping[str, str]] = {}
    score: ClassVar[str] = "response"
    teacher: ClassVar[None] = None

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is loaded."""
        check_settings(self)
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames: got {self.num_frames}, want 1 or more, or null for all.")
        if self.degradation is not None:
            check_degradation(self.degradation.build)
        if self.features is not None and (self.tower or self.trains_projector):
            raise ValueError(
                "features: got a folder while tower or projector are trained, whose features change. Set it to null, or train "
                "by lora without them."
            )

    @property
    def trains_projector(self) -> bool:
        """Whether the projector is trained."""
        return self.lora is None if self.projector == "auto" else self.projector

    @property
    def swaps(self) -> bool:
        """Whether an example is shown another one's images."""
        return self.degradation is not None and self.degradation.build().wants_other

    def check_losses(self, losses: Sequence[Choice], num_candidates: int) -> None:
        """Every loss goes with the settings that can be told from its name alone."""

    def check_sources(self, numbers: Mapping[int, str]) -> None:
        """Prompts may have any number of images, and none."""

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
        """Load model and processor; arguments as of `TextAdapter.open`.

        Raises:
            UserError: no such model, one that does not go with the settings, or an image of `validation` that is missing.
        """
        self._check_cache(asked)
        for media in self.validation.media() if self.validation is not None else ():
            for one in media:
                one.inspect()
        where = torch.device(device)
        parts = image_text_parts(
            self,
            device=where,
            mixed_precision=mixed_precision,
            seed=seed,
            num_candidates=num_candidates,
            needs_reference=needs_reference,
            caching=caching,
            weights=weights,
            asked=asked,
        )
        return TextPolicy(self, parts, device=where, num_candidates=num_candidates, caching=caching, asked=asked)

    def _check_cache(self, asked: frozenset[str]) -> None:
        """Refuse a cache of what differs from epoch to epoch, or is not a sum of the reference's log-probabilities."""
        if self.cache is None:
            return
        names = {name.removeprefix("reference_") for name in asked}
        never = sorted(names & {"divergence", "greedy", "anchored", *RIVALS, *TOKENS})
        if never:
            raise UserError(
                f"adapter.cache: got one with a loss of {never[0]}, which is more than log-probabilities of the reference. Set "
                "cache to null."
            )
        drawn = self.degradation is not None and self.degradation.build().drawn
        shown = sorted(
            name for name in asked if name.removeprefix("reference_") in OF_DEGRADED and name.startswith("reference_")
        )
        if shown and drawn and self.degradation is not None:
            raise UserError(
                f"adapter.cache: got one with degradation {self.degradation.name}, which is drawn anew in every epoch. Set "
                "cache to null, or choose drop or blank."
            )
