"""A small real language model, pretrained here on the Python manual's reference topics: the tiny base of the text quickstart.

The corpus is `pydoc_data.topics`, about 450 000 characters of English and code that come with Python; tokenizer and model are
stock transformers classes, 0.8 million parameters, and the folder that is saved opens like any other language model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mmalign.digits import Base, descend, progress
from mmalign.errors import UserError

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
VOCABULARY = 1024
WINDOW = 96  # tokens of a training window
EVERY = 5  # of the topics, sorted by name, one in so many is held out
PROMPT_WORDS = 16


@dataclass(frozen=True, kw_only=True)
class ProsePretraining:
    """How long the base is trained. The rest of the recipe is measured for this number and stands in the code.

    Args:
        steps: of 16 windows of 96 tokens.
    """

    steps: int = 320

    def __post_init__(self) -> None:
        """Refuse a number without meaning."""
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, want 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The topics, in two parts: those the base is trained on, and those it never sees."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


@cache
def corpus() -> Corpus:
    """The manual's topics of this Python."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    held_out = tuple(texts[::EVERY])
    return Corpus(trained=tuple(text for n, text in enumerate(texts) if n % EVERY), held_out=held_out)


def paragraphs(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prose and other paragraphs, told apart by layout alone: the manual indents code, grammar and tables, and no prose.

    List items, headings and paragraphs with fewer than 8 words are neither.
    """
    prose: list[str] = []
    other: list[str] = []
    for block in (block for text in texts for block in re.split(r"\n\s*\n", text)):
        lines = block.splitlines()
        if len(block.split()) < 8 or any(set(line.strip()) <= set("*=-+~^|") and line.strip() for line in lines):
            continue
        if all(line[:1].isalpha() for line in lines):
            prose.append(block)
        elif all(line.startswith("   ") for line in lines) and re.search(r"::=|>>>|\w\(|=", block):
            other.append(block)
    return prose, other


def prompts(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """So many beginnings of 16 words from random places, alike in code and prose; each ends with a word, without a space."""
    generator = random.Random(seed)
    ends = [[match.end() for match in re.finditer(r"\S+", text)] for text in texts]
    usable = [n for n, places in enumerate(ends) if len(places) > 3 * PROMPT_WORDS]
    found = []
    for _ in range(count):
        number = generator.choices(usable, [len(ends[n]) for n in usable])[0]
        first = generator.randrange(len(ends[number]) - 2 * PROMPT_WORDS)
        start = re.compile(r"\S").search(texts[number], ends[number][first])
        assert start is not None
        found.append(texts[number][start.start() : ends[number][first + PROMPT_WORDS]])
    return found


def fingerprint(pretraining: ProsePretraining, seed: int) -> str:
    """A hash of everything that decides the weights: settings, seed, the corpus and the text of this file."""
    recipe = json.dumps({**asdict(pretraining), "seed": seed, "corpus": corpus().trained}, sort_keys=True)
    return hashlib.sha256(recipe.encode() + Path(__file__).read_bytes()).hexdigest()[:12]


def pretrained(pretraining: ProsePretraining, *, seed: int, cache: Path) -> Base:
    """The pretrained model of this recipe and seed, from the cache or trained now.

    It is written beside and renamed: a folder that stands is complete, whatever was killed.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache / f"prose-{fingerprint(pretraining, seed)}"
    if (folder / "config.json").is_file():
        return Base(folder=folder, reused=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, model = pretrain(pretraining)
    keep(folder, tokenizer, model)
    return Base(folder=folder, reused=False)


def keep(folder: Path, *parts: Any) -> None:
    """Write tokenizer and model to a folder of a cache, in one piece.

    Raises:
        UserError: the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as fault:
        raise UserError(
            f"cache: got {folder.parent}, which cannot be written ({fault}). Name another folder with cache=..."
        ) from fault
    try:
        for part in parts:
            part.save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was quicker with the same weights
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def pretrain(pretraining: ProsePretraining) -> tuple[Any, Any]:
    """Train tokenizer and model on the corpus; returns both, the model in eval mode.

    Cross-entropy on random windows of all topics in one line, AdamW at 3e-3, warm-up, then a cosine to zero.
    """
    tokenizer = byte_tokenizer(corpus().trained)
    model = _model(tokenizer).train()
    tokens = token_line(tokenizer, corpus().trained)
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.98), fused=True)
    steps = pretraining.steps
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for _ in progress(steps, "language model"):
        starts = torch.randint(len(tokens) - WINDOW, (16,))
        ids = tokens[starts[:, None] + torch.arange(WINDOW)]
        descend(model(input_ids=ids, labels=ids, use_cache=False).loss, optimiser, rate, parameters)
    return tokenizer, model.eval()


def byte_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-pair encoding of 1024 entries, learnt from these texts, as a fast tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False)


def token_line(tokenizer: Any, texts: Sequence[str]) -> Int[Tensor, " tokens"]:
    """All texts one after another, each with the end of a text behind it."""
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], *, most_windows: int = 128) -> float:
    """exp of the mean negative log-likelihood of a token, in windows as in training, from the beginning of the texts on."""
    tokens = token_line(tokenizer, texts)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)[:most_windows]
    losses = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) for ids in torch.split(windows, 32)]
    counts = [len(ids) for ids in torch.split(windows, 32)]
    return math.exp(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))


def _model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
