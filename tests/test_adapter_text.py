"""The text adapter: what it makes of rows, what it measures and counts, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config_of, forget_accelerate, metrics_of, preference_data
from text_runs import PAIRS, model_folder, pairs_file, rows_file, text_tree, train_text
from torch import Tensor

from mmalign.adapters.options import Lora
from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_policy import TextPolicy
from mmalign.errors import UserError
from mmalign.records import Content, Example, Sample
from mmalign.train import main


def sample(prompt: str, answer: str) -> Sample:
    return Sample(prompt=Content(text=prompt), completion=Content(text=answer))


def row(number: int, *answers: str, prompt: str | None = None) -> Example:
    words, best, worst = PAIRS[number]
    return Example(id=f"row{number}", samples=tuple(sample(prompt or words, a) for a in answers or (best, worst)))


def opened(*, asked: tuple[str, ...] = (), k: int = 2, **settings: Any) -> TextPolicy:
    adapter = TextAdapter(**{"model": str(model_folder()), "lora": Lora(rank=2), **settings})
    policy = adapter.open(asked=frozenset(asked), num_candidates=k, needs_reference=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():  # away from the reference
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def batch_of(policy: TextPolicy, *examples: Example) -> Any:
    return policy.prepare(policy.collate([policy.item(example, 0) for example in examples]))


def alone(policy: TextPolicy, prompt: str, answer: str) -> Tensor:
    """Log-probabilities of an answer's tokens, with its end, from the model's own logits."""
    given, said = (policy.tokenizer.encode(words) for words in (prompt, answer))
    said = [*said, policy.tokenizer.eos_token_id]
    with torch.no_grad():
        logps = policy.model(torch.tensor([given + said])).logits[0].log_softmax(-1)
    return logps[len(given) - 1 : -1].gather(1, torch.tensor(said)[:, None])[:, 0]


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [True, False])
def test_logps_lengths_and_the_reference_are_those_of_the_model_itself(pack: bool) -> None:
    policy = opened(pack=pack)
    prepared = batch_of(policy, row(0), row(3))
    measured = prepared.inputs.measures(policy.network)["policy"]
    expected = [[alone(policy, PAIRS[n][0], PAIRS[n][c]) for c in (1, 2)] for n in (0, 3)]
    torch.testing.assert_close(measured.detach(), torch.tensor([[float(v.sum()) for v in one] for one in expected]))
    assert prepared.side["lengths"].tolist() == [[float(len(v)) for v in one] for one in expected]
    with policy.reference() as network:
        reference = prepared.inputs.refer(network)[0]["policy"]
    plain = TextAdapter(model=str(model_folder()), lora=Lora(rank=2), pack=pack).open()
    untouched = batch_of(plain, row(0), row(3)).inputs.measures(plain.network)["policy"]
    torch.testing.assert_close(reference, untouched.detach())
    assert float((reference - measured.detach()).abs().max()) > 1e-3


@pytest.mark.parametrize("pack", [True, False])
def test_ktos_anchor_is_taken_on_each_prompt_with_the_answer_of_the_row_before(pack: bool) -> None:
    policy = opened(asked=("policy", "reference", "anchor", "labels"), k=1, pack=pack)
    prepared = batch_of(policy, *[row(n, PAIRS[n][1]) for n in range(4)])
    measured = prepared.inputs.measures(policy.network)
    expected = [alone(policy, PAIRS[n][0], PAIRS[n - 1 if n else 3][1]).sum() for n in range(4)]
    torch.testing.assert_close(measured["mismatched"][:, 0], torch.stack(expected), rtol=1e-5, atol=1e-4)
    assert not measured["mismatched"].requires_grad and measured["policy"].requires_grad
    with pytest.raises(UserError, match=r"training.batch_size: got 1"):
        batch_of(policy, row(0, " blue"))
    assert opened(asked=("anchor",), k=1, mismatched=False).mismatched is False


def test_from_the_first_difference_the_pairs_difference_stays_and_its_lengths_fall() -> None:
    pair = row(3, " on the mat and ran", " on the mat and sat")
    whole, tail = opened(), opened(score="difference")
    both = [batch_of(policy, pair) for policy in (whole, tail)]
    logps = [one.inputs.measures(policy.network)["policy"].detach() for one, policy in zip(both, (whole, tail), strict=True)]
    torch.testing.assert_close(logps[0][:, 0] - logps[0][:, 1], logps[1][:, 0] - logps[1][:, 1], rtol=1e-4, atol=1e-4)
    shared = len(whole.tokenizer.encode(" on the mat and"))
    assert (both[0].side["lengths"] - both[1].side["lengths"]).tolist() == [[shared, shared]]


def test_answers_of_different_prompts_have_no_first_difference() -> None:
    joint = Example(id="joint", samples=(sample("the cat", " sat on the mat"), sample("red", " sat on the other")))
    lengths = [batch_of(opened(score=score), joint).side["lengths"].tolist() for score in ("response", "difference")]
    assert lengths[0] == lengths[1]


def test_a_loss_without_a_reference_runs_the_network_once_a_step_and_dpo_twice(tmp_path: Path) -> None:
    passes: list[int] = []
    for name in ("simpo", "orpo", "cpo", "dpo"):
        calls = 0

        def count(module: Any, *rest: Any) -> None:
            nonlocal calls
            calls += type(module).__name__ == "LlamaModel"

        hook = torch.nn.modules.module.register_module_forward_hook(count)
        try:
            train_text(tmp_path / name, loss={"name": name}, training={"steps": 1})
            first = calls
            calls = 0
            train_text(tmp_path / f"{name}-3", loss={"name": name}, training={"steps": 3})
        finally:
            hook.remove()
        passes.append((calls - first) // 2)
    assert passes == [1, 1, 1, 2]


# --- what is counted --------------------------------------------------------------------------------------------------


def test_what_is_cut_is_told_in_the_plan_and_in_the_metrics(tmp_path: Path) -> None:
    long = "the cat sat on the mat and the cat ran to the other cat"
    rows = [{"prompt": long, "chosen": " four", "rejected": " two plus two plus two plus two"}] * 2
    changes: dict[str, Any] = {
        "adapter": {"max_prompt_length": 8, "max_response_length": 4},
        "data": {"importer": {"name": "trl", "path": str(rows_file(rows, "long"))}},
    }
    forget_accelerate()
    told = str(main(config_of(text_tree(tmp_path / "dry", **changes, dry_run=True))))
    assert "cut: 4 of 4 prompts to 8, 2 answers to 4" in told and "answers 2 to 4" in told
    first = metrics_of(train_text(tmp_path / "run", **changes))[0]
    assert (first["tokens/cut_prompts"], first["tokens/cut_responses"]) == (1.0, 0.5)
    uncut = metrics_of(train_text(tmp_path / "uncut", **{**changes, "adapter": {}}))[0]
    assert (uncut["tokens/cut_prompts"], uncut["tokens/cut_responses"]) == (0.0, 0.0)
    assert uncut["tokens/per_example"] > first["tokens/per_example"]


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a model that is not there": (
        {"adapter": {"model": "nobody/no-such-model"}},
        r"adapter\.(tokenizer|model): cannot open nobody/no-such-model \(.*\)\. Name a folder or a hub id",
    ),
    "a GPU that is not there": ({"adapter": {"quantization": "4bit"}}, r"adapter.quantization: got 4bit, which needs a GPU"),
    "quantised weights in full": ({"adapter": {"quantization": "8bit", "lora": None}}, r"quantization: got it without lora"),
    "a layer with a slip": ({"adapter": {"lora": {"rank": 2, "targets": ["q_prj"]}}}, r"'q_prj'.*Did you mean q_proj\?"),
    "no layer": ({"adapter": {"lora": {"rank": 2, "targets": []}}}, r"targets: got an empty list"),
    "images": (
        {"data": {"importer": {"name": "comparisons", "path": str(preference_data())}}},
        r"got candidates with images, want texts. Choose adapter: diffusion",
    ),
    "a rationale that no row has": (
        {"loss": [{"name": "dpo"}, {"name": "rationale"}]},
        r"has no rationale, which the loss asks for",
    ),
    "a template that is not there": (
        {"adapter": {"chat_template": "nowhere.jinja"}},
        r"adapter.chat_template: cannot read nowhere",
    ),
    "no prompt left": ({"adapter": {"max_prompt_length": 1}}, r"max_prompt_length: got 1, want 2 or more"),
    "an unknown setting": ({"adapter": {"max_lenght": 4}}, r"max_lenght"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_message_before_anything_is_written(what: str, tmp_path: Path) -> None:
    changes, message = REFUSED[what]
    with pytest.raises(UserError, match=message) as fault:
        train_text(tmp_path / "run", **changes)
    assert len(str(fault.value)) < 600
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_conversations_for_a_model_without_a_template_are_refused_with_the_row(tmp_path: Path) -> None:
    data = {"importer": {"name": "trl", "path": str(pairs_file(chats=True))}}
    with pytest.raises(UserError, match=r"adapter.chat_template: the tokenizer has none"):
        train_text(tmp_path / "run", data=data)
    train_text(
        tmp_path / "given", data=data, adapter={"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    )


def test_an_empty_answer_is_left_out_or_refused_with_its_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "red is", "chosen": "", "rejected": " two"}]
    data = {"importer": {"name": "trl", "path": str(rows_file(rows, "empty"))}}
    with pytest.raises(UserError, match=r"empty.jsonl.*2|red is.*empty answer"):
        train_text(tmp_path / "run", data=data)
    with pytest.raises(UserError, match=r"row5: .*red is.*got an empty answer"):
        policy = opened()
        policy.item(row(5, "", " two"), 0)


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "chatml", "llama"])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.filterwarnings("ignore")  # TRL's and its libraries'
def test_rows_are_tokenised_as_trl_does_where_prompts_end_with_a_token(kind: str, begins: bool, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    forget_accelerate()
    policy = opened(model=str(model_folder("llama", kind, begins)))
    rows = [json.loads(line) for line in pairs_file(chats=kind != "none").read_text().splitlines()]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder("llama", kind, begins)),
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer,
    )
    for theirs, given in zip(trainer.train_dataset, PAIRS, strict=True):
        if kind == "none":
            prompt, answers = Content(text=given[0]), [Content(text=words) for words in given[1:]]
        else:
            from mmalign.records import Message

            prompt = Content(messages=(Message(role="user", text=given[0]),))
            answers = [Content(messages=(Message(role="assistant", text=words),)) for words in given[1:]]
        ours = policy.reader.encoder([Sample(prompt=prompt, completion=answer) for answer in answers])
        assert ours.given == (0, 0)
        assert list(ours.contexts[0]) == theirs["prompt_ids"]
        assert [list(ids) for ids in ours.continuations] == [theirs["chosen_ids"], theirs["rejected_ids"]]
