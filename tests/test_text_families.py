"""Language models of many families are tuned with LoRA and in full, and what is saved loads in stock transformers and peft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import forget_accelerate, metrics_of
from text_runs import model_folder, pairs_file, text_tree, train_text
from tiny_causal import PACKING
from torch import Tensor

from mmalign.adapters.options import Lora
from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_policy import TextPolicy
from mmalign.language.generation import generate_ids
from mmalign.records import Content, Example, Sample

FAMILIES = (*PACKING, "falcon", "falcon_alibi", "mamba")
TIED = ("llama_tied", "gemma2", "gemma3", "gpt2", "cohere")
PROBE = torch.tensor([[7, 40, 200, 90, 33, 61], [11, 13, 77, 300, 2, 5]])


def example(number: int) -> Example:
    prompts, answers = ("name a colour", "the cat"), ((" blue", " two"), (" sat on the mat", " ran"))
    samples = tuple(Sample(prompt=Content(text=prompts[number]), completion=Content(text=a)) for a in answers[number])
    return Example(id=str(number), samples=samples)


def tuned(name: str, lora: Lora | None) -> tuple[TextPolicy, float]:
    """A policy after two steps of DPO, and how far its logits moved."""
    policy = TextAdapter(model=str(model_folder(name)), lora=lora).open(asked=frozenset({"policy"}), needs_reference=True)
    with torch.no_grad():
        before = policy.model(PROBE).logits
    optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(2):
        inputs = policy.prepare(policy.collate([policy.item(example(n), 0) for n in (0, 1)])).inputs
        with policy.reference() as network:
            reference = inputs.refer(network)[0]["policy"]
        margin = (inputs.measures(policy.network)["policy"] - reference) @ torch.tensor([1.0, -1.0])
        optimiser.zero_grad()
        (-torch.nn.functional.logsigmoid(0.1 * margin)).mean().backward()
        optimiser.step()
    with torch.no_grad():
        after = policy.model(PROBE).logits
    return policy, float((after - before).abs().max())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(PROBE).logits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of experts, by transformers
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_loads_in_stock_peft_and_gives_the_trained_logits(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, moved = tuned(name, Lora(rank=2))
    assert moved > 1e-4
    policy.save(tmp_path)
    trained = logits(policy.model)
    base = AutoModelForCausalLM.from_pretrained(model_folder(name))
    assert float((logits(base) - trained).abs().max()) > 1e-4
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), trained, rtol=1e-4, atol=1e-4
    )  # which finds the base by the adapter's config
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == policy.tokenizer.get_vocab()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_fine_tune_loads_in_stock_transformers_and_gives_the_trained_logits(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, moved = tuned(name, None)
    assert moved > 1e-4
    policy.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(policy.model) and {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(loaded), logits(policy.model), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == policy.tokenizer.get_vocab()
    kept = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "mmalign" not in json.dumps(kept)  # a stock config, without our attention
    if name in TIED:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["falcon_alibi", "mamba"])
def test_what_cannot_be_packed_is_padded_with_the_reason_and_refused_where_packing_is_asked(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    from mmalign.errors import UserError

    why = {"falcon_alibi": "ALiBi", "mamba": "recurrent state"}[name]
    with caplog.at_level("INFO"):
        policy = TextAdapter(model=str(model_folder(name)), lora=Lora(rank=2)).open()
    assert not policy.network.packs and why in policy.plan() and why in caplog.text
    with pytest.raises(UserError, match=rf"adapter.pack: got true, .*{why}"):
        TextAdapter(model=str(model_folder(name)), lora=Lora(rank=2), pack=True).open()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_a_run_leaves_what_stock_code_loads_and_answers_alike_with(name: str, lora: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = str(model_folder(name, "chatml"))
    adapter = {"name": "text", "model": model, "lora": lora}
    output = train_text(
        tmp_path / "run",
        adapter={**adapter, "validation": {"prompts": ["name a colour", "hello"], "max_new_tokens": 6}},
        data={"importer": {"name": "trl", "path": str(pairs_file(chats=True))}},
    )
    assert metrics_of(output)[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    whole = output if lora else output / "model"
    tokenizer, loaded = AutoTokenizer.from_pretrained(whole), AutoModelForCausalLM.from_pretrained(whole)
    assert tokenizer.chat_template is not None
    answers = [json.loads(line) for line in (output / "validation" / "step-2" / "answers.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in answers] == ["name a colour", "hello"]
    for one in answers:
        messages = [{"role": "user", "content": one["prompt"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = loaded.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=[1, 3])
        assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == one["answer"]
    head = yaml.safe_load((output / "README.md").read_text().split("---")[1])
    assert head["base_model"] == model and head["pipeline_tag"] == "text-generation"
    assert head["library_name"] == ("peft" if lora else "transformers") and "dpo" in head["tags"]


def test_the_card_s_code_loads_the_weights(tmp_path: Path) -> None:
    output = train_text(tmp_path / "run", training={"steps": 1})
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(code, found)
    assert type(found["model"]).__name__ == "LlamaForCausalLM" and found["tokenizer"].eos_token == "</s>"


@pytest.mark.parametrize("adapter", [{"name": "text"}, {"name": "text_reward"}], ids=["text", "text_reward"])
def test_a_lora_on_a_base_of_a_relative_path_loads_from_any_folder(
    adapter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = model_folder()
    monkeypatch.chdir(place.parent)
    loss = {"loss": {"name": "bradley_terry"}} if adapter["name"] == "text_reward" else {}
    based = {**adapter, "model": f"./{place.name}", "lora": {"rank": 2}}
    output = train_text(tmp_path / "run", adapter=based, training={"steps": 1}, **loss)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec((output / "README.md").read_text().split("```python\n")[1].split("```")[0], found)
    assert found["model"].config.model_type == "llama"
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(place)


def test_the_code_that_loads_a_lora_names_the_revision_of_its_base(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": str(model_folder()), "revision": "v2", "trust_remote_code": True}
    policy = TextAdapter(**settings, lora=Lora(rank=2)).open()
    assert f'"{tmp_path}", revision="v2", trust_remote_code=True)' in policy.loading_lines(tmp_path)
    policy.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v2"
    full = TextAdapter(**settings).open()
    assert "revision" not in full.loading_lines(tmp_path), "its weights lie in the folder"


def test_answers_do_not_depend_on_what_they_are_batched_with() -> None:
    policy = TextAdapter(model=str(model_folder("llama")), lora=Lora(rank=2)).open()
    prompts = [[7, 40, 200], [11, 13, 77, 300, 2, 5], [90]]
    settings: dict[str, Any] = {"max_new_tokens": 6, "pad": 5, "eos": (1,)}
    for temperature in (0.0, 1.0):
        together = generate_ids(policy.model, prompts, temperature=temperature, seeds=(1, 2, 3), **settings)
        alone = [
            generate_ids(policy.model, [prompt], temperature=temperature, seeds=(seed,), **settings)[0]
            for prompt, seed in zip(prompts, (1, 2, 3), strict=True)
        ]
        assert together == alone
    assert len({tuple(answer) for answer in together}) > 1


def test_a_tied_model_trains_its_embedding_once(tmp_path: Path) -> None:
    policy, _ = tuned("llama_tied", None)
    assert len({parameter.data_ptr() for parameter in policy.parameters()}) == len(policy.parameters())


def test_another_tokenizers_folder_and_template_are_what_is_saved(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    forget_accelerate()
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    adapter = {"chat_template": str(template), "tokenizer": str(model_folder("gpt2", "chatml"))}
    output = train_text(
        tmp_path / "run",
        adapter=text_tree(tmp_path)["adapter"] | adapter,
        data={"importer": {"name": "trl", "path": str(pairs_file(chats=True))}},
        training={"steps": 1},
    )
    assert AutoTokenizer.from_pretrained(output).chat_template == template.read_text()
