"""A language model in training with preferences: prepares the inputs of a step, holds policy and reference, saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from mmalign.adapters.text_cache import ReferenceBank
from mmalign.adapters.text_lengths import SURVEYED, groups_of_like_length, length_note, mean_length
from mmalign.adapters.text_teacher import open_teacher
from mmalign.adapters.text_tokens import mismatched_of, noisy_of, tokens_of
from mmalign.errors import UserError
from mmalign.language.generation import ends_of, generate_answers, generate_texts
from mmalign.language.network import TokenNetwork
from mmalign.language.opening import lora_layers, lora_off, save_full, save_lora
from mmalign.likelihoods import TokenInputs
from mmalign.likelihoods.tokens import GRADED
from mmalign.records import Content, Example, Media, Message
from mmalign.sources import Prepared

FULL = "model"  # the folder, in a run's output, that a full fine-tune is saved to
EXTRAS = ("rationale", "exploration", "gold")


@runtime_checkable
class Reads(Protocol):
    """Examples -> items -> micro-batches; holds no model."""

    @property
    def encoder(self) -> Any:
        """How samples become token ids: `language.chat.Encoder`, or one with its interface."""

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the further completions of a row, in their order; see `TokenInputs.extras`."""

    def item(self, example: Example, epoch: int) -> dict[str, Any]:
        """Token ids of an example."""

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Several items as one micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """An opened model and what goes with it, as a policy is handed them.

    Args:
        model: as it is trained: with its LoRA, or with gradients on.
        reference: the model as it was opened, where full fine-tuning needs a reference; else None.
        tokenizer: of the texts.
        files: tokenizer or processor, which is saved beside the weights.
        reader: examples -> items -> micro-batches.
        network: `(model, pack)` -> the model as a network of token layouts.
        base: where a saved LoRA finds its base.
        stock: the classes of transformers that load model and `files`.
        frozen: dtype of what is frozen.
        autocast: that of the mixed precision; None: there is none.
        fingerprint: of the weights as they were opened and of how they are run; empty without a cache.
        wanted: measures beside the logps that the losses ask for.
        note: what else a plan tells of what is trained.
        looked_at: examples that are read before a run, to tell lengths.
    """

    model: Any
    reference: Any
    tokenizer: Any
    files: Any
    reader: Reads
    network: Callable[[Any, bool], TokenNetwork]
    base: str
    stock: tuple[str, str]
    frozen: torch.dtype
    autocast: torch.dtype | None
    fingerprint: Mapping[str, Any]
    wanted: frozenset[str]
    note: str = ""
    looked_at: int = SURVEYED


class TextPolicy:
    """An opened language model in training."""

    library: ClassVar[str] = "transformers"

    def __init__(
        self,
        settings: Any,
        parts: Parts,
        *,
        device: torch.device,
        num_candidates: int,
        caching: int | None,
        asked: frozenset[str],
    ) -> None:
        """Use the `open` of an adapter.

        Args:
            settings: of the adapter; those of `TextAdapter` that tell of training.
            parts: the model, and what goes with it.
            device: where the model is.
            num_candidates: k of the data.
            caching: index of the process, to fill the cache; None: read it.
            asked: names of all data that the losses ask for.
        Raises:
            UserError: a teacher, packing or a cache that does not go with the rest.
        """
        self.settings, self.parts, self.device = settings, parts, device
        self.tokenizer, self.reader = parts.tokenizer, parts.reader
        self.layers = lora_layers(parts.model) if settings.lora is not None else []
        self.wanted = parts.wanted
        self.teacher = open_teacher(settings, self.wanted, parts.model, self.tokenizer, parts.frozen, device)
        taught_padded = self.teacher is not None and not all(one.packs for one in self.teacher.networks)
        self.network = parts.network(parts.model, settings.pack is not False and not taught_padded)
        self._copy = None if parts.reference is None else parts.network(parts.reference, self.network.packs)
        if settings.pack is True and not self.network.packs:
            raise UserError(f"adapter.pack: got true, and {self.network.why_not}. Set it to auto or false.")
        if settings.gradient_checkpointing:
            self.network.checkpoint_gradients(True)
        self.mismatched = settings.mismatched is not False and "anchor" in asked and num_candidates == 1
        self.mean_length: float | None = None
        self.opposed = False
        self.cache: ReferenceBank | None = None
        if settings.cache is not None:
            if self.mismatched:
                raise UserError(
                    "adapter.cache: got one with KTO's anchor on mismatched answers, which differ in every batch. Set "
                    "adapter.mismatched to false, or cache to null."
                )
            precision = f"{parts.fingerprint['precision']} packed={self.network.packs}"
            self.cache = ReferenceBank(Path(settings.cache), {**parts.fingerprint, "precision": precision}, caching)

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
        rows, extras = len(encoded), self.reader.extras
        tokens = tokens_of(
            encoded,
            k,
            len(extras),
            wanted=self.wanted,
            from_difference=self.settings.score == "difference",
            weights=batch["weights"],
        )
        inputs = TokenInputs(
            tokens=tokens,
            num_candidates=k,
            batch=rows,
            extras=extras,
            wanted=self.wanted,
            device=self.device,
            pack=self.network.packs,
            pad=self.tokenizer.pad_token_id or 0,
            mismatched=mismatched_of(encoded) if self.mismatched else None,
            teacher=self.teacher,
            opposed=self.opposed,
            noisy=noisy_of(encoded, k + len(extras), batch["weights"]) if "greedy" in extras else None,
        )
        with torch.autocast(self.device.type, dtype=self.parts.autocast, enabled=self.parts.autocast is not None):
            inputs = inputs.echoed(self.network)
        scored = tokens.scored().to(self.device, non_blocking=True)
        side = {name: value.to(self.device, non_blocking=True) for name, value in batch["side"].items()}
        side["lengths"] = scored[: rows * k].view(rows, k)
        for number, name in enumerate(extras):
            own = scored[(k + number) * rows :][:rows, None]
            side[f"{name}_lengths"] = torch.cat([side[f"{name}_lengths"], own], 1) if f"{name}_lengths" in side else own
        if self.mean_length is not None:
            side["mean_length"] = torch.full_like(scored[:rows], self.mean_length)
        reference = None if self.cache is None or not self.cache.reading else self.cache.measures(inputs)
        samples = rows * (k + len(extras))
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
        self.mean_length = mean_length(self.reader.encoder, examples, self.parts.looked_at)

    def oppose(self) -> None:
        """Be told that the losses see only the difference of a pair's log-ratios; see `TokenInputs.opposed`."""
        self.opposed = True

    def meet(self, examples: Sequence[Example]) -> None:
        """Let the reader take images of other examples for those that are shown them."""
        reader: Any = self.reader
        self.reader = reader.surveyed(examples)

    def groups(self, examples: Sequence[Example]) -> tuple[tuple[int, ...], ...]:
        """Examples of like length, where rows are padded; packed rows need none."""
        return () if self.network.packs else groups_of_like_length(examples, self.settings.group_by_length)

    # --- what sources ask for that make answers --------------------------------------------------------------------

    def prompt_ids(self, prompt: Content) -> list[int]:
        """Token ids of a prompt, up to where the model answers."""
        ids: list[int] = self.reader.encoder.prompt(prompt)
        return ids

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
            save_lora(self.model, folder, self.parts.base, self.settings.revision)
            self.parts.files.save_pretrained(folder)
        else:
            save_full(self.model, self.parts.files, folder / FULL)

    def validate(self, folder: Path) -> None:
        """Write `answers.jsonl`: an answer to every prompt of `validation`."""
        wanted = self.settings.validation
        if wanted is None:
            return
        shown = wanted.media()
        encoder = self.reader.encoder
        contents = [prompt_content(encoder.tokenizer, text, media) for text, media in zip(wanted.prompts, shown, strict=True)]
        answers = [""] * len(contents)
        for group in _answered_together(shown):
            told = [encoder.arguments(contents[n]) if shown[n] else {} for n in group]
            found = generate_texts(
                self.model,
                self.tokenizer,
                [told[0]["input_ids"][0].tolist()] if told[0] else [encoder.prompt(contents[n]) for n in group],
                max_new_tokens=wanted.max_new_tokens,
                temperature=wanted.temperature,
                seeds=[wanted.seed + n for n in group],
                shown={name: tensor for name, tensor in told[0].items() if name not in ("input_ids", "attention_mask")},
            )
            for n, answer in zip(group, found, strict=True):
                answers[n] = answer
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"prompt": prompt, **({"image": media[0].path} if media else {}), "answer": answer}
            for prompt, media, answer in zip(wanted.prompts, shown, answers, strict=True)
        ]
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
        note = f"; {self.parts.note}" if self.parts.note else ""
        return f"{type(self.model).__name__}, {how}: {share}; {rows}{taught}{note}"

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Lengths of prompts and answers, and how many are cut."""
        return [length_note(self.reader.encoder, examples, self.parts.looked_at)]

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
        model, files = self.parts.stock
        name = files.removeprefix("Auto").lower()
        gguf = getattr(self.settings, "gguf_file", None)
        trust = ", trust_remote_code=True" if self.settings.trust_remote_code else ""
        revision = self.settings.revision if self.settings.lora is not None else None
        more = trust if revision is None else f', revision="{revision}"{trust}'
        if gguf is not None and self.layers:  # peft finds the base's folder, not the file in it
            base = f'"{self.parts.base}", gguf_file="{gguf}"{more}'
            first = f'model = transformers.{model}.from_pretrained({base})\nmodel.load_adapter("{whole}")\n'
        else:
            first = f'model = transformers.{model}.from_pretrained("{whole}"{more})\n'
        return first + (f'{name} = transformers.{files}.from_pretrained("{whole}"{trust})')


def asked_measures(asked: frozenset[str]) -> frozenset[str]:
    """The measures of one pass that these names of data ask for, beside the logps and the further completions."""
    names = {name.removeprefix("reference_") for name in asked}
    return frozenset(names & {"shared", "joint", "agreement", "entropy", *GRADED})


def prompt_content(tokenizer: Any, text: str, images: tuple[Media, ...] = ()) -> Content:
    """A prompt given as words and images before them: the user's message where the tokenizer has a template."""
    if tokenizer.chat_template is None:
        return Content(text=text, images=images)
    return Content(messages=(Message(role="user", text=text, images=images),))


def _answered_together(shown: Sequence[Sequence[Media]]) -> list[list[int]]:
    """Numbers of prompts that are answered in one call: those that show nothing, and each other one alone."""
    plain = [number for number, media in enumerate(shown) if not media]
    return [group for group in (plain, *([number] for number, media in enumerate(shown) if media)) if group]
