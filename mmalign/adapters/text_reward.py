"""The text_reward adapter: prompts and answers -> scores of a reward model in training, or of pairs of a preference model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmalign.adapters.options import Lora
from mmalign.adapters.text_checks import check_blind, check_settings, check_texts
from mmalign.adapters.text_lengths import groups_of_like_length, length_note
from mmalign.adapters.text_opening import DTYPES, text_or_file
from mmalign.adapters.text_policy import FULL
from mmalign.adapters.text_reading import Reader
from mmalign.config import Choice, Table
from mmalign.errors import UserError
from mmalign.language.chat import Encoder
from mmalign.language.opening import add_lora, from_anywhere, load_weights, open_tokenizer, save_full, save_lora
from mmalign.language.reward import PreferenceNetwork, ScoreNetwork, open_backbone, padding_token
from mmalign.language.tiny import TINY, tiny_folder
from mmalign.likelihoods import ScoreInputs, padded_texts
from mmalign.records import Example
from mmalign.scorers.preference import EmbeddingHead, Shape
from mmalign.sources import Prepared

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """One score a text, from a linear head: a Bradley-Terry reward model, which stock transformers loads."""


@dataclass(frozen=True, kw_only=True)
class Gpm:
    """Preference embeddings, whose skew score may be cyclic (`losses.reward_models.skew_score`).

    Normalised embeddings that begin near each other, as those of a language model do, may fall together on preferences that
    go in circles, so that nothing is preferred to anything: always with `dim: 2`, at times with more. `normalise: false` and
    the loss `gpm` with tau 1 learn them; preferences without circles are learnt either way.

    Source: Zhang et al. 2024 (GPM).
    Args:
        dim: of an embedding; even. Published: 2 to 8.
        prompt_gate: let the prompt weigh the blocks of two dimensions.
        normalise: divide embeddings by their L2 norm, as the paper; the published training file does not.
    """

    dim: int = 6
    prompt_gate: bool = True
    normalise: bool = True

    def __post_init__(self) -> None:
        """Refuse dimensions that do not make blocks."""
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"dim: got {self.dim}, want an even number of 2 or more.")


HEADS: dict[str, type[Scalar] | type[Gpm]] = {"scalar": Scalar, "gpm": Gpm}
SCALAR = Choice(name="scalar", target=Scalar)


@dataclass(frozen=True, kw_only=True)
class TextRewardAdapter:
    """Settings of the text_reward adapter: a causal language model's backbone with a head, which judges at the last token.

    Source: Ouyang et al. 2022 (InstructGPT), section 3.5; Zhang et al. 2024 for `head: gpm`.
    Args:
        model: a causal language model or a reward model of transformers, folder or hub id, or `tiny`: random weights.
        revision: of the hub's repository.
        tokenizer: folder or hub id; None: the model's.
        head: scalar, for the loss bradley_terry, or gpm, for the loss gpm.
        chat_template: Jinja text, or a file of it, instead of the tokenizer's; it is saved with the model.
        chat_template_kwargs: given to the chat template of every conversation, by its own names; a scorer is told them again.
        template, system_prompt, eos, max_prompt_length, max_response_length: see `language.chat.Encoder`.
        lora: low-rank weights, beside which the head is trained whole; None: full fine-tuning in float32.
        dtype: of the frozen weights; auto: that of the mixed precision. Head and full fine-tuning keep float32.
        attention: implementation, as transformers names it; None: the model's own.
        group_by_length: number of groups of like length, of which a step takes one; 1: none.
        trust_remote_code: run code that comes with the model.
        tiny: changes of the config of `model: tiny`.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    head: Annotated[Choice, Table(HEADS)] = SCALAR
    chat_template: str | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    template: Literal["auto", "always"] = "auto"
    system_prompt: str | None = None
    eos: Literal["auto", "always", "never"] = "auto"
    max_prompt_length: int | None = 1024
    max_response_length: int | None = 1024
    lora: Lora | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attention: str | None = None
    group_by_length: int = 8
    trust_remote_code: bool = False
    tiny: dict[str, int] | None = None

    measures: ClassVar[frozenset[str]] = frozenset()
    side: ClassVar[tuple[str, ...]] = ()
    errors: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is loaded."""
        check_settings(self)

    def num_scores(self, num_candidates: int) -> int:
        """How many scores the losses see of a row: one for each candidate, or one for a pair.

        Raises:
            UserError: a preference model gets other than pairs.
        """
        if self.head.target is Scalar:
            return num_candidates
        if num_candidates != 2:
            raise UserError(f"adapter.head: got gpm for rows of {num_candidates} candidates, want pairs. Use data.view: pair.")
        return 1

    def check_losses(self, losses: Sequence[Choice], num_candidates: int) -> None:
        """Refuse losses that a reward model of this head has nothing for.

        Raises:
            UserError: a loss asks for a reference, or is that of the other head.
        """
        wanted, other = ("bradley_terry", "gpm") if self.head.target is Scalar else ("gpm", "bradley_terry")
        for loss in losses:
            if any(name.split("_")[0] == "reference" for name in inspect.signature(loss.target).parameters):
                raise UserError(
                    f"loss: got {loss.name}, which asks for a reference, which a reward model has not, want {wanted}."
                )
            if loss.name == other:
                raise UserError(f"loss: got {other} with adapter.head {self.head.name}, want {wanted}, or the other head.")

    def check_sources(self, numbers: Mapping[int, str]) -> None:
        """Refuse prompts with images; see `check_blind`."""
        check_blind(numbers, "text_reward")

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
    ) -> TextRewardPolicy:
        """Load backbone and tokenizer, with a new head where there is none.

        Args:
            device: where the model runs.
            mixed_precision: no, fp16 or bf16.
            seed: of a new head and of the LoRA's first weights.
            num_candidates: k of the data.
            needs_reference: whether the loss asks for one, which there is not.
            caching: not for this adapter.
            weights: tuned weights to start from, as a run with a scalar head left them.
            asked: names of all data that the losses ask for.
        Raises:
            UserError: no such model; a loss with a reference; a cache asked for.
        """
        if needs_reference:
            wanted = "bradley_terry" if self.head.target is Scalar else "gpm"
            raise UserError(f"loss: got one that asks for a reference, which a reward model has not, want {wanted}.")
        if caching is not None:
            raise UserError("adapter: got text_reward, which has no reference to cache. Use adapter: text.")
        if weights is not None and self.head.target is not Scalar:
            raise UserError("adapter.head: got gpm, which does not start from a run. Use head: scalar.")
        if self.head.settings.get("dim") == 2 and self.head.settings.get("normalise"):
            logger.warning(
                "adapter.head: normalised embeddings of dim 2 fall together where preferences go in circles. Set normalise to "
                "false and loss tau to 1, or dim to 6."
            )
        return TextRewardPolicy(self, torch.device(device), mixed_precision, seed, weights, "draw" in asked)


class TextRewardPolicy:
    """An opened reward model of texts in training: what the loop and the command line ask of an adapter."""

    library: ClassVar[str] = "transformers"

    def __init__(
        self,
        settings: TextRewardAdapter,
        device: torch.device,
        mixed_precision: str,
        seed: int,
        weights: Path | None,
        draws: bool,
    ) -> None:
        """Use `TextRewardAdapter.open`."""
        self.settings, self.device = settings, device
        self.tokenizer = open_tokenizer(
            settings.tokenizer or settings.model,
            revision=settings.revision if settings.tokenizer is None else None,
            trust_remote_code=settings.trust_remote_code,
        )
        if settings.chat_template is not None:
            self.tokenizer.chat_template = text_or_file(settings.chat_template)
        self.pad = padding_token(self.tokenizer)
        self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.pad)
        self.scalar = settings.head.target is Scalar
        self.base = str(tiny_folder(settings.tiny)) if settings.model == TINY else from_anywhere(settings.model)
        self.model = self._opened(mixed_precision, seed)
        lora = settings.lora
        if weights is not None:
            load_weights(self.model, weights)
        elif lora is not None:
            add_lora(
                self.model,
                rank=lora.rank,
                alpha=lora.alpha,
                targets=lora.targets,
                dropout=lora.dropout,
                seed=seed,
                task="SEQ_CLS" if self.scalar else "FEATURE_EXTRACTION",
                whole=("score",) if self.scalar else (),
            )
        else:
            self.model.requires_grad_(True)
        self.network: ScoreNetwork | PreferenceNetwork = self._network(seed)
        encoder = Encoder(
            tokenizer=self.tokenizer,
            template=settings.template,
            template_kwargs=settings.chat_template_kwargs or {},
            system_prompt=settings.system_prompt,
            eos=settings.eos,
            max_prompt_length=settings.max_prompt_length,
            max_response_length=settings.max_response_length,
        )
        self.reader = Reader(encoder, (), draws, seed)

    def _opened(self, mixed_precision: str, seed: int) -> Any:
        settings = self.settings
        frozen = DTYPES[mixed_precision] if settings.dtype == "auto" else getattr(torch, settings.dtype)
        return open_backbone(
            settings.model,
            scalar=self.scalar,
            pad=self.pad,
            seed=seed,
            dtype=torch.float32 if settings.lora is None else frozen,
            device=self.device,
            tiny=settings.tiny,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            **({} if settings.attention is None else {"attn_implementation": settings.attention}),
        )

    def _network(self, seed: int) -> ScoreNetwork | PreferenceNetwork:
        if self.scalar:
            return ScoreNetwork(self.model)
        head: Gpm = self.settings.head.build()
        width = self.model.config.get_text_config().hidden_size
        shape = Shape(width=width, dim=head.dim, prompt_gate=head.prompt_gate, normalise=head.normalise)
        return PreferenceNetwork(self.model, EmbeddingHead(shape, seed=seed).to(self.device))

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[Callable[..., Tensor]]:
        """There is none: `open` refuses losses that ask for one."""
        raise ValueError("reference: a reward model has none.")
        yield

    @property
    def item(self) -> Callable[[Example, int], dict[str, Any]]:
        """(example, epoch) -> item, for worker processes; holds no model."""
        return self.reader.item

    @property
    def collate(self) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Items -> micro-batch."""
        return self.reader.collate

    def prepare(self, batch: Mapping[str, Any]) -> Prepared:
        """Prompts with their answers, padded, and the place where each is judged."""
        rows = batch["encoded"]
        texts = [(*row.contexts[c], *ids) for row in rows for c, ids in zip(row.context_of, row.continuations, strict=True)]
        prompts = [len(row.contexts[c]) + given for row in rows for c, given in zip(row.context_of, row.given, strict=True)]
        side = {name: value.to(self.device, non_blocking=True) for name, value in batch["side"].items()}
        notes = {
            "tokens/cut_prompts": sum(one.cut_prompts for one in rows) / len(texts),
            "tokens/cut_responses": sum(one.cut_responses for one in rows) / len(texts),
        }
        padded = padded_texts(texts, prompts, batch["k"], pad=self.pad).to(self.device)
        return Prepared(inputs=ScoreInputs(texts=padded, paired=not self.scalar), side=side, ids=batch["id"], notes=notes)

    def groups(self, examples: Sequence[Example]) -> tuple[tuple[int, ...], ...]:
        """Examples of like length."""
        return groups_of_like_length(examples, self.settings.group_by_length)

    def save(self, folder: Path) -> None:
        """LoRA: a PEFT adapter with the head in it; full: the folder `model`. A preference model's head lies beside."""
        if self.settings.lora is not None:
            save_lora(self.model, folder, self.base, self.settings.revision)
            self.tokenizer.save_pretrained(folder)
        else:
            save_full(self.model, self.tokenizer, folder / FULL)
        if isinstance(self.network, PreferenceNetwork):
            self.network.head.save(self._whole(folder))

    def validate(self, folder: Path) -> None:
        """A reward model makes no samples."""

    def plan(self) -> str:
        """What is trained, in words."""
        trained = sum(parameter.numel() for parameter in self.parameters())
        total = sum(parameter.numel() for parameter in self.network.parameters())
        lora = self.settings.lora
        how = "full fine-tuning" if lora is None else f"LoRA rank {lora.rank} and the head"
        share = f"{trained:,} of {total:,} parameters trained ({100 * trained / total:.2f} %)"
        return f"{self.settings.head.name} reward on {type(self.model).__name__}, {how}: {share}"

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Lengths of prompts and answers, and how many are cut."""
        return [length_note(self.reader.encoder, examples)]

    @property
    def num_encoder_parameters(self) -> int:
        """There are no frozen encoders beside the model."""
        return 0

    def activations(self) -> float | None:
        """Activation memory of a sample: not known beforehand for texts."""
        return None

    def loading_lines(self, folder: Path) -> str:
        """Code that loads the result, from any folder: stock transformers, or for a preference model the scorer."""
        whole = self._whole(folder.absolute())
        trust = ", trust_remote_code=True" if self.settings.trust_remote_code else ""
        revision = self.settings.revision if self.settings.lora is not None else None
        more = trust if revision is None else f', revision="{revision}"{trust}'
        files = f'tokenizer = transformers.AutoTokenizer.from_pretrained("{whole}"{trust})'
        if self.scalar:
            head = f", num_labels=1, pad_token_id={self.pad}" if self.settings.lora is not None else ""
            return f'model = transformers.AutoModelForSequenceClassification.from_pretrained("{whole}"{head}{more})\n{files}'
        return (
            "from mmalign.scorers.preference import open_head\n"
            f'model = transformers.AutoModel.from_pretrained("{whole}"{more})\n'
            f'head = open_head("{whole}")\n{files}'
        )

    def _whole(self, folder: Path) -> Path:
        return folder if self.settings.lora is not None else folder / FULL
