"""Open a multimodal language model for training, with its processor, its reference and the reader of its examples."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mmalign.adapters.image_text_reading import SightedReader, sequences_asked
from mmalign.adapters.text_opening import DTYPES, dtypes_of, needs_copy, text_or_file
from mmalign.adapters.text_policy import EXTRAS, FULL, Parts, asked_measures
from mmalign.cache import content_key, weights_fingerprint
from mmalign.errors import UserError
from mmalign.language.network import TokenNetwork
from mmalign.language.opening import ADAPTER_FILES, add_lora, check_vocabulary, from_anywhere, frozen_copy, load_weights
from mmalign.language.tiny import TINY
from mmalign.likelihoods.tokens import GRADED, RIVALS, TOKENS
from mmalign.multimodal.features import FeatureStore
from mmalign.multimodal.network import Sight
from mmalign.multimodal.opening import (
    family_of,
    fit_processor,
    lora_targets,
    open_processor,
    open_sighted,
    parts_note,
    passed_over,
    train_parts,
)
from mmalign.multimodal.processing import SightedEncoder
from mmalign.multimodal.tiny import tiny_folder
from mmalign.multimodal.towers import Towers
from mmalign.records import Content, Media, Message

if TYPE_CHECKING:
    from mmalign.adapters.image_text import ImageTextAdapter

UNTOLD = ("transformers_version", "_name_or_path", "architectures", "dtype")  # of a config: what moves no feature
LOOKED_AT = 64  # examples whose images are processed before a run, to tell lengths


def image_text_parts(
    settings: ImageTextAdapter,
    *,
    device: torch.device,
    mixed_precision: str,
    seed: int,
    num_candidates: int,
    needs_reference: bool,
    caching: int | None,
    weights: Path | None,
    asked: frozenset[str],
) -> Parts:
    """A multimodal language model as it is trained, and what goes with it; see `ImageTextAdapter.open`.

    Raises:
        UserError: no such model, or one that does not go with the settings.
    """
    known: dict[str, Any] = {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "tiny": settings.tiny,
    }
    processor = open_processor(settings.model, **known)
    if settings.chat_template is not None:
        processor.chat_template = text_or_file(settings.chat_template)
    frozen, dtype = dtypes_of(settings, mixed_precision)
    how: dict[str, Any] = {"attention": settings.attention, "quantization": settings.quantization, "device": device}
    model = open_sighted(settings.model, dtype=dtype, **how, **known)
    fit_processor(processor, model)
    check_vocabulary(model, processor.tokenizer)
    weights_key = weights_fingerprint(model) if settings.cache is not None else ""
    reference = frozen_copy(model, dtype) if needs_copy(settings, needs_reference, caching) else None
    store = None if settings.features is None else _store(settings, model, mixed_precision)
    reader = _reader(settings, processor, model, asked, num_candidates, seed)
    unused = passed_over(model, _shown(reader.encoder)[1].images) if settings.tower else frozenset()
    idle = sum(model.get_parameter(name).numel() for name in unused)
    _train(model, settings, seed, weights, unused)
    names = {name.removeprefix("reference_") for name in asked}
    if "divergence" in names and not needs_reference:
        raise UserError(
            "training.moving_reference: got one with a loss of divergence, which is from the model as it was opened. Set it to "
            "null."
        )
    wanted = asked_measures(asked) | (names & {"divergence", "anchored", *RIVALS, *TOKENS})
    return Parts(
        model=model,
        reference=reference,
        tokenizer=processor.tokenizer,
        files=processor,
        reader=reader,
        network=_Networks(reader.encoder, store, share=weights is None, tower=settings.tower),
        base=str(tiny_folder(settings.tiny)) if settings.model == TINY else from_anywhere(settings.model),
        stock=("AutoModelForImageTextToText", "AutoProcessor"),
        frozen=frozen,
        autocast=None if mixed_precision == "no" else DTYPES[mixed_precision],
        fingerprint={"network": weights_key, "precision": f"{dtype} {mixed_precision} {settings.quantization}"},
        wanted=wanted if caching is None else wanted - GRADED,
        note=parts_note(model) + (f" ({idle:,} of the tower stay as they are: no feature depends on them)" if idle else ""),
        looked_at=LOOKED_AT,
    )


class _Networks:
    """Makes networks that see; a policy and its frozen copy share what they remember of images where both are the same."""

    def __init__(self, encoder: SightedEncoder, store: FeatureStore | None, *, share: bool, tower: bool) -> None:
        self.encoder, self.store, self.share = encoder, store, share
        self.towers = Towers() if share and not tower else None
        self.sight: Sight | None = None

    def __call__(self, model: Any, pack: bool) -> TokenNetwork:
        """The model as a network of token layouts."""
        sight = self.sight
        if sight is None or not (self.share and sight.frozen):
            sight = Sight(model, self.encoder.family, _shown(self.encoder), self.store, self.towers)
            if self.sight is None and sight.frozen:  # its features are remembered: no need of what they are made of
                self.towers = sight.towers = None
        self.sight = sight
        network = TokenNetwork(model, pack=pack, sight=sight)
        sight.forget()
        return network


def _train(model: Any, settings: ImageTextAdapter, seed: int, weights: Path | None, unused: frozenset[str]) -> None:
    """Let the parts take gradients that are to be trained: as they are, by LoRA, or as a run left them."""
    parts: dict[str, Any] = {"tower": settings.tower, "projector": settings.trains_projector, "unused": unused}
    if weights is not None and (weights / ADAPTER_FILES[0]).is_file():
        load_weights(model, weights)
        return
    if weights is not None:
        if not (weights / FULL / "config.json").is_file():
            raise UserError(f"{weights}: got neither a LoRA nor a folder `{FULL}`, want the output of a run.")
        left = open_sighted(str(weights / FULL), dtype=torch.float32)
        try:
            model.load_state_dict(left.state_dict())
        except RuntimeError as fault:
            raise UserError(f"{weights}: its weights do not fit the model ({str(fault).splitlines()[0]}).") from fault
    if settings.lora is None:
        train_parts(model, **parts)
        return
    lora = settings.lora
    targets = lora_targets(model, lora.targets, **parts)
    add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=targets, dropout=lora.dropout, seed=seed)


def _reader(
    settings: ImageTextAdapter, processor: Any, model: Any, asked: frozenset[str], num_candidates: int, seed: int
) -> SightedReader:
    encoder = SightedEncoder(
        processor=processor,
        model_type=model.config.model_type,
        family=family_of(model),
        config=model.config,
        template=settings.template,
        template_kwargs=settings.chat_template_kwargs or {},
        system_prompt=settings.system_prompt,
        eos=settings.eos,
        max_prompt_length=settings.max_prompt_length,
        max_response_length=settings.max_response_length,
        as_video=settings.as_video,
        num_frames=settings.num_frames,
        settings=settings.processor,
    )
    degradation = None if settings.degradation is None else settings.degradation.build()
    extras = sequences_asked(asked, EXTRAS, num_candidates)
    return SightedReader(encoder, extras, "draw" in asked, seed, settings.token_weights, degradation)


def _shown(encoder: SightedEncoder) -> tuple[list[int], Any]:
    """A prompt that shows a small image, of random pixels."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
    media = (Media(data=stream.getvalue()),)
    chat = encoder.tokenizer.chat_template is not None
    content = Content(messages=(Message(role="user", text="a", images=media),)) if chat else Content(text="a", images=media)
    return replace(encoder, max_prompt_length=None).shown(content)


def _store(settings: ImageTextAdapter, model: Any, mixed_precision: str) -> FeatureStore:
    """Features on disk of this tower and projector, as their config and the precision have them run."""
    family = family_of(model)
    parts = [model.model.get_submodule(path) for path in (family.tower, *family.projectors) if _is_module(model, path)]
    told = [model.model.get_parameter(path) for path in family.projectors if not _is_module(model, path)]
    keys = [weights_fingerprint(part) for part in parts]
    keys += [content_key(one.detach().float().cpu().numpy().tobytes()) for one in told]
    kept = {name: value for name, value in model.config.to_dict().items() if name not in ("text_config", *UNTOLD)}
    vision = {name: value for name, value in kept.pop("vision_config").items() if name not in UNTOLD}
    config = json.dumps({**kept, "vision_config": vision}, sort_keys=True, default=str)
    precision = f"{mixed_precision} {settings.quantization}"
    note = {"model": settings.model, "revision": settings.revision, "precision": precision, "weights": keys}
    return FeatureStore(Path(str(settings.features)), content_key(*keys, config, precision), note)


def _is_module(model: Any, path: str) -> bool:
    inner: nn.Module = model.model
    return any(name == path for name, _ in inner.named_modules())
