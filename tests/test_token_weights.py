"""Weights of tokens: a function of the config's, or NextQuill's from a file, times the tokens' log-probabilities."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics_of
from text_runs import PAIRS, model_folder, train_text

from mmalign.adapters.options import Lora
from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_tokens import tokens_of
from mmalign.config import Choice, Table
from mmalign.curation.token_effects import TOKEN_WEIGHTS
from mmalign.errors import UserError
from mmalign.language.chat import Encoded
from mmalign.records import Content, Example, Sample

TABLE = Table(TOKEN_WEIGHTS)


def by_place(example: Example, encoded: Encoded, *, first: float = 0.5) -> list[list[float]]:
    """`first` for the first token of a candidate, 2 for the second, 0 for the third, 1 for what follows."""
    lengths = encoded.lengths[: len(example.samples)]
    return [([first, 2.0, 0.0] + [1.0] * length)[:length] for length in lengths]


def plain(example: Example, encoded: Encoded) -> list[list[float]]:
    return [[1.0] * length for length in encoded.lengths[: len(example.samples)]]


def none_at_all(example: Example, encoded: Encoded) -> list[list[float]]:
    return [[0.0] * length for length in encoded.lengths[: len(example.samples)]]


def too_few(example: Example, encoded: Encoded) -> list[list[float]]:
    return [[1.0]] * len(example.samples)


def negative(example: Example, encoded: Encoded) -> list[list[float]]:
    return [[-1.0] * length for length in encoded.lengths[: len(example.samples)]]


def examples() -> list[Example]:
    def sample(prompt: str, answer: str) -> Sample:
        return Sample(prompt=Content(text=prompt), completion=Content(text=answer))

    return [
        Example(id=str(n), samples=(sample(p, a), sample(p, b)), extras={"gold": sample(p, " eight or two or a mat")})
        for n, (p, a, b) in enumerate(PAIRS[2:4])
    ]


def opened(choice: Choice | None, **more: Any) -> Any:
    asked = frozenset({"policy", "gold", "gold_lengths"})
    return TextAdapter(model=str(model_folder()), lora=Lora(rank=2), token_weights=choice, **more).open(asked=asked)


def prepared(policy: Any) -> Any:
    return policy.prepare(policy.collate([policy.item(example, 0) for example in examples()]))


@pytest.mark.parametrize("pack", [False, "auto"])
def test_a_function_of_yours_weighs_the_tokens_of_candidates_alone(pack: Any) -> None:
    policy = opened(TABLE.choose("test_token_weights:by_place", first=0.25), pack=pack)
    inputs = prepared(policy)
    tokens = inputs.inputs.tokens
    assert [tuple(one[:3].tolist()) for one in tokens.weights[:2]] == [(0.25, 2.0), (0.25, 2.0, 0.0)]
    assert all(bool((one == 1).all()) for one in tokens.weights[4:])  # gold

    measured = inputs.inputs.measures(policy.network)
    want = []
    with torch.no_grad():
        for number in range(4):
            ids = torch.cat([tokens.contexts[tokens.context_of[number]], tokens.continuations[number]])[None]
            logp = policy.model(ids, use_cache=False).logits[0].log_softmax(-1)
            length = len(tokens.continuations[number])
            of_tokens = logp[-length - 1 : -1].gather(1, tokens.continuations[number][:, None])[:, 0]
            want.append(float((of_tokens * tokens.weights[number]).sum()))
    torch.testing.assert_close(measured["policy"].flatten(), torch.tensor(want), rtol=1e-4, atol=1e-4)
    scored = [len(ids) - (len(ids) > 2) for ids in tokens.continuations[:4]]
    assert inputs.side["lengths"].flatten().tolist() == scored  # a weight of 0 is not scored


def test_weights_of_one_change_nothing_and_others_do(tmp_path: Path) -> None:
    runs = {
        name: metrics_of(train_text(tmp_path / str(n), adapter={"token_weights": name}))
        for n, name in enumerate((None, "test_token_weights:plain", "test_token_weights:by_place"))
    }
    first, same, other = (one[-1]["logps/chosen"] for one in runs.values())
    assert first == same != other


def test_weights_meet_the_first_difference() -> None:
    encoded = Encoded(contexts=((5,),), continuations=((1, 2, 3, 4), (1, 2, 6)), context_of=(0, 0), given=(1, 0))
    weights = [[[0.5, 2.0, 3.0], [1.0, 4.0, 5.0]]]
    told = tokens_of([encoded], 2, wanted=frozenset(), weights=weights).weights
    assert told is not None and [one.tolist() for one in told] == [[0, 0.5, 2, 3], [1, 4, 5]]
    told = tokens_of([encoded], 2, wanted=frozenset(), from_difference=True, weights=weights).weights
    assert told is not None and [one.tolist() for one in told] == [[0, 0, 2, 3], [0, 0, 5]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", r"0: adapter\.token_weights: .*too_few gives \[1, 1\] weights, want \[2, \d+\]"),
        ("negative", r"weight of -1, want 0 or more"),
        ("none_at_all", r"weights of 0 for all scored tokens"),
    ],
)
def test_unusable_weights_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(opened(TABLE.choose(f"test_token_weights:{name}")))


def lines(policy: Any, cut: int = 0) -> list[dict[str, Any]]:
    """Log-probabilities where the history makes the second token of every candidate certain and does not know the others."""
    found = []
    for example in examples():
        lengths = policy.item(example, 0)["encoded"].lengths[:2]
        without = [[-3.0] * (length - cut) for length in lengths]
        known = [[-3.0, 0.0, *([-3.0] * length)][: length - cut] for length in lengths]
        found.append({"id": example.id, "with_history": known, "without_history": without})
    return found


def test_nextquill_weighs_tokens_by_what_the_history_makes_of_them(tmp_path: Path) -> None:
    file = tmp_path / "effects.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines(opened(None))))
    inputs = prepared(opened(TABLE.choose("nextquill", effects=str(file)))).inputs
    for ids, weights in zip(inputs.tokens.continuations[:4], inputs.tokens.weights[:4], strict=True):
        total = 0.9 + 0.1 * (len(ids) - 1)
        raw = torch.full((len(ids),), 0.1).index_fill(0, torch.tensor([1]), 0.9)
        torch.testing.assert_close(weights, raw * len(ids) / total)


def test_nextquill_tells_what_is_wrong_with_its_file(tmp_path: Path) -> None:
    policy = opened(None)

    def told(text: str) -> str:
        file = tmp_path / f"{len(text)}.jsonl"
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            prepared(opened(TABLE.choose("nextquill", effects=str(file))))
        return str(caught.value)

    short = "".join(json.dumps(line) + "\n" for line in lines(policy, cut=1))
    assert "has no line for 0" in told(json.dumps(lines(policy)[1]) + "\n")
    assert "tokens for 0, want [2, " in told(short)
    assert "cannot read" in told('{"id": "0"}\n')
    with pytest.raises(UserError, match=r"effects: cannot read .*absent"):
        prepared(opened(TABLE.choose("nextquill", effects=str(tmp_path / "absent.jsonl"))))
