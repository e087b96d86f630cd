"""`mmalign evaluate` on answers: pairing, win rates, length, variety, checkpoints, held-out pairs of a run, the page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import config_of, forget_accelerate
from test_evaluate import Page, images_of

from mmalign import train
from mmalign.config import command_line, read_config
from mmalign.errors import UserError
from mmalign.evaluate import EvaluateConfig, main
from mmalign.evaluate_texts import paired_texts
from mmalign.experiment import Data
from mmalign.held_out import pair_fit
from mmalign.records import Comparison, Content, Message, write
from mmalign.report.lengths import distinct_pairs, length_and_variety, length_bias, words

PROMPTS = tuple(f"why {number}?" for number in range(10))
SEEDS = (1, 2)


class Judge:
    """Counts something in a text."""

    judges = "texts"

    def __init__(self, name: str, count: Any) -> None:
        self.name, self.count = name, count

    def __call__(self, prompts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        assert len(prompts) == len(texts)
        return torch.tensor([float(self.count(text)) for text in texts])


def length() -> Judge:
    return Judge("length", lambda text: len(text.split()))


def polite() -> Judge:
    return Judge("polite", lambda text: text.count("please"))


def plain() -> Judge:
    return Judge("plain", lambda text: -text.count("!"))


def broken() -> Judge:
    return Judge("broken", lambda text: float("nan"))


LENGTH, POLITE, PLAIN = (f"{__name__}:{name}" for name in ("length", "polite", "plain"))


def answers_of(
    folder: Path,
    name: str,
    say: Any,
    *,
    tuned: str | None = None,
    prompts: Sequence[Any] = PROMPTS,
    seeds: Sequence[Any] = SEEDS,
) -> Path:
    """Rows of one answer a seed; `say(prompt number, seed)` is the answer."""
    rows = []
    for number, prompt in enumerate(prompts):
        content = Content(text=prompt) if isinstance(prompt, str) else Content(messages=prompt)
        origin = {"model": "tiny"} if tuned is None else {"model": "tiny", "tuned": tuned}
        rows.append(
            Comparison(
                id=f"{name}-{number}",
                prompt=content,
                candidates=tuple(Content(text=say(number, seed)) for seed in seeds),
                provenance=tuple({**origin, "seed": seed} for seed in seeds),
            )
        )
    return write(rows, folder / f"{name}.jsonl")


def said(number: int, seed: int) -> str:
    return f"because of answer {number} under seed {seed}"


def kind(number: int, seed: int) -> str:
    return said(number, seed) + (" please" if seed == 1 or number < 5 else " !")


def evaluated(before: Path, after: Path, output: Path, *settings: str) -> Any:
    return main(read_config(EvaluateConfig, None, [f"before={before}", f"after={after}", f"output={output}", *settings]))


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_answers_of_the_same_prompt_and_seed_are_compared(tmp_path: Path) -> None:
    before, after = answers_of(tmp_path, "before", said), answers_of(tmp_path, "after", kind)
    told = evaluated(before, after, tmp_path / "out", f"scorers={{name: '{POLITE}'}}", f"held_out={{name: '{PLAIN}'}}")
    rate = told.evaluation.headline.win_rate
    assert (rate.wins, rate.ties, rate.losses) == (15, 5, 0)
    found = results(tmp_path / "out")
    assert (found["num_pairs"], found["num_prompts"], found["win_rate"]) == (20, 10, 17.5 / 20)
    assert found["fidelity_after"] == pytest.approx(-0.25)
    assert found["over_optimisation"]["found"] and "OVER-OPTIMISATION" in str(told)
    assert found["contrast_before"] is found["diversity_before"] is None
    assert "contrast" not in str(told) and "images" not in str(told) and "grid.png" not in str(told)
    assert found["texts"]["length_before"] == 7 and found["texts"]["length_after"] == 7.75, "marks are no words"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.yaml",
        "evaluation_environment.json",
        "report.html",
        "results.json",
    ]


def test_one_answer_a_prompt_and_conversations_are_enough_and_the_order_of_rows_does_not_count(tmp_path: Path) -> None:
    chats = [(Message(role="system", text="be brief"), Message(role="user", text=prompt)) for prompt in PROMPTS]
    before = answers_of(tmp_path, "before", said, prompts=chats, seeds=(1,))
    after = answers_of(tmp_path, "after", lambda n, s: kind(n, s) if n % 2 else said(n, s), prompts=chats, seeds=(1,))
    after.write_text("\n".join(after.read_text().splitlines()[::-1]) + "\n")
    told = evaluated(before, after, tmp_path / "out", f"scorers={{name: '{POLITE}'}}")
    assert (told.evaluation.headline.win_rate.wins, told.evaluation.headline.win_rate.ties) == (5, 5)


def test_html_in_prompts_and_answers_is_shown_and_not_run(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & <b>"
    before = answers_of(tmp_path, "before", lambda n, s: evil, prompts=[f"{evil} {n}" for n in range(3)])
    after = answers_of(tmp_path, "after", lambda n, s: evil + " please", prompts=[f"{evil} {n}" for n in range(3)])
    evaluated(before, after, tmp_path / "out", f"scorers={{name: '{POLITE}'}}", "title='a <i>title</i>'")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "<script" not in text and "<i>" not in text and "<b>&" not in text
    assert text.count("&lt;script&gt;") == 3 * 6, "a prompt and two answers of each of six pairs"
    assert "a &lt;i&gt;title" in text


def test_checkpoints_stand_side_by_side_with_curves(tmp_path: Path) -> None:
    before, after = answers_of(tmp_path, "before", said), answers_of(tmp_path, "after", kind, tuned="run/checkpoint-30")
    some = {
        step: answers_of(tmp_path, f"at{step}", lambda n, s, step=step: kind(n, s) if n < step / 5 else said(n, s), tuned=place)
        for step, place in ((20, "run/checkpoint-20"), (10, "run/checkpoint-10/"))
    }
    between = f"checkpoints=[{some[20]}, {some[10]}]"
    told = evaluated(before, after, tmp_path / "out", f"scorers={{name: '{POLITE}'}}", between)
    curve = told.evaluation.mean_curves()["polite"]
    assert curve.steps == (0, 10, 20, 30)
    assert curve.values == pytest.approx((0, 0.2, 0.4, 0.75))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<th>step 10</th><th>step 20</th><th>after</th>" in page
    with pytest.raises(UserError, match="answers do not all come from one checkpoint-N"):
        evaluated(before, after, tmp_path / "out", f"scorers={{name: '{POLITE}'}}", f"checkpoints={before}")


def test_a_win_rate_that_is_length_is_warned_of_and_one_that_is_not_is_not(tmp_path: Path) -> None:
    before = answers_of(tmp_path, "before", said)
    longer = answers_of(tmp_path, "longer", lambda n, s: said(n, s) + " and so on" * (1 + (n + s) % 4))
    told = evaluated(before, longer, tmp_path / "long", f"scorers={{name: '{LENGTH}'}}")
    assert "LENGTH: the win rate by length goes along with length" in str(told)
    found = results(tmp_path / "long")["texts"]["length_bias"]["length"]
    assert found["found"] and found["win_rate_at_equal_length"] == 0.5 and found["correlation"] == pytest.approx(1)
    assert results(tmp_path / "long")["win_rate"] == 1
    both = answers_of(tmp_path, "both", lambda n, s: "please " + said(n, s) + " and so on" * ((n + s) % 4))
    told = evaluated(before, both, tmp_path / "both", f"scorers=[{{name: '{POLITE}'}}, {{name: '{PLAIN}'}}]")
    assert results(tmp_path / "both")["win_rate"] == 1 and "LENGTH" not in str(told)


def test_the_regression_on_length_is_least_squares() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(-5, 20, 40).astype(float)
    change = 0.3 * lengths + 0.5 + generator.normal(0, 2, 40)
    found = length_bias("j", torch.tensor(change), torch.tensor(lengths), eps=0.1)
    assert found is not None
    slope = np.polyfit(lengths, change, 1)[0]
    assert found.slope == pytest.approx(slope)
    assert found.correlation == pytest.approx(np.corrcoef(lengths, change)[0, 1])
    rest = change - slope * lengths
    assert found.equal_length.rate == pytest.approx(np.where(abs(rest) <= 0.1, 0.5, rest > 0).mean())
    assert found.share == pytest.approx(slope * lengths.mean() / change.mean())
    residual = change - np.polyval(np.polyfit(lengths, change, 1), lengths)
    error = np.sqrt((residual**2).sum() / 38 / ((lengths - lengths.mean()) ** 2).sum())
    assert found.t == pytest.approx(slope / error), "the t of a slope"
    assert found.found
    assert length_bias("j", torch.ones(5), torch.arange(5.0)) is None
    assert length_bias("j", torch.arange(5.0), torch.ones(5)) is None


def test_distinct_2_is_worked_out_on_answers_cut_to_one_length() -> None:
    assert words("It's 2 a.m. — 你好 Ünal") == ["it", "s", "2", "a", "m", "你", "好", "ünal"]
    assert distinct_pairs([words("a b a b"), words("b a")]) == 2 / 4
    assert distinct_pairs([["a"]]) is None
    text = "one two three four"
    same = length_and_variety([text], [f"{text} {text} {text}"], [])
    assert (same.distinct_before, same.distinct_after, same.length_after) == (1.0, 1.0, 12.0)
    assert same.warnings() == []
    collapsed = length_and_variety([text] * 2, ["ha ha ha ha"] * 2, [])
    assert (collapsed.distinct_before, collapsed.distinct_after) == (0.5, 1 / 6)
    assert "distinct-2 fell by 67 %" in collapsed.warnings()[0]


def test_what_cannot_be_paired_or_judged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = answers_of(tmp_path, "before", said), answers_of(tmp_path, "after", kind)
    fewer = answers_of(tmp_path, "fewer", kind, seeds=(1,))
    seedless = answers_of(tmp_path, "seedless", kind, seeds=(None,))
    images = images_of(tmp_path, "images", lambda number, seed: 60)
    for side, scorers, told in [
        (fewer, POLITE, "got no answer for 10 of 20 prompts and seeds, the first 'why 0?' with seed 2"),
        (seedless, POLITE, "got no seed in its provenance"),
        (images, POLITE, "got images among texts"),
        (after, "brightness", "brightness, which judges images, want judges of texts"),
        (after, f"{__name__}:broken", "before, answer 1 ('why 0?'): got nan from scorer broken"),
    ]:
        given = [f"before={before}", f"after={side}", f"output={tmp_path / 'out'}", f"scorers={{name: '{scorers}'}}"]
        assert command_line(EvaluateConfig, main, given) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_prompt_and_seed_given_twice_is_refused() -> None:
    row = Comparison(id="a", prompt=Content(text="p"), candidates=(Content(text="x"),), provenance=({"seed": 1},))
    with pytest.raises(UserError, match="got its prompt with seed 1 again"):
        paired_texts([row, row], [row])


LORAS: dict[str, Any] = {"lora": {"rank": 4}, "full": None}


@pytest.fixture(scope="module", params=LORAS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPO of twelve steps on pairs that say yes."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = [{"prompt": prompt, "chosen": " yes yes", "rejected": " no"} for prompt in PROMPTS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forget_accelerate()
    values = {
        "output": str(folder / "run"),
        "adapter": {"name": "text", "model": "tiny", "lora": LORAS[request.param]},
        "data": {"importer": {"name": "trl", "path": str(folder / "pairs.jsonl")}},
        "loss": {"name": "dpo", "beta": 0.1},
        "training": {"steps": 12, "batch_size": 5, "optimiser": {"name": "adamw", "learning_rate": 0.02}},
    }
    train.main(config_of(values))
    return folder / "run"


def pairs_of(path: Path, chosen: str, rejected: str) -> Data:
    rows = [{"prompt": f"what {n}?", "chosen": chosen, "rejected": rejected} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_config(Data, None, ["importer.name=trl", f"importer.path={path}"])


def test_held_out_pairs_of_texts_are_ordered_by_the_tuned_weights(run: Path, tmp_path: Path) -> None:
    right = pair_fit(run, pairs_of(tmp_path / "right.jsonl", " yes yes", " no"), device="cpu", draws=8)
    wrong = pair_fit(run, pairs_of(tmp_path / "wrong.jsonl", " no", " yes yes"), device="cpu", batch_size=2)
    assert (right.accuracy.wins, right.accuracy.losses) == (wrong.accuracy.losses, wrong.accuracy.wins) == (5, 0)
    assert right.num_draws == 1, "no noise, no draws"
    assert right.chosen_drift < right.rejected_drift
    assert (right.chosen_drift, right.rejected_drift) == pytest.approx((wrong.rejected_drift, wrong.chosen_drift), abs=1e-4)


def test_the_implicit_reward_is_the_difference_of_the_stock_models_log_likelihoods(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from mmalign.language.tiny import tiny_folder, tiny_tokenizer

    fit = pair_fit(run, pairs_of(tmp_path / "pairs.jsonl", " yes yes", " no"), device="cpu")
    tokenizer, lora = tiny_tokenizer(), (run / "adapter_model.safetensors").exists()
    tuned, base = (AutoModelForCausalLM.from_pretrained(p) for p in ((run if lora else run / "model"), tiny_folder()))
    sums = []
    for n in range(5):
        prompt = tokenizer(f"what {n}?")["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(" yes yes")["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logps = [torch.log_softmax(model(ids).logits[0].double(), -1) for model in (tuned, base)]
        own = [logp[range(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum() for logp in logps]
        sums.append(float(own[0] - own[1]))
    assert -fit.chosen_drift == pytest.approx(np.mean(sums), rel=1e-3, abs=1e-3)


def test_a_report_with_a_run_and_held_out_pairs_tells_both(run: Path, tmp_path: Path) -> None:
    before, after = answers_of(tmp_path, "before", said), answers_of(tmp_path, "after", kind)
    pairs_of(tmp_path / "pairs.jsonl", " yes yes", " no")
    more = [f"run={run}", "pairs.importer.name=trl", f"pairs.importer.path={tmp_path / 'pairs.jsonl'}", "device=cpu"]
    told = evaluated(before, after, tmp_path / "out", f"scorers={{name: '{POLITE}'}}", *more)
    found = results(tmp_path / "out")
    assert found["held_out_pairs"]["implicit_reward_accuracy"] == 1
    assert found["held_out_pairs"]["error"] == "negative log-likelihood in nats"
    assert "negative log-likelihood in nats above the base" in str(told)
    assert found["training"]["implicit_reward_accuracy"][1] > 0.5
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Negative log-likelihood in nats above the base model's:" in page and "noise draws" not in page
