"""What the image_text adapter measures of an example: each sequence under the image that it asks for, against the model."""

from typing import Any

import pytest
import torch
from multimodal import in_one_go, picture, sample, token_logps
from torch import Tensor

from mmalign.adapters.image_text import ImageTextAdapter
from mmalign.adapters.image_text_reading import sequences_asked
from mmalign.adapters.options import Lora
from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.multimodal.degradations import DEGRADATIONS
from mmalign.multimodal.tiny_families import template
from mmalign.records import Example

ANSWERS, RIGHT, OTHER = ("red", "a blue one"), picture(0), picture(1)
ASKED = frozenset(
    {"degraded", "each_degraded", "each_absent", "crossed", "greedy", "divergence", "anchored", "policy", "reference"}
)


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def opened(name: str = "noise", **settings: Any) -> Any:
    choice = Choice(name=name, target=DEGRADATIONS[name])
    adapter = ImageTextAdapter(**{"model": "tiny", "lora": Lora(rank=2), "degradation": choice, **settings})
    return adapter.open(asked=ASKED, needs_reference=True)


def example(*, crossed: bool = False, name: str = "row") -> Example:
    images = (RIGHT, OTHER) if crossed else (RIGHT, RIGHT)
    return Example(id=name, samples=tuple(sample("what?", a, image) for a, image in zip(ANSWERS, images, strict=True)))


def prepared(policy: Any, *examples: Example, epoch: int = 0) -> Any:
    return policy.prepare(policy.collate([policy.item(one, epoch) for one in examples]))


def measured_of(policy: Any, inputs: Any) -> dict[str, Tensor]:
    """All measures, without a graph."""
    _, inputs = inputs.refer(policy.network)
    with torch.no_grad():
        found: dict[str, Tensor] = inputs.measures(policy.network)
    return found


def naive_logps(policy: Any, question: str, answer: str, *images: Any) -> Tensor:
    """Sum of an answer's log-probabilities, from the processor and the model alone."""
    whole = {n: v.float() if v.is_floating_point() else v for n, v in in_one_go("llava", question, answer, images).items()}
    count = len(policy.reader.encoder([sample(question, answer, *images)]).continuations[0])
    policy.model.set_attn_implementation({"text_config": "sdpa"})
    with torch.no_grad():
        logits = policy.model(**whole).logits[0]
    policy.model.set_attn_implementation({"text_config": "mmalign_packed"})
    return token_logps(logits, whole["input_ids"][0], count).sum()


def test_every_measure_is_of_the_answer_under_the_image_that_it_names() -> None:
    policy = opened(name="swap")
    first, second = (
        example(crossed=True),
        Example(id="other", samples=(sample("and?", "no", OTHER), sample("and?", "so", OTHER))),
    )
    policy.meet([first, second])
    inputs = prepared(policy, first, second).inputs
    known, inputs = inputs.refer(policy.network)
    with torch.no_grad():
        measured = inputs.measures(policy.network)
    shown = {  # of the first row: (answer, image)
        "policy": [(ANSWERS[0], RIGHT), (ANSWERS[1], OTHER)],
        "degraded": [(ANSWERS[0], OTHER)],
        "each_degraded": [(ANSWERS[0], OTHER), (ANSWERS[1], OTHER)],
        "each_absent": [(ANSWERS[0], None), (ANSWERS[1], None)],
        "crossed": [(ANSWERS[0], OTHER), (ANSWERS[1], RIGHT)],
    }
    for name, sequences in shown.items():
        want = [naive_logps(policy, "what?", answer, *((image,) if image else ())) for answer, image in sequences]
        torch.testing.assert_close(measured[name][0], torch.stack(want), rtol=1e-4, atol=1e-3)
        assert measured[name].shape == (2, len(sequences))
        torch.testing.assert_close(known[name], measured[name], rtol=1e-4, atol=1e-3)  # the LoRA has learnt nothing yet
    torch.testing.assert_close(measured["divergence"], torch.zeros(2, 2), rtol=0, atol=1e-4)
    assert measured["greedy"].shape == (2, 1) and bool((measured["greedy"] <= 0).all())


def test_greedy_is_what_the_model_would_say_under_the_degraded_image_scored_under_the_clean_one() -> None:
    policy = opened(name="drop")
    inputs = prepared(policy, example()).inputs
    ids = policy.reader.encoder([sample("what?", ANSWERS[0])]).continuations[0]
    blind, whole = (in_one_go("llava", "what?", ANSWERS[0], images) for images in ((), (RIGHT,)))
    whole = {name: value.float() if value.is_floating_point() else value for name, value in whole.items()}
    policy.model.set_attn_implementation({"text_config": "sdpa"})
    with torch.no_grad():
        said = policy.model(**blind).logits[0, -len(ids) - 1 : -1].argmax(-1)
        scores = policy.model(**whole).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    policy.model.set_attn_implementation({"text_config": "mmalign_packed"})
    want = scores.gather(1, said[:, None]).sum()
    got = measured_of(policy, inputs)["greedy"]
    torch.testing.assert_close(got[0, 0], want, rtol=1e-4, atol=1e-3)
    assert tuple(said.tolist()) != ids


def test_the_draw_belongs_to_example_and_epoch_and_is_shared_by_candidates() -> None:
    policy = opened()

    def keys(*names: str, epoch: int = 0) -> list[tuple[str, ...]]:
        found = []
        for name in names:
            media = policy.item(example(name=name), epoch)["encoded"].media
            found.append(tuple(seen.key for seen in media if seen is not None))
        return found

    alone, (one, two) = keys("a"), keys("a", "b")
    assert alone[0] == one and one != two and keys("a", epoch=1)[0] != one
    assert len(set(one)) == 2  # as it is, and under the noise: one draw for all candidates


def test_weights_of_tokens_hold_under_every_image() -> None:
    choice = Choice(name="mine", target=lambda example, encoded: [[2.0] * n for n in encoded.lengths[: len(example.samples)]])
    plain, weighted = (prepared(opened("blank", token_weights=w), example()).inputs for w in (None, choice))
    policy = opened("blank")
    one, two = measured_of(policy, plain), measured_of(policy, weighted)
    for name in ("policy", "degraded", "each_degraded", "each_absent", "crossed"):
        torch.testing.assert_close(two[name], 2 * one[name])


def test_rows_without_an_image_are_scored_beside_those_with_one() -> None:
    policy = opened("blank")
    text = Example(id="text", samples=tuple(sample("what?", answer) for answer in ANSWERS))
    both, alone = prepared(policy, example(), text).inputs, prepared(policy, text).inputs
    together, single = measured_of(policy, both), measured_of(policy, alone)
    torch.testing.assert_close(together["policy"][1:], single["policy"])
    torch.testing.assert_close(together["degraded"][1], together["policy"][1, :1])  # there is nothing to degrade


def test_which_sequences_losses_ask_for() -> None:
    assert sequences_asked(frozenset({"policy", "reference_degraded"}), (), 2) == ("degraded",)
    assert sequences_asked(frozenset({"anchored"}), (), 3) == ("each_degraded",) * 3
    assert sequences_asked(frozenset({"crossed", "gold"}), ("gold",), 2) == ("gold", "crossed", "crossed")
    with pytest.raises(UserError, match="crossed with one candidate"):
        sequences_asked(frozenset({"crossed"}), (), 1)


def test_a_swap_wants_another_example_with_images() -> None:
    policy = opened("swap")
    policy.meet([example()])
    with pytest.raises(UserError, match="swap wants another row with images"):
        policy.item(example(), 0)


def test_names_of_the_template_are_given_to_it() -> None:
    loud = "{% if loud %}!{% endif %}" + template("<image>\n")
    policy = opened("blank", chat_template=loud, chat_template_kwargs={"loud": True})
    encoded = policy.item(example(), 0)["encoded"]
    assert policy.tokenizer.decode(encoded.contexts[0]).startswith("<|endoftext|>!<|im_start|>user")
