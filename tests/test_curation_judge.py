"""A causal language model as a judge: its letters' probabilities, its batches, and what it refuses; on a tiny Llama."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmalign.curation import JUDGES, language_model
from mmalign.curation.judge import Frame, last_logits
from mmalign.curation.judging import PairJudge, both_orders
from mmalign.errors import UserError
from mmalign.families.parts import tiny_qwen_tokenizer

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS, FIRST, SECOND = ["Say hi.", "Add 1 and 1, {first}."], ["Hi!", "It is 2."], ["Go away, please.", "3"]


def tiny_llama(folder: Path, chat_template: str | None, max_length: int = 2048) -> Path:
    """A Llama of two layers with random weights, and a tokeniser of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_qwen_tokenizer(chat_template)
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=max_length,
            initializer_range=0.3,
        )
    )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["chat", "plain"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp(request.param), CHAT if request.param == "chat" else None)


def opened(model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)


def test_the_probability_is_that_of_the_first_letter_among_the_two(model: Path) -> None:
    network, tokenizer = opened(model)
    judge = language_model(model=str(model), template="{prompt}|{first}|{second}|{A}{B}")
    probs = judge(PROMPTS, FIRST, SECOND)
    for place, (prompt, first, second) in enumerate(zip(PROMPTS, FIRST, SECOND, strict=True)):
        question = f"{prompt}|{first}|{second}|AB"
        chat = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        text = question + "\nAnswer: " if tokenizer.chat_template is None else chat
        with torch.no_grad():
            logits = network(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1]
        letters = tokenizer.convert_tokens_to_ids(["A", "B"])
        assert float(probs[place]) == pytest.approx(float(logits[letters].softmax(-1)[0]), abs=1e-6)
    assert isinstance(judge, PairJudge) and judge.name == model.name
    assert probs[0] != probs[1]


def test_a_verdict_is_the_same_in_any_batch(model: Path) -> None:
    many = [text for text in ("a", "bb" * 9, "c c", "d" * 40, "e") for _ in range(2)]
    alone, together = (
        language_model(model=str(model), batch_size=size)(many, many[::-1], [text + "!" for text in many]) for size in (1, 4)
    )
    assert alone.tolist() == pytest.approx(together.tolist(), abs=1e-5)
    assert len(set(alone.tolist())) == 5


def test_both_orders_are_asked_with_the_responses_exchanged(model: Path) -> None:
    judge = language_model(model=str(model))
    verdicts = both_orders(judge, PROMPTS, FIRST, SECOND)
    assert verdicts.forward.tolist() == judge(PROMPTS, FIRST, SECOND).tolist()
    assert verdicts.backward.tolist() == pytest.approx((1 - judge(PROMPTS, SECOND, FIRST)).tolist())


def test_no_response_can_end_its_turn(tmp_path: Path) -> None:
    _, tokenizer = opened(tiny_llama(tmp_path, CHAT))
    frame = Frame.of(tokenizer, ("A", "B"))
    [end] = tokenizer("<|im_end|>")["input_ids"]
    ids = frame.ids(tokenizer, "x<|im_end|>y")
    assert ids.count(end) == 1, "the template's own"
    assert tokenizer.decode(ids) == "<|im_start|>user\nx<|im_end|>y<|im_end|>\n<|im_start|>assistant\n"


def test_options_that_begin_alike_are_read_where_they_differ(tmp_path: Path) -> None:
    _, tokenizer = opened(tiny_llama(tmp_path, None))
    frame = Frame.of(tokenizer, ("one", "other"))
    assert tokenizer.decode(frame.after) == "\nAnswer: o"
    assert tokenizer.convert_ids_to_tokens(list(frame.options)) == ["n", "t"]
    with pytest.raises(UserError, match="do not differ as tokens"):
        Frame.of(tokenizer, ("A", "A"))
    with pytest.raises(UserError, match="do not differ as tokens"):
        Frame.of(tokenizer, ("A", "AB"))


class Whole(nn.Module):
    """A model that can only give the logits of every position."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_only_the_last_logits_are_computed_and_they_are_the_same(model: Path) -> None:
    network, _ = opened(model)
    ids = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1, 2]]
    with torch.no_grad():
        few, whole = last_logits(network, ids), last_logits(Whole(network), ids)
        alone = torch.cat([network(torch.tensor([one])).logits[:, -1] for one in ids])
    torch.testing.assert_close(few, whole)
    torch.testing.assert_close(few, alone)


def test_braces_in_a_response_stay_what_they_are(model: Path) -> None:
    judge = language_model(model=str(model), template="{prompt}|{first}|{second}")
    same = judge(["p"], ["{second}"], ["x"])
    assert same.tolist() != judge(["p"], ["x"], ["x"]).tolist()


def test_a_model_is_opened_when_it_is_asked() -> None:
    judge = JUDGES["language_model"](model="nowhere/at-all")
    assert judge([], [], []).tolist() == [], "nothing was asked"
    with pytest.raises(UserError, match="judge at-all: cannot open nowhere/at-all"):
        judge(["p"], ["a"], ["b"])


def test_a_question_that_is_too_long_is_refused(tmp_path: Path) -> None:
    judge = language_model(model=str(tiny_llama(tmp_path, None, max_length=64)))
    with pytest.raises(UserError, match=r"got a question of \d+ tokens, want at most 64"):
        judge(["p"], ["a"], ["b"])


def test_a_template_without_the_responses_is_refused() -> None:
    with pytest.raises(UserError, match=r"template: got none of \{second\} in it"):
        language_model(model="x", template="{prompt} {first}")
