"""Parts of a text step on their own: the output layer, and tokenising."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from measuring import Answer, GateError, LiveBytes, Ratio, gate, interleaved
from text_toy import Size
from torch import Tensor

from mmalign.adapters.text_reading import Reader
from mmalign.language.chat import Encoded, Encoder
from mmalign.language.head import Head, slot_sums
from mmalign.language.tiny import TEMPLATE, tiny_tokenizer
from mmalign.records import Content, Example, Message, Sample

TRL = "TRL"
OURS = "mmalign"
AT_ONCE = "mmalign, all rows in one call"
FULL_LOGITS = "all logits at once"
SIGNS = (1.0, -1.0)  # of the gradient of the pair's two sums


def timing(ratio: Ratio) -> dict[str, Any]:
    """A ratio as JSON; without a claim where the rounds disagree."""
    return {
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "spread": ratio.spread,
        "reliable": ratio.reliable,
        "cpu_seconds": ratio.seconds,
    }


class OutputLayer:
    """Sums of the log-probabilities of two answers, and their gradient, from hidden states of the answers' positions."""

    def __init__(self, size: Size, vocab: int, *, trained: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(2 * size.head, size.width, generator=draw).requires_grad_()
        self.weight = (0.05 * torch.randn(vocab, size.width, generator=draw)).requires_grad_(trained)
        self.target = torch.randint(vocab, (2 * size.head,), generator=draw)
        self.slot = torch.arange(2).repeat_interleave(size.head)
        self.counts = (size.head,) * 2

    def run(self, sums: Callable[[], Tensor]) -> Tensor:
        """Sums and their backward pass, from nothing."""
        self.hidden.grad = self.weight.grad = None
        out = sums()
        (out * out.new_tensor(SIGNS)).sum().backward()
        return out.detach()

    def trl(self) -> Tensor:
        """TRL's, with the outputs that its metrics ask for at every step."""
        from trl.trainer import utils

        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
        chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        logps = utils._ChunkedLogProbFunction.apply(
            self.hidden, self.weight, None, self.target, 1.0, chunk, None, 1.0, outputs
        )[0]
        return torch.stack([part.sum() for part in logps.chunk(2)])

    def ours(self) -> Tensor:
        """mmalign's, as a run of DPO has it: the gradients of the two sums are known to be opposite."""
        head = Head(weight=self.weight)
        return slot_sums(self.hidden, head, self.target, self.slot, self.counts, opposed=((0, 1),))["logps"]

    def naive(self) -> Tensor:
        """The logits of all these positions, their log-softmax, and autograd."""
        logps = (self.hidden @ self.weight.T).log_softmax(1).gather(1, self.target[:, None])[:, 0]
        return torch.stack([part.sum() for part in logps.chunk(2)])

    def answer(self, sums: Callable[[], Tensor]) -> Answer:
        """Difference of the mean log-probabilities, and gradients; of the sums it would show their rounding."""
        out = self.run(sums)
        gradient = {name: t.grad for name, t in (("hidden", self.hidden), ("weight", self.weight)) if t.grad is not None}
        return Answer(float((out * out.new_tensor(SIGNS)).sum()) / self.counts[0], gradient)


def head_rows(size: Size, vocabs: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """The output layer alone, trained and frozen.

    Raises:
        GateError: two ways do not compute the same.
    """
    rows = []
    for vocab in vocabs:
        for trained in (True, False):
            layer = OutputLayer(size, size.vocabs[vocab], trained=trained)
            ways = {TRL: layer.trl, FULL_LOGITS: layer.naive, OURS: layer.ours}
            peer = layer.answer(layer.trl)
            mode = f"vocabulary {vocab}, {'trained' if trained else 'frozen'}"
            checked = {name: gate(f"{mode}: {name}", layer.answer(way), peer) for name, way in ways.items()}
            peaks = {name: _peak(layer, way) for name, way in ways.items()}
            steps = {name: partial(layer.run, way) for name, way in ways.items()}
            before = os.getloadavg()
            for name, ratio in interleaved(steps, peer=TRL, rounds=rounds).items():
                goals = ((2.3, 0.85) if trained else (3.0, 0.75)) if name == OURS else (None, None)
                rows.append(
                    {"suite": "head", "mode": mode, "variant": name, "peer": TRL, "rounds": rounds, "goal": goals[0]}
                    | {"gate": checked[name], **timing(ratio), "peak_bytes": peaks[name]}
                    | {"memory_ratio": peaks[name] / peaks[TRL], "memory_goal": goals[1]}
                    | {"load": [before, os.getloadavg()]}
                )
    return rows


def _peak(layer: OutputLayer, way: Callable[[], Tensor]) -> int:
    layer.hidden.grad = layer.weight.grad = None
    with LiveBytes() as live:
        layer.run(way)
    return live.peak


def tokenising_rows(size: Size, rounds: int) -> list[dict[str, Any]]:
    """Pairs to token ids: TRL's three calls a row, ours a row at a time and all rows in one call.

    Raises:
        GateError: the ids differ.
    """
    rows, tokenizer = [], _tokenizer()
    for chat in (False, True):
        examples = _documents(size.documents, chat)
        reader = Reader(Encoder(tokenizer=tokenizer), (), False, 0)
        told = [_in_trl_format(example, chat) for example in examples]
        ways: dict[str, Callable[[], list[Any]]] = {
            TRL: lambda told=told: [_trl_ids(tokenizer, row) for row in told],
            OURS: lambda examples=examples, reader=reader: [reader.item(example, 0)["encoded"] for example in examples],
            AT_ONCE: lambda examples=examples, reader=reader: reader.encoder.all([one.samples for one in examples]),
        }
        mode = f"{size.documents} pairs, {'conversations' if chat else 'plain texts'}"
        wanted = ways[TRL]()
        for name in (OURS, AT_ONCE):
            if [_sequences(encoded) for encoded in ways[name]()] != wanted:
                raise GateError(f"{mode}: {name}: got other token ids than TRL's. Nothing is timed.")
        before = os.getloadavg()
        for name, ratio in interleaved(ways, peer=TRL, rounds=rounds).items():
            rows.append(
                {"suite": "tokenising", "mode": mode, "variant": name, "peer": TRL, "rounds": rounds}
                | {"goal": 1.35 if name == AT_ONCE else None, **timing(ratio), "load": [before, os.getloadavg()]}
            )
    return rows


def _sequences(encoded: Encoded) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each sample, the tokens of the prompt that are run with the answer put back to it."""
    out = []
    for ids, owner, given in zip(encoded.continuations, encoded.context_of, encoded.given, strict=True):
        out.append(([*encoded.contexts[owner], *ids[:given]], list(ids[given:])))
    return out


def _trl_ids(tokenizer: Any, row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """As `tokenize_fn` in TRL's DPOTrainer: prompt, prompt and chosen, prompt and rejected, then the common prefix."""
    from trl.data_utils import _tokenize, common_prefix_length

    more = {"add_generation_prompt": True} if isinstance(row["prompt"], list) else {}
    prompt = _tokenize(tokenizer, row["prompt"], **more)["input_ids"]
    wholes = [_tokenize(tokenizer, row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")]
    length = min(common_prefix_length(prompt, whole) for whole in wholes)
    return [(prompt[:length], whole[length:]) for whole in wholes]


def _tokenizer() -> Any:
    """A byte-level BPE of 8000 entries, learnt from English that comes with Python, with a template of turns."""
    tokenizer = tiny_tokenizer().train_new_from_iterator(_paragraphs(), 8000)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _paragraphs() -> list[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    return [part for text in topics.values() for part in str(text).split("\n\n") if len(part) > 80]


def _documents(number: int, chat: bool) -> list[Example]:
    """Pairs of English paragraphs."""
    texts = _paragraphs()
    out = []
    for place in range(number):
        question, *answers = (texts[(3 * place + n) % len(texts)].strip() for n in range(3))
        prompt = Content(messages=(Message(role="user", text=question),)) if chat else Content(text=question + "\n")
        samples = tuple(Sample(prompt=prompt, completion=Content(text=answer)) for answer in answers)
        out.append(Example(id=str(place), samples=samples))
    return out


def _in_trl_format(example: Example, chat: bool) -> dict[str, Any]:
    best, worst = (sample.completion.words() for sample in example.samples)
    prompt = example.samples[0].prompt
    if not chat:
        end = "<|endoftext|>"
        return {"prompt": prompt.words(), "chosen": best + end, "rejected": worst + end}
    said = {"chosen": best, "rejected": worst}
    return {"prompt": [{"role": "user", "content": prompt.words()}]} | {
        name: [{"role": "assistant", "content": text}] for name, text in said.items()
    }
