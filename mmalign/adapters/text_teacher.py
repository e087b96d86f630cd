"""The teacher of a text adapter: its settings, and how it is opened beside the policy."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import UserError
from mmalign.language.opening import open_model, open_tokenizer
from mmalign.language.teacher import Teacher, check_vocabulary, frozen_network
from mmalign.likelihoods.tokens import GRADED

if TYPE_CHECKING:
    from mmalign.adapters.text import TextAdapter

logger = logging.getLogger(__name__)

REMEDIES = {
    "teacher_divergence": "Set adapter.teacher to the model that teaches",
    "advantage": "Set adapter.teacher to a preference-tuned model, and with it lora, or the reference it was tuned from",
}


@dataclass(frozen=True, kw_only=True)
class TeacherReference:
    """The model that a teacher was tuned from.

    Args:
        model: folder or hub id.
        revision: of the hub's repository.
    """

    model: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherModel:
    """A preference-tuned causal language model of the policy's vocabulary, which the losses `dckd` and `adpa` learn from.

    Source: Gao et al. 2025 (ADPA).
    Args:
        model: folder or hub id.
        revision: of the hub's repository.
        lora: output folder of the run that tuned it: a LoRA, or a full fine-tune; None: the model is tuned itself.
        reference: the model that the teacher was tuned from, for `adpa`. None: with a LoRA, the model without it.
        top_k: words a token that are looked at, the likeliest of the teacher; None: the whole vocabulary. Published: 50.
    """

    model: str
    revision: str | None = None
    lora: str | None = None
    reference: TeacherReference | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Refuse no words."""
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: got {self.top_k}, want 1 or more, or null for the whole vocabulary.")

    @property
    def measures(self) -> frozenset[str]:
        """What can be measured with it."""
        return GRADED if self.lora is not None or self.reference is not None else GRADED - {"advantage"}


def open_teacher(
    settings: TextAdapter, wanted: frozenset[str], policy: Any, tokenizer: Any, dtype: torch.dtype, device: torch.device
) -> Teacher | None:
    """The frozen models that these measures ask for, or None.

    Args:
        settings: of the adapter.
        wanted: measures.
        policy, tokenizer: whose vocabulary the teacher must have.
        dtype: of the teacher's weights.
        device: where they lie.
    Raises:
        UserError: a measure asks for a teacher or a reference that is not there, a model of another vocabulary, or one whose
            rows cannot be packed where `pack: true` asks for that.
    """
    teacher, asked = settings.teacher, wanted & GRADED
    if not asked:
        return None
    missing = sorted(asked - (frozenset() if teacher is None else teacher.measures))
    if teacher is None or missing:
        raise UserError(f"adapter.teacher: the loss asks for {missing[0]}. {REMEDIES[missing[0]]}.")
    with_reference = "advantage" in asked
    named = [("adapter.teacher", teacher.model, teacher.revision, teacher.lora)]
    if with_reference and teacher.reference is not None:
        named.append(("adapter.teacher.reference", teacher.reference.model, teacher.reference.revision, None))
    opened = []
    for where, name, revision, lora in named:
        model, theirs = _opened(where, settings, name, revision, dtype, device)
        check_vocabulary(where, model, theirs, policy, tokenizer)
        try:
            opened.append(frozen_network(model, lora=None if lora is None else Path(lora), pack=settings.pack is not False))
        except UserError as fault:
            raise UserError(f"{where}: {fault}") from fault
    (network, layers), *references = opened
    if with_reference and not references and not layers:
        raise UserError(
            f"adapter.teacher.lora: {teacher.lora} holds a full fine-tune, without which there is no reference. Set "
            "adapter.teacher.reference to the model it was tuned from."
        )
    reference = references[0][0] if references else None
    found = Teacher(network=network, reference=reference, lora=layers, with_reference=with_reference, top_k=teacher.top_k)
    _check_packing(found, settings)
    return found


def _opened(
    where: str, settings: TextAdapter, name: str, revision: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    trust = settings.trust_remote_code
    try:
        model = open_model(
            name, revision=revision, dtype=dtype, attention=settings.attention, device=device, trust_remote_code=trust
        )
        return model, open_tokenizer(name, revision=revision, trust_remote_code=trust)
    except UserError as fault:
        raise UserError(f"{where}: {str(fault).partition(': ')[2]}") from fault


def _check_packing(teacher: Teacher, settings: TextAdapter) -> None:
    """All run one layout: where a teacher's rows are padded, so are the policy's."""
    why = next((network.why_not for network in teacher.networks if not network.packs), "")
    if why and settings.pack is True:
        raise UserError(f"adapter.pack: got true, and the teacher's rows cannot be packed: {why}. Set it to auto or false.")
    if why and settings.pack == "auto":
        logger.info("rows are padded as the teacher's are: %s.", why)
