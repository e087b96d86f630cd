"""Any causal language model as a judge: the probabilities of two letters, the options, as its next token."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.curation.reader import opened
from mmalign.errors import UserError

TEMPLATE = """Two answers to the same request follow. Decide which of them serves the person who asked better.

# Request
{prompt}

# Answer {A}
{first}

# Answer {B}
{second}

Reply with one letter, {A} or {B}: the better answer."""


class LanguageModelJudge:
    """A causal language model that is opened when it is first asked (see `language_model`)."""

    def __init__(
        self,
        *,
        name: str,
        model: str,
        revision: str | None,
        template: str,
        options: tuple[str, str],
        dtype: str,
        batch_size: int,
        device: str,
    ) -> None:
        """Nothing is opened yet: a dry run, or a run whose verdicts are all known, costs no model."""
        self._name, self.model, self.revision = name, model, revision
        self.template, self.options, self.dtype, self.batch_size = template, options, dtype, batch_size
        self.device = device
        self._opened: tuple[Any, Any] | None = None

    @property
    def name(self) -> str:
        """Under which its verdicts are kept."""
        return self._name

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Float[Tensor, " n"]:
        """P(the first is better) = p(A) / (p(A) + p(B)) of each pair. On the CPU, float32.

        Raises:
            UserError: the model cannot be opened, or a question is longer than it reads.
        """
        if not prompts:
            return torch.zeros(0)
        network, tokenizer = self._open()
        frame = Frame.of(tokenizer, self.options)
        ids = [frame.ids(tokenizer, self._question(*one)) for one in zip(prompts, first, second, strict=True)]
        self._check_lengths(network, ids)
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        probs = torch.zeros(len(ids))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            logits = last_logits(network, [ids[place] for place in places])
            probs[places] = logits[:, list(frame.options)].float().softmax(-1)[:, 0].cpu()
        return probs

    def _question(self, prompt: str, first: str, second: str) -> str:
        one, other = self.options
        values = {"{A}": one, "{B}": other, "{prompt}": prompt, "{first}": first, "{second}": second}
        # all names at once, so that a brace in a response stays what it is
        return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], self.template)

    def _check_lengths(self, network: Any, ids: Sequence[Sequence[int]]) -> None:
        limit = getattr(network.config, "max_position_embeddings", None)
        longest = max(map(len, ids))
        if limit is not None and longest > limit:
            raise UserError(
                f"judge {self.name}: got a question of {longest} tokens, want at most {limit}, which the model reads. Leave "
                "long rows out, or take a model that reads more."
            )

    def _open(self) -> tuple[Any, Any]:
        if self._opened is None:
            self._opened = opened(f"judge {self.name}", self.model, self.revision, self.dtype, self.device)
        return self._opened


@dataclass(frozen=True)
class Frame:
    """Token ids before and after a question, up to where the two options differ, and the tokens that tell them apart there."""

    before: list[int]
    after: list[int]
    options: tuple[int, int]

    @classmethod
    def of(cls, tokenizer: Any, options: tuple[str, str]) -> "Frame":
        """That of a tokeniser: its chat template, or without one a line that asks for the answer.

        Raises:
            UserError: the options are the same to the tokeniser, or one begins with the other.
        """
        before, after = _around(tokenizer)
        ids = [tokenizer(after + option, add_special_tokens=False)["input_ids"] for option in options]
        shared = next((n for n, (one, other) in enumerate(zip(*ids, strict=False)) if one != other), None)
        if shared is None:
            raise UserError(f"options: got {' and '.join(options)}, which do not differ as tokens. Choose others, say A and B.")
        return cls(before, ids[0][:shared], (ids[0][shared], ids[1][shared]))

    def ids(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids of a question, up to where the answer is read off.

        A control token that is written in it is read as plain text: no response can end its turn and speak for the judge.
        """
        return [
            *self.before,
            *tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"],
            *self.after,
        ]


def _around(tokenizer: Any) -> tuple[list[int], str]:
    """Token ids of what stands before a question, and the text after it, which the answer follows."""
    if tokenizer.chat_template is None:
        return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], "\nAnswer: "
    mark = "QUESTION"
    turns = [{"role": "user", "content": mark}]
    before, _, after = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).partition(mark)
    return tokenizer(before, add_special_tokens=False)["input_ids"], after


def last_logits(network: Any, ids: Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab"]:
    """Next-token logits after each text. Texts are padded on the right, which no causal model sees.

    Of the whole (batch, seq, vocab) only the last positions are computed where the model can.
    """
    lengths = torch.tensor([len(one) for one in ids])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    last, place = torch.unique(lengths - 1, return_inverse=True)
    device = next(network.parameters()).device
    few = "logits_to_keep" in inspect.signature(network.forward).parameters
    more = {"logits_to_keep": last.to(device)} if few else {}
    logits = network(input_ids=padded.to(device), attention_mask=mask.long().to(device), use_cache=False, **more).logits
    rows = torch.arange(len(ids), device=device)
    found: Tensor = logits[rows, (place if few else lengths - 1).to(device)]
    return found


def _filled(template: str, values: dict[str, str]) -> str:
    """The template with its names replaced once, so that a brace in a response stays what it is."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], template)


def language_model(
    *,
    model: str,
    revision: str | None = None,
    label: str | None = None,
    template: str = TEMPLATE,
    options: tuple[str, str] = ("A", "B"),
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 8,
    device: str = "auto",
) -> LanguageModelJudge:
    """A causal language model that is shown two responses and asked for a letter.

    P(first) = p(A) / (p(A) + p(B)),  p of the next token

    Source: as LLM-as-a-judge (arXiv 2306.05685), read off the option tokens as for DBG (arXiv 2506.02592); our own wording.

    Args:
        model: folder or hub id; asked through its chat template where it has one.
        revision: of a hub id.
        label: name of the judge; None: the last part of `model`.
        template: with {prompt}, {first}, {second}, and {A}, {B} for the options. Evidence, rules and examples go here.
        options: two texts that begin with different tokens.
        dtype: of the weights.
        batch_size: questions at a time.
        device: auto, cpu, cuda ...

    Raises:
        UserError: a template without one of its three names, a batch size below 1.
    """
    lacking = [part for part in ("{prompt}", "{first}", "{second}") if part not in template]
    if lacking:
        raise UserError(f"template: got none of {', '.join(lacking)} in it, want all of {{prompt}}, {{first}} and {{second}}.")
    if batch_size < 1:
        raise UserError(f"batch_size: got {batch_size}, want 1 or more.")
    return LanguageModelJudge(
        name=label or model.rstrip("/").rpartition("/")[2],
        model=model,
        revision=revision,
        template=template,
        options=options,
        dtype=dtype,
        batch_size=batch_size,
        device=device,
    )
