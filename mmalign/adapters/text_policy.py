"""A language model in training with preferences: reads examples, prepares the inputs of a step, holds policy and reference."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmalign.adapters.side import side_tensors
from mmalign.adapters.text_cache import ReferenceBank
from mmalign.cache import weights_fingerprint
from mmalign.errors import UserError
from mmalign.language.chat import Encoded, Encoder
from mmalign.language.generation import generate_texts
from mmalign.language.network import TokenNetwork
from mmalign.language.opening import (
    add_lora,
    frozen_copy,
    load_weights,
    lora_layers,
    lora_off,
    open_model,
    open_tokenizer,
    save_full,
    save_lora,
)
from mmalign.language.tiny import TINY, tiny_folder
from mmalign.likelihoods import TokenInputs, Tokens
from mmalign.likelihoods.tokens import first_difference, shared_heads
from mmalign.records import Content, Example
from mmalign.sources import Prepared

if TYPE_CHECKING:
    from mmalign.adapters.text import TextAdapter

logger = logging.getLogger(__name__)

FULL = "model"  # the folder, in a run's output, that a full fine-tune is saved to
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
EXTRAS = ("rationale", "exploration", "gold")
LEAST_IN_GROUP = 32  # examples of like length
SURVEYED = 4096  # examples that are tokenised before a run, to tell lengths and what is cut


@dataclass(frozen=True)
class Reader:
    """Examples -> items, for worker processes; holds a tokenizer and no model."""

    encoder: Encoder
    extras: tuple[str, ...]
    draws: bool
    seed: int

    def item(self, example: Example, epoch: int) -> dict[str, Any]:
        """Token ids of an example's candidates and of the further completions that the losses ask for.

        Raises:
            UserError: a candidate is empty, a completion is missing, or the template refuses the conversation.
        """
        missing = [name for name in self.extras if name not in example.extras]
        if missing:
            raise UserError(f"{example.id}: has no {missing[0]}, which the loss asks for. Add it, or filter the rows.")
        samples = (*example.samples, *(example.extras[name] for name in self.extras))
        try:
            encoded = self.encoder(samples)
        except UserError as fault:
            raise UserError(f"{example.id}: {fault}") from fault
        side = dict(example.side)
        if self.draws:
            digest = hashlib.sha256(f"{self.seed} {epoch} {example.id}".encode()).digest()
            side["draw"] = int.from_bytes(digest[:6], "big") / 2**48
        return {"id": example.id, "encoded": encoded, "side": side, "k": len(example.samples)}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Several items as one micro-batch.

        Raises:
            UserError: the items differ in their number of candidates or in their side data.
        """
        counts = {item["k"] for item in items}
        if len(counts) > 1:
            raise UserError(
                f"data: got {sorted(counts)} candidates in one batch, want one number. "
                "Set data.view.num_candidates, or filter the rows."
            )
        return {
            "id": [item["id"] for item in items],
            "encoded": [item["encoded"] for item in items],
            "side": side_tensors([item["side"] for item in items]),
            "k": next(iter(counts)),
        }


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
        model = self._opened(frozen if settings.lora is not None else torch.float32)
        weights_key = weights_fingerprint(model) if settings.cache is not None else ""
        reference = frozen_copy(model, frozen) if settings.lora is None and needs_reference else None
        if weights is not None:
            load_weights(model, weights)
        elif settings.lora is not None:
            lora = settings.lora
            add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, seed=seed)
        else:
            model.requires_grad_(True)
        self.layers = lora_layers(model) if settings.lora is not None else []
        self.network = TokenNetwork(model, pack=settings.pack is not False)
        self._copy = None if reference is None else TokenNetwork(reference, pack=self.network.packs)
        if settings.pack is True and not self.network.packs:
            raise UserError(f"adapter.pack: got true, and {self.network.why_not}. Set it to auto or false.")
        if settings.gradient_checkpointing:
            self.network.checkpoint_gradients(True)
        self.wanted = asked_measures(asked)
        self.mismatched = settings.mismatched is not False and "anchor" in asked and num_candidates == 1
        extras = tuple(name for name in EXTRAS if {name, f"reference_{name}"} & asked)
        encoder = Encoder(
            tokenizer=self.tokenizer,
            template=settings.template,
            system_prompt=settings.system_prompt,
            eos=settings.eos,
            max_prompt_length=settings.max_prompt_length,
            max_response_length=settings.max_response_length,
        )
        self.reader = Reader(encoder, extras, "draw" in asked, seed)
        self.mean_length: float | None = None
        self.cache: ReferenceBank | None = None
        if settings.cache is not None:
            if self.mismatched:
                raise UserError(
                    "adapter.cache: got one with KTO's anchor on mismatched answers, which differ in every batch. Set "
                    "adapter.mismatched to false, or cache to null."
                )
            precision = f"{frozen} {mixed_precision} {settings.quantization} packed={self.network.packs}"
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
        tokens = self._tokens(encoded, k)
        inputs = TokenInputs(
            tokens=tokens,
            num_candidates=k,
            batch=rows,
            extras=self.reader.extras,
            wanted=self.wanted,
            device=self.device,
            pack=self.network.packs,
            pad=self.tokenizer.pad_token_id or 0,
            mismatched=self._mismatched(encoded) if self.mismatched else None,
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
        """Take the mean number of tokens of the best answers, of at most the first thousands of examples, for `mean_length`.

        One number for the whole run: a mean over tokens then depends on neither micro-batch nor process.
        """
        looked = [examples[i].samples[:1] for i in range(min(len(examples), SURVEYED))]
        lengths = [
            one.lengths[0]
            for start in range(0, len(looked), 256)
            for one in self.reader.encoder.all(looked[start : start + 256])
        ]
        self.mean_length = sum(lengths) / len(lengths)

    def groups(self, examples: Sequence[Example]) -> tuple[tuple[int, ...], ...]:
        """Examples of like length, by characters, where rows are padded; packed rows need none."""
        count = min(self.settings.group_by_length, len(examples) // LEAST_IN_GROUP)
        if self.network.packs or count <= 1:
            return ()
        sizes = [len(e.samples[0].prompt.words()) + max(len(s.completion.words()) for s in e.samples) for e in examples]
        order = sorted(range(len(sizes)), key=lambda i: sizes[i])
        bounds = [round(n * len(order) / count) for n in range(count + 1)]
        return tuple(tuple(sorted(order[a:b])) for a, b in pairwise(bounds))

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
        return f"{type(self.model).__name__}, {how}: {share}; {rows}"

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Lengths of prompts and answers, and how many are cut, of at most the first thousands of examples."""
        looked = [examples[i] for i in range(min(len(examples), SURVEYED))]
        prompts: list[int] = []
        answers: list[int] = []
        cut = [0, 0]
        for start in range(0, len(looked), 256):
            encoded = self.reader.encoder.all([e.samples for e in looked[start : start + 256]])
            for one in encoded:
                prompts += [len(one.contexts[c]) for c in one.context_of]
                answers += one.lengths
                cut = [cut[0] + one.cut_prompts, cut[1] + one.cut_responses]
        of = "" if len(looked) == len(examples) else f" (of the first {len(looked)} examples)"
        return [
            f"tokens     prompts {_spread(prompts)}, answers {_spread(answers)}; cut: {cut[0]} prompts to "
            f"{self.settings.max_prompt_length}, {cut[1]} answers to {self.settings.max_response_length}{of}"
        ]

    @property
    def num_encoder_parameters(self) -> int:
        """There are no frozen encoders beside the model."""
        return 0

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

    def _tokens(self, encoded: Sequence[Encoded], k: int) -> Tokens:
        """Candidates of all rows, then the further completions, name by name."""
        contexts: list[Tensor] = []
        sequences: list[list[tuple[Tensor, int, int]]] = []  # of each row: (ids, context, tokens that are still prompt)
        for one in encoded:
            first = len(contexts)
            contexts += [torch.tensor(ids) for ids in one.contexts]
            sequences.append(
                [
                    (torch.tensor(ids), first + owner, given)
                    for ids, owner, given in zip(one.continuations, one.context_of, one.given, strict=True)
                ]
            )
        chosen = [sequence for row in sequences for sequence in row[:k]]
        chosen += [row[k + n] for n in range(len(self.reader.extras)) for row in sequences]
        skipped = [given for _, _, given in chosen]
        if self.settings.score == "difference" and k > 1:
            for number, row in enumerate(sequences):
                common = first_difference([ids for ids, _, _ in row[:k]])
                for i in range(number * k, number * k + k):
                    skipped[i] = max(skipped[i], min(common, len(chosen[i][0]) - 1))
        heads = None
        if "shared" in self.wanted:
            scored = [len(ids) - skip for (ids, _, _), skip in zip(chosen, skipped, strict=True)]
            rows = [scored[i * k : i * k + k] for i in range(len(encoded))]
            heads = (*shared_heads(rows), *scored[len(encoded) * k :])
            heads = tuple(head + skip for head, skip in zip(heads, skipped, strict=True))
        weights = None
        if any(skipped):
            weights = tuple((torch.arange(len(ids)) >= skip).float() for (ids, _, _), skip in zip(chosen, skipped, strict=True))
        joint = tuple(torch.ones(len(context) - 1) for context in contexts) if "joint" in self.wanted else None
        return Tokens(
            contexts=tuple(contexts),
            continuations=tuple(ids for ids, _, _ in chosen),
            context_of=tuple(owner for _, owner, _ in chosen),
            weights=weights,
            context_weights=joint,
            heads=heads,
        )

    def _mismatched(self, encoded: Sequence[Encoded]) -> Tokens:
        """Each prompt with the answer of the next row, for KTO's anchor."""
        following = [*encoded[1:], encoded[0]]
        return Tokens(
            contexts=tuple(torch.tensor(one.contexts[0]) for one in encoded),
            continuations=tuple(torch.tensor(one.continuations[0]) for one in following),
            context_of=tuple(range(len(encoded))),
        )


def asked_measures(asked: frozenset[str]) -> frozenset[str]:
    """The measures of one pass that these names of data ask for, beside the logps and the further completions."""
    names = {name.removeprefix("reference_") for name in asked}
    return frozenset(names & {"shared", "joint", "agreement", "entropy"})


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


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]} to {ordered[-1]} (median {ordered[len(ordered) // 2]})"
