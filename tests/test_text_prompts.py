"""Prompts reach a language model as they do when it answers, within its positions and its vocabulary."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics_of
from text_runs import train_text
from tiny_causal import tiny_causal
from transformers import LlamaConfig, LlamaForCausalLM

from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_tokens import tokens_of
from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.language.chat import Encoded, Encoder
from mmalign.language.opening import check_vocabulary
from mmalign.language.tiny import tiny_tokenizer
from mmalign.likelihoods import TokenInputs
from mmalign.losses import LOSSES
from mmalign.records import Content, Message, Sample

# The system message goes into the last turn, if that is the user's: answered, the prompt is written otherwise.
LAST_TURN = (
    "{% if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}"
    "{% else %}{% set system, turns = '', messages %}{% endif %}<s>{% for m in turns %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TERSE = Content(messages=(Message(role="system", text="Be terse."), Message(role="user", text="What is the name?")))


def encoder(**settings: Any) -> Encoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = settings.pop("chat_template", tokenizer.chat_template)
    return Encoder(tokenizer=tokenizer, **settings)


@pytest.mark.parametrize("answer", ["a yes", "What is the name?", "What"])
def test_a_prompt_that_the_template_rewrites_once_it_is_answered_stays_what_the_model_answers_to(answer: str) -> None:
    encode = encoder(chat_template=LAST_TURN)
    found = encode([Sample(prompt=TERSE, completion=Content(text=answer))])
    assert encode.tokenizer.decode(found.contexts[0]) == "<s>[INST] Be terse.\n\nWhat is the name?[/INST]"
    assert list(found.contexts[0]) == encode.prompt(TERSE)
    assert encode.tokenizer.decode(found.continuations[0]) == f" {answer}</s>"
    assert found.given == (0,)


def test_a_template_that_rewrites_prompt_and_answer_is_refused() -> None:
    shouting = LAST_TURN.replace("{{ m.content }}</s>", "{{ m.content | upper }}</s>")
    with pytest.raises(UserError, match="otherwise once it is answered, and the answer cannot be told apart"):
        encoder(chat_template=shouting)([Sample(prompt=TERSE, completion=Content(text="a yes"))])


def test_a_system_prompt_for_plain_texts_is_refused() -> None:
    sample = Sample(prompt=Content(text="hi"), completion=Content(text="there"))
    with pytest.raises(UserError, match=r"adapter\.system_prompt: .* Set adapter\.template to always"):
        encoder(system_prompt="Be terse.")([sample])
    assert encoder(system_prompt="Be terse.", template="always")([sample]).continuations


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(UserError, match="got an empty one, want a message"):
        encoder(template="always")([Sample(prompt=Content(), completion=Content(text="there"))])


def test_a_text_beyond_the_models_positions_is_refused_with_its_length() -> None:
    sample = Sample(prompt=Content(text="ab" * 20), completion=Content(text="cd"))
    with pytest.raises(UserError, match="of 43 tokens, and the model has positions for 42"):
        encoder(positions=42)([sample])
    assert encoder(positions=43)([sample]).lengths == (3,)


def test_joint_scores_the_tokens_of_the_prompt_that_another_answer_merges_away() -> None:
    row = Encoded(contexts=((5, 6, 7),), continuations=((8, 1, 2), (9, 3)), context_of=(0, 0), given=(1, 0))
    tokens = tokens_of([row], 2, wanted=frozenset({"joint"}))
    inputs = TokenInputs(tokens=tokens, num_candidates=2, batch=1, wanted=frozenset({"joint"}))

    def counts(layout: Any, wanted: frozenset[str]) -> dict[str, torch.Tensor]:
        return {"logps": torch.zeros(layout.num_slots).index_add(0, layout.slot, torch.ones(len(layout.slot)))}

    measured = inputs.measures(counts)
    assert measured["policy"].tolist() == [[2.0, 2.0]]
    assert measured["joint"].tolist() == [[5.0, 4.0]]  # of 6 and 5 tokens, all but the first


@pytest.mark.parametrize(
    ("name", "settings", "k"),
    [("simpo", {}, 2), ("nll", {}, 2), ("kto", {}, 1), ("dpo", {"divergence": "js"}, 2), ("ipo", {}, 2)],
)
def test_scoring_from_the_first_difference_is_refused_where_it_would_change_the_loss(
    name: str, settings: dict[str, Any], k: int
) -> None:
    adapter = TextAdapter(model="tiny", score="difference")
    with pytest.raises(UserError, match=f"got difference with loss {name}"):
        adapter.check_losses([Choice(name=name, target=LOSSES[name], settings=settings)], k)
    for summed, more in (("dpo", {"beta": 0.1}), ("ipo", {"normalise": "none"})):
        adapter.check_losses([Choice(name=summed, target=LOSSES[summed], settings=more)], 2)


def test_under_bfloat16_the_reference_of_a_full_fine_tune_starts_as_the_policy(tmp_path: Path) -> None:
    run = train_text(tmp_path / "run", adapter={"lora": None}, training={"steps": 1, "mixed_precision": "bf16"})
    (row,) = metrics_of(run)
    assert row["rewards/chosen"] == row["rewards/rejected"] == 0.0
    assert row["rewards/accuracies"] == 0.5


def test_a_dtype_without_lora_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype: got bfloat16 without lora"):
        TextAdapter(model="tiny", dtype="bfloat16")


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"adapter\.tokenizer: got one of \d+ tokens for a model of 8"):
        check_vocabulary(LlamaForCausalLM(LlamaConfig(vocab_size=8, **SMALL)), tiny_tokenizer())


@pytest.mark.parametrize(
    ("name", "coefficient", "told"), [("mixtral", 0.02, True), ("mixtral", 0.0, False), ("llama", None, False)]
)
def test_a_mixture_of_experts_is_told_that_its_auxiliary_loss_is_not_added(
    name: str, coefficient: float | None, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    more = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    with caplog.at_level(logging.WARNING):
        check_vocabulary(tiny_causal(name, dtype=torch.float32, vocab_size=600, **more), tiny_tokenizer())
    assert ("(router_aux_loss_coef 0.02) is not added, unlike in TRL" in caplog.text) == told


def test_a_lora_in_place_of_a_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = train_text(tmp_path / "run", adapter={"lora": {"rank": 2}}, training={"steps": 1})
    with pytest.raises(UserError, match=r"is a LoRA, want a whole model\. Merge it into its base"):
        TextAdapter(model=str(run), tokenizer="tiny").open()
