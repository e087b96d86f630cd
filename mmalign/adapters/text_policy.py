"""A language model in training with preferences: prepares the inputs of a step, holds policy and reference, saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from mmalign.adapters.text_cache import ReferenceBank
from mmalign.adapters.text_lengths import groups_of_like_length, length_note, mean_length
from mmalign.adapters.text_reading import Reader
from mmalign.adapters.text_teacher import open_teacher
from mmalign.adapters.text_tokens import mismatched_of, tokens_of
from mmalign.cache import weights_fingerprint
from mmalign.errors import UserError
from mmalign.language.chat import Encoder
from mmalign.language.generation import ends_of, generate_answers, generate_texts
from mmalign.language.network import TokenNetwork
from mmalign.language.opening import (
    add_lora,
    check_vocabulary,
    frozen_copy,
    learned_positions,
    load_weights,
    lora_layers,
    lora_off,
    open_model,
    open_tokenizer,
    save_full,
    save_lora,
)
from mmalign.language.tiny import TINY, tiny_folder
from mmalign.likelihoods import TokenInputs
from mmalign.likelihoods.tokens import GRADED
from mmalign.records import Content, Example
from mmalign.sources import Prepared

if TYPE_CHECKING:
    from mmalign.adapters.text import TextAdapter

FULL = "model"  # the folder, in a run's output, that a full fine-tune is saved to
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
EXTRAS = ("rationale", "exploration", "gold")


class TextPolicy:
    """An opened language model in training."""

    library: ClassVar[str] = "transformers"

    def __init__(
        self,
        settings: TextAdapter,
        device: torch.device,
        mixed_precision: str,
        seed: int,
        num_candidates: int,
        needs_reference: bool,
        caching: int | None,
        weights: Path | None,
        asked: frozenset[str],
    ) -> None:
        """Use `TextAdapter.open`."""
        self.settings, self.device, self.seed = settings, device, seed
        self.tokenizer = open_tokenizer(
            settings.tokenizer or settings.model,
            revision=settings.revision if settings.tokenizer is None else None,
            trust_remote_code=settings.trust_remote_code,
            **({} if settings.gguf_file is None or settings.tokenizer else {"gguf_file": settings.gguf_file}),
        )
        if settings.chat_template is not None:
            self.tokenizer.chat_template = _text_or_file(settings.chat_template)
        frozen = DTYPES[mixed_precision] if settings.dtype == "auto" else getattr(torch, settings.dtype)
        dtype = frozen if settings.lora is not None else torch.float32  # of policy and reference alike
        model = self._opened(dtype)
        check_vocabulary(model, self.tokenizer)
        weights_key = weights_fingerprint(model) if settings.cache is not None else ""
        copied = settings.lora is None and needs_reference and (settings.cache is None or caching is not None)
        reference = frozen_copy(model, dtype) if copied else None
        if weights is not None:
            load_weights(model, weights)
        elif settings.lora is not None:
            lora = settings.lora
            add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, seed=seed)
        else:
            model.requires_grad_(True)
        self.layers = lora_layers(model) if settings.lora is not None else []
        self.wanted = asked_measures(asked) if caching is None else asked_measures(asked) - GRADED
        self.teacher = open_teacher(settings, self.wanted, model, self.tokenizer, frozen, device)
        taught_padded = self.teacher is not None and not all(one.packs for one in self.teacher.networks)
        self.network = TokenNetwork(model, pack=settings.pack is not False and not taught_padded)
        self._copy = None if reference is None else TokenNetwork(reference, pack=self.network.packs)
        if settings.pack is True and not self.network.packs:
            raise UserError(f"adapter.pack: got true, and {self.network.why_not}. Set it to auto or false.")
        if settings.gradient_checkpointing:
            self.network.checkpoint_gradients(True)
        self.mismatched = settings.mismatched is not False and "anchor" in asked and num_candidates == 1
        extras = tuple(name for name in EXTRAS if {name, f"reference_{name}"} & asked)
        encoder = Encoder(
            tokenizer=self.tokenizer,
            template=settings.template,
            system_prompt=settings.system_prompt,
            eos=settings.eos,
            max_prompt_length=settings.max_prompt_length,
            max_response_length=settings.max_response_length,
            positions=learned_positions(model),
        )
        self.reader = Reader(encoder, extras, "draw" in asked, seed, settings.token_weights)
        self.mean_length: float | None = None
        self.cache: ReferenceBank | None = None
        if settings.cache is not None:
            if self.mismatched:
                raise UserError(
                    "adapter.cache: got one with KTO's anchor on mismatched answers, which differ in every batch. Set "
                    "adapter.mismatched to false, or cache to null."
                )
            precision = f"{dtype} {mixed_precision} {settings.quantization} packed={self.network.packs}"
            known = {"network": weights_key, "precision": precision}
            self.cache = ReferenceBank(Path(settings.cache), known, caching)

    def _opened(self, dtype: torch.dtype) -> Any:
        settings = self.settings
        return open_model(
            settings.model,
            revision=settings.revision,
            dtype=dtype,
            attention=settings.attention,
            quantization=settings.quantization,
            device=self.device,
            trust_remote_code=settings.trust_remote_code,
            tiny=settings.tiny,
            **({} if settings.gguf_file is None else {"gguf_file": settings.gguf_file}),
        )

    # --- what the loop asks for -----------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.network.model

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[Callable[..., Any]]:
        """The model as it was opened: LoRA off, or a frozen copy.

        Raises:
            ValueError: it was opened for a loss without a reference.
        """
        if self.layers:
            with lora_off(self.layers):
                yield self.network
        elif self._copy is not None:
            yield self._copy
        else:
            raise ValueError("reference: opened without one. Pass needs_reference=True to open.")

    @property
    def item(self) -> Callable[[Example, int], dict[str, Any]]:
        """(example, epoch) -> item, for worker processes; holds no model."""
        return self.reader.item

    @property
    def collate(self) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Items -> micro-batch."""
        return self.reader.collate

    def prepare(self, batch: Mapping[str, Any]) -> Prepared:
        """Token sequences of a step, lengths, and what is known of the reference."""
        encoded, k = batch["encoded"], batch["k"]
        rows = len(encoded)
        tokens = tokens_of(
            encoded,
            k,
            len(self.reader.extras),
            wanted=self.wanted,
            from_difference=self.settings.score == "difference",
            weights=batch["weights"],
        )
        inputs = TokenInputs(
            tokens=tokens,
            num_candidates=k,
            batch=rows,
            extras=self.reader.extras,
            wanted=self.wanted,
            device=self.device,
            pack=self.network.packs,
            pad=self.tokenizer.pad_token_id or 0,
            mismatched=mismatched_of(encoded) if self.mismatched else None,
            teacher=self.teacher,
        )
        scored = tokens.scored().to(self.device, non_blocking=True)
        side = {name: value.to(self.device, non_blocking=True) for name, value in batch["side"].items()}
        side["lengths"] = scored[: rows * k].view(rows, k)
        side |= {f"{name}_lengths": scored[(k + n) * rows :][:rows, None] for n, name in enumerate(self.reader.extras)}
        if self.mean_length is not None:
            side["mean_length"] = torch.full_like(scored[:rows], self.mean_length)
        reference = None if self.cache is None or not self.cache.reading else self.cache.measures(inputs)
        samples = rows * (k + len(self.reader.extras))
        notes = {
            "tokens/cut_prompts": sum(one.cut_prompts for one in encoded) / samples,
            "tokens/cut_responses": sum(one.cut_responses for one in encoded) / samples,
            "tokens/per_example": sum(map(len, (*tokens.contexts, *tokens.continuations))) / rows,
        }
        return Prepared(inputs=inputs, side=side, ids=batch["id"], reference=reference, notes=notes)

    def survey(self, examples: Sequence[Example]) -> None:
        """Take the mean number of tokens of the best answers for `mean_length`.

        One number for the whole run: a mean over tokens then depends on neither micro-batch nor process.
        """
        self.mean_length = mean_length(self.reader.encoder, examples)

    def groups(self, examples: Sequence[Example]) -> tuple[tuple[int, ...], ...]:
        """Examples of like length, where rows are padded; packed rows need none."""
        return () if self.network.packs else groups_of_like_length(examples, self.settings.group_by_length)

    # --- what sources ask for that make answers --------------------------------------------------------------------

    def prompt_ids(self, prompt: Content) -> list[int]:
        """Token ids of a prompt, up to where the model answers."""
        return self.reader.encoder.prompt(prompt)

    def answers(self, prompts: Sequence[Sequence[int]], *, by_reference: bool = False, **settings: Any) -> list[list[int]]:
        """Token ids of an answer of the policy as it is now, or of the reference, to each prompt.

        Args:
            prompts: token ids.
            by_reference: the reference answers.
            settings: of `language.generation.generate_answers`.
        """
        if not by_reference:
            return generate_answers(self.model, self.tokenizer, prompts, **settings)
        with self.reference() as network:
            speaker: Any = network
            return generate_answers(speaker.model, self.tokenizer, prompts, **settings)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return ends_of(self.model, self.tokenizer)

    @property
    def extras(self) -> tuple[str, ...]:
        """Further completions of a row that the losses ask for."""
        return self.reader.extras

    def save(self, folder: Path) -> None:
        """LoRA: a PEFT adapter; full: the folder `model`. The tokenizer lies with both."""
        if self.settings.lora is not None:
            save_lora(self.model, folder, self._base())
            self.tokenizer.save_pretrained(folder)
        else:
            save_full(self.model, self.tokenizer, folder / FULL)

    def validate(self, folder: Path) -> None:
        """Write `answers.jsonl`: an answer to every prompt of `validation`."""
        wanted = self.settings.validation
        if wanted is None:
            return
        prompts = [self.reader.encoder.prompt(prompt_content(self.tokenizer, text)) for text in wanted.prompts]
        answers = generate_texts(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            seeds=[wanted.seed + n for n in range(len(prompts))],
        )
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": p, "answer": a} for p, a in zip(wanted.prompts, answers, strict=True)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "answers.jsonl").write_text(text, encoding="utf-8")

    # --- what the command line tells ------------------------------------------------------------------------------

    def plan(self) -> str:
        """What is trained, in words."""
        trained = sum(parameter.numel() for parameter in self.parameters())
        total = sum(parameter.numel() for parameter in self.network.parameters())
        lora = self.settings.lora
        how = "full fine-tuning" if lora is None else f"LoRA rank {lora.rank} on {len(self.layers)} layers"
        rows = "packed rows, prompts shared" if self.network.packs else f"padded rows ({self.network.why_not})"
        share = f"{trained:,} of {total:,} parameters trained ({100 * trained / total:.2f} %)"
        taught = f"; taught by {self.teacher.num_parameters:,} frozen parameters" if self.teacher is not None else ""
        return f"{type(self.model).__name__}, {how}: {share}; {rows}{taught}"

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Lengths of prompts and answers, and how many are cut."""
        return [length_note(self.reader.encoder, examples)]

    @property
    def num_encoder_parameters(self) -> int:
        """Of what is frozen beside the model: the teacher."""
        return 0 if self.teacher is None else self.teacher.num_parameters

    @property
    def keeps_references(self) -> bool:
        """Whether there is a cache: the reference's logps are all it holds."""
        return self.cache is not None

    def activations(self) -> float | None:
        """Activation memory of a sample: not known beforehand for texts."""
        return None

    def loading_lines(self, folder: Path) -> str:
        """Stock code that loads the result, from any folder."""
        whole = folder.absolute() if self.settings.lora is not None else folder.absolute() / FULL
        return f'model = transformers.AutoModelForCausalLM.from_pretrained("{whole}")\n' + (
            f'tokenizer = transformers.AutoTokenizer.from_pretrained("{whole}")'
        )

    def _base(self) -> str:
        """Where a saved LoRA finds its base."""
        return str(tiny_folder(self.settings.tiny)) if self.settings.model == TINY else self.settings.model


def asked_measures(asked: frozenset[str]) -> frozenset[str]:
    """The measures of one pass that these names of data ask for, beside the logps and the further completions."""
    names = {name.removeprefix("reference_") for name in asked}
    return frozenset(names & {"shared", "joint", "agreement", "entropy", *GRADED})


def prompt_content(tokenizer: Any, text: str) -> Content:
    """A prompt given as words: the user's message where the tokenizer has a template."""
    from mmalign.records import Message

    return Content(text=text) if tokenizer.chat_template is None else Content(messages=(Message(role="user", text=text),))


def _text_or_file(value: str) -> str:
    if "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError as fault:
        raise UserError(f"adapter.chat_template: cannot read {value} ({fault}). Give a file, or Jinja text.") from fault
