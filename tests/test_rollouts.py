"""SPO's source: pairs are what their noise says, draws are told by their place, faults have one clear message, reward rises."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import config_of, forget_accelerate, metrics_of, train, tree
from test_resume import contents, numbers
from test_step_reward import LATENT
from test_step_scorers import latent_folder, policy_of, small_decoder_folder, step_aware_folder
from torch import Tensor

from mmalign.errors import UserError
from mmalign.experiment import build_objective, open_policy, read_examples
from mmalign.scorers.pixels import brightness
from mmalign.sources import Order
from mmalign.sources.trajectories import Pair

SPO: dict[str, Any] = {"loss": {"name": "spo"}, "data": {"view": "prompts"}}
SCORER = {"name": "image", "scorer": "brightness"}


def rollouts(**settings: Any) -> dict[str, Any]:
    few = {"num_steps": 4, "num_candidates": 3, "prompts_per_round": 3, "sampling_batch": 2, "threshold": 0.0}
    return {"name": "rollouts", "scorer": SCORER, **few, **settings}


class Opened:
    """Policy and stream of a config, without a training loop."""

    def __init__(self, output: Path, family: str = "sd15", weights: Path | None = None, **settings: Any) -> None:
        from accelerate import Accelerator

        forget_accelerate()
        config = config_of(tree(output, family, **SPO, source=rollouts(**settings)))
        self.examples, _ = read_examples(config.data)
        accelerator = Accelerator(cpu=True)
        objective = build_objective(config, self.examples)
        self.policy = open_policy(config, self.examples, objective, accelerator, weights=weights)
        self.stream = config.source.build().open(self.examples, self.policy, accelerator=accelerator, seed=0)

    def batches(self, steps: int = 1, batch_size: int = 4, **changes: int) -> list[Any]:
        sizes = {"num_examples": len(self.examples), "batch_size": batch_size, "accumulation": 1, "seed": 0, **changes}
        return list(self.stream.batches(Order(**sizes), 0, steps))

    def round(self) -> list[Pair]:
        self.stream._sample_round()
        pool: list[Pair] = self.stream.pool
        return pool


# What a pair is


def guided(policy: Any, pair: Pair, timestep: Tensor, scale: float) -> Tensor:
    """The network's answer to each x_t of the pair, one row and one condition at a time."""
    outputs = []
    for noisy in pair.noisy:
        said = []
        for condition in (policy.unconditional(1), policy.conditions([pair.prompt])):
            said.append(policy.denoiser(noisy[None], timestep[None], **condition)[0])
        outputs.append(said[0] + scale * (said[1] - said[0]))
    return torch.stack(outputs)


def by_hand(policy: Any, pair: Pair, steps: list[int], scale: float) -> Tensor:
    """Log-density of both successors under DDIM with eta 1, or Flow-GRPO's step, from the formulas."""
    now, schedule = steps[pair.step], policy.schedule
    after = steps[pair.step + 1] if pair.step + 1 < len(steps) else 0
    output = guided(policy, pair, schedule.network_timestep(torch.tensor(now)), scale).double()
    x, sigma, sigma_after = pair.noisy.double(), float(schedule.sigma[now].double()), float(schedule.sigma[after].double())
    if schedule.prediction == "flow":
        level, dt = 0.7 * math.sqrt(sigma / (1 - (sigma_after if sigma == 1 else sigma))), sigma_after - sigma
        mean = x * (1 + level**2 / (2 * sigma) * dt) + output * (1 + level**2 * (1 - sigma) / (2 * sigma)) * dt
        std = level * math.sqrt(-dt)
    else:
        bar, bar_after = float(schedule.alpha[now].double() ** 2), float(schedule.alpha[after].double() ** 2)
        v = schedule.prediction == "v_prediction"
        clean = bar**0.5 * x - sigma * output if v else (x - (1 - bar) ** 0.5 * output) / bar**0.5
        noise = bar**0.5 * output + sigma * x if v else output
        std = math.sqrt((1 - bar_after) / (1 - bar) * (1 - bar / bar_after))
        mean = bar_after**0.5 * clean + math.sqrt(1 - bar_after - std**2) * noise
    normal = torch.distributions.Normal(mean, std)
    return normal.log_prob(pair.next_noisy.double()).flatten(1).mean(1)


GRIDS = {"sd15": [751, 501, 251, 1], "sd2": [751, 501, 251, 1], "sdxl": [751, 501, 251, 1], "sd3": [999, 749, 499, 249]}


@pytest.mark.parametrize("family", GRIDS)
@pytest.mark.parametrize("inner_steps", [0, 1])
def test_pairs_have_the_density_of_the_sampler_that_drew_them(tmp_path: Path, family: str, inner_steps: int) -> None:
    opened = Opened(tmp_path, family, inner_steps=inner_steps, window=(0, 999))
    pool = list(opened.round())
    assert len(pool) == 3 * 4 and {pair.shared for pair in pool} == ({True, False} if inner_steps else {True})
    for shared in {pair.shared for pair in pool}:
        pairs = [pair for pair in pool if pair.shared == shared]
        with torch.no_grad():
            found = opened.stream._prepared(pairs).inputs.logps(opened.policy.network)
            expected = torch.stack([by_hand(opened.policy, pair, GRIDS[family], 5.0) for pair in pairs])
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


def test_a_shared_state_costs_one_row_and_two_states_two_in_one_pass(tmp_path: Path) -> None:
    rows: list[int] = []
    for scale, doubled in ((5.0, 2), (1.0, 1)):
        opened = Opened(tmp_path, inner_steps=1, window=(0, 999), guidance_scale=scale)
        pool = list(opened.round())
        opened.policy.denoiser.core.register_forward_hook(lambda module, given, output: rows.append(len(output[0])))
        for shared, states in ((True, 1), (False, 2)):
            pairs = [pair for pair in pool if pair.shared == shared][:3]
            inputs = opened.stream._prepared(pairs).inputs
            rows.clear()
            with torch.no_grad():
                logps = inputs.logps(opened.policy.network)
            assert rows == [3 * states * doubled] and logps.shape == (3, 2)


def test_sdxl_is_told_the_size_of_what_it_makes(tmp_path: Path) -> None:
    opened = Opened(tmp_path, "sdxl")
    (prepared,) = opened.batches(batch_size=2)
    for condition in (prepared.inputs.condition, prepared.inputs.unconditional):
        assert condition["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


def test_prompts_are_encoded_once_however_often_their_pairs_are_trained_on(tmp_path: Path) -> None:
    encoded: list[int] = []
    opened = Opened(tmp_path)
    opened.policy.pipe.text_encoder.register_forward_hook(lambda module, given, output: encoded.append(1))
    opened.batches(steps=6)
    assert 0 < len(encoded) <= 3 + 1  # "a red 0", "a red 1", "a red 2", and the empty prompt


# Draws


def states_of(pool: Sequence[Pair]) -> dict[str, Tensor]:
    return {pair.key: torch.cat([pair.noisy, pair.next_noisy]) for pair in pool}


@pytest.mark.parametrize("sampling_batch", [1, 3])
def test_pairs_do_not_depend_on_how_many_prompts_are_sampled_at_once(tmp_path: Path, sampling_batch: int) -> None:
    first, second = Opened(tmp_path), Opened(tmp_path, sampling_batch=sampling_batch)
    one, other = list(first.round()), list(second.round())
    assert [(pair.key, pair.prompt, pair.step) for pair in one] == [(pair.key, pair.prompt, pair.step) for pair in other]
    for key, value in states_of(one).items():
        torch.testing.assert_close(states_of(other)[key], value, rtol=0, atol=1e-4)
    assert first.stream.notes == pytest.approx(second.stream.notes, rel=1e-5)


@pytest.mark.parametrize("sampling_batch", [1, 2, 3])
def test_the_branches_of_a_prompt_are_decoded_and_judged_together_and_those_of_another_apart(
    tmp_path: Path, sampling_batch: int
) -> None:
    scorer = {"name": "step_aware", "path": str(step_aware_folder(tmp_path))}
    opened = Opened(tmp_path, sampling_batch=sampling_batch, scorer=scorer)
    rows: dict[str, list[int]] = {"decoded": [], "judged": []}
    judge = opened.stream.scorer.network.clip.visual_projection
    for name, part in (("decoded", opened.policy.pipe.vae.decoder), ("judged", judge)):
        part.register_forward_hook(lambda module, given, output, name=name: rows[name].append(len(output)))
    opened.round()
    assert rows["decoded"] == rows["judged"] == [3] * (3 * 4)  # 3 prompts, 4 steps, 3 successors


def test_every_round_and_place_has_its_own_noise_and_prompts_go_round(tmp_path: Path) -> None:
    opened = Opened(tmp_path, prompts_per_round=8, num_steps=2)
    first = list(opened.round())
    again = opened.round()[len(first) :]
    assert not set(states_of(first)) & set(states_of(again))
    starts = torch.cat([pair.next_noisy for pair in (*first, *again)]).flatten(1)
    assert len(starts.unique(dim=0)) == len(starts)
    for pool in (first, again):  # 8 prompts a round, 8 rows in the data: each once
        assert sorted({pair.key.split("/")[0]: pair.prompt for pair in pool}.values()) == sorted(
            f"a red {row % 3}" for row in range(8)
        )


def test_processes_take_the_same_pool_in_turn(tmp_path: Path) -> None:
    whole = Opened(tmp_path).batches(batch_size=4)[0].inputs.next_noisy
    parts = [Opened(tmp_path).batches(batch_size=2, num_processes=2, process=place)[0].inputs.next_noisy for place in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_every_pair_is_trained_on_once(tmp_path: Path) -> None:
    opened = Opened(tmp_path, inner_steps=1, window=(0, 999))
    seen = torch.cat([prepared.inputs.next_noisy for prepared in opened.batches(steps=9, batch_size=4)]).flatten(1)
    assert len(seen) == 36 and len(seen.unique(dim=0)) == 36


# Runs


@dataclass
class Spoilt:
    """NaN for the second image, but not when it is tried."""

    name: str = "spoilt"
    asked: int = 0

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        self.asked += 1
        return torch.tensor([0.0, 0.0 if self.asked == 1 else math.nan, *[0.0] * len(images)])[: len(images)]


def spoilt() -> Spoilt:
    return Spoilt()


@dataclass(frozen=True)
class Darkness:
    """The opposite of brightness."""

    name: str = "darkness"

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        return -brightness()(prompts, images)


def darkness() -> Darkness:
    return Darkness()


@dataclass(frozen=True)
class Relative:
    """Brightness against that of the images beside it."""

    name: str = "relative"

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        found = brightness()(prompts, images)
        return (found - found.mean()) / found.std()


def relative() -> Relative:
    return Relative()


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "inner": ("sdxl", {"source": rollouts(inner_steps=2, num_candidates=2, window=(0, 999), continue_from="best")}),
    "flow": ("sd3", {"source": rollouts(window=(0, 999), continue_from="worst")}),
    "unguided": ("sd2", {"source": rollouts(guidance_scale=1.0), "training": {"candidate_microbatch": 1}}),
    "full": ("sd15", {"adapter": {"lora": None}}),
    "bf16": ("sd15", {"training": {"mixed_precision": "bf16"}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_starts_at_ln_2_and_moves(tmp_path: Path, name: str) -> None:
    family, changes = RUNS[name]
    rows = metrics_of(train(tmp_path / "out", family, **{**SPO, "source": rollouts(), **changes}))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[1]["loss"] != rows[0]["loss"]
    assert 0 < rows[0]["rollout/valid"] <= 1 and math.isfinite(rows[0]["rollout/score"])
    assert rows[0]["rollout/epoch"] > 0


def test_the_passes_over_the_prompts_are_counted_by_rounds_and_not_by_pairs(tmp_path: Path) -> None:
    opened = Opened(tmp_path, prompts_per_round=4)
    for number in (1, 2):
        opened.round()
        assert opened.stream.notes["rollout/epoch"] == number * 4 / len(opened.stream.examples)


def test_step_aware_and_latent_judges_work_in_a_run(tmp_path: Path) -> None:
    folders = {"step_aware": step_aware_folder(tmp_path), "latent": latent_folder(tmp_path, policy_of(tmp_path, LATENT))}
    for name, folder in folders.items():
        source = rollouts(scorer={"name": name, "path": str(folder)}, threshold=[0.0, 0.001])
        assert len(metrics_of(train(tmp_path / "runs" / name, **SPO, source=source))) == 2


def test_a_small_decoder_works_in_a_run_and_one_for_other_latents_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    scorer = {"name": "image", "scorer": "brightness", "decoder": str(small_decoder_folder(tmp_path / "small"))}
    assert len(metrics_of(train(tmp_path / "fine", **SPO, source=rollouts(scorer=scorer)))) == 2
    scorer["decoder"] = str(small_decoder_folder(tmp_path / "wide", latent_channels=16))
    with pytest.raises(UserError, match=r"source\.scorer\.decoder: got .*wide for latents of 16 channels, want 4"):
        train(tmp_path / "out", **SPO, source=rollouts(scorer=scorer))
    assert not (tmp_path / "out").exists()


def test_a_run_resumed_with_a_pool_that_is_not_empty_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    changes = {
        **SPO,
        "source": rollouts(inner_steps=1, window=(0, 999)),  # twelve pairs a round
        "adapter": {"lora": {"rank": 2, "dropout": 0.1}},
        "training": {"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 5, "accumulation": 2, "batch_size": 2},
    }
    output = train(tmp_path / "out", **changes)
    kept = [torch.load(path, weights_only=True) for path in sorted((output / "checkpoint-2").glob("custom_checkpoint_*.pkl"))]
    (state,) = [one for one in kept if "pool" in one]
    assert len(state["pool"]) == 4 and state["round"] == 1
    before, numbers_before = contents(output), numbers(output)
    train(output, **changes, resume=str(output / "checkpoint-2"))
    assert contents(output) == before
    assert numbers(output) == numbers_before


class Giving:
    """A scorer of images that gives what it is told to, a number of images in."""

    name = "giving"

    def __init__(self, gives: Callable[[int], Any]) -> None:
        self.gives = gives

    def __call__(self, prompts: Sequence[str], images: Sequence[Any]) -> Any:
        return self.gives(len(images))


def not_a_number() -> Giving:
    return Giving(lambda count: torch.full((count,), math.nan))


def column() -> Giving:
    return Giving(lambda count: torch.ones(count, 1))


def listed() -> Giving:
    return Giving(lambda count: [1.0] * count)


def judged_by(name: str) -> dict[str, Any]:
    return {"source": rollouts(scorer={"name": "image", "scorer": f"{__name__}:{name}"})}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nan": (judged_by("not_a_number"), r"source\.scorer: gave NaN or an infinite score"),
    "column": (judged_by("column"), r"scorer giving: got shape \(3, 1\) for 3 candidates, want a tensor of shape \(3,\)"),
    "listed": (judged_by("listed"), r"scorer giving: got a list for 3 candidates"),
    "ode": ({"source": rollouts(eta=0.0)}, r"eta: got 0\.0, a sampler without noise \(an ODE\)"),
    "guidance": ({"source": rollouts(guidance_scale=-5)}, r"guidance_scale: got -5\.0, want a positive number; 1 is no"),
    "endless": ({"source": rollouts(eta=float("inf"))}, r"eta: got inf"),
    "window": ({"source": rollouts(window=[2, 240])}, r"source\.window: got \[2, 240\], in which none.*1 \.\.\. 751"),
    "upside_down": ({"source": rollouts(window=[750, 0])}, r"window: got \[750, 0\], want 0 <= lowest <= highest"),
    "threshold": ({"source": rollouts(threshold=1)}, r"threshold: got 1.*from 0 to below 1"),
    "alone": ({"source": rollouts(num_candidates=1)}, r"num_candidates: got 1, want 2 or more"),
    "epochs": ({"source": rollouts(), "training": {"steps": None, "epochs": 1}}, r"training\.epochs: got 1.*training\.steps"),
    "cache": ({"source": rollouts(), "adapter": {"cache": "cache"}}, r"adapter\.cache: has no meaning for sampler steps"),
    "guard": ({"source": rollouts(), "adapter": {"winner_guard": {"mu": 0.9}}}, r"adapter\.winner_guard: has no meaning"),
    "flip": ({"source": rollouts(), "adapter": {"flip": True}}, r"adapter\.flip: has no meaning.*Set it to False"),
    "timesteps": (
        {"source": rollouts(), "adapter": {"timesteps": "logit_normal"}},
        r"adapter\.timesteps: has no.*Set it to uniform",
    ),
    "drift": (
        {"source": rollouts(), "loss": [{"name": "spo"}, {"name": "output_anchor"}]},
        r"loss: asks for drift, which adapter diffusion with source rollouts does not measure",
    ),
    "texts": (
        {"source": rollouts(scorer={"name": "image", "scorer": "text_length"})},
        r"source\.scorer\.scorer: got text_length, which judges texts, want a scorer of images",
    ),
    "batch": (
        {"source": rollouts(scorer={**SCORER, "batch_size": 0})},
        r"source\.scorer\.batch_size: got 0, want 1 or more",
    ),
    "loss": ({"source": rollouts(), "loss": {"name": "kto"}}, r"loss\.kto: needs the data labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_rollouts_cannot_use_is_refused_before_a_file_is_written(tmp_path: Path, name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", **{**SPO, **changes})
    assert not (tmp_path / "out").exists()


def test_a_family_that_edits_is_refused(tmp_path: Path) -> None:
    edits = Path(__file__).parents[1] / "configs" / "smoke_data" / "edits.jsonl"
    data = {"importer": {"name": "comparisons", "path": str(edits)}, "view": "prompts"}
    with pytest.raises(UserError, match=r"got qwen_image_edit, which edits source images.*source: offline"):
        train(tmp_path / "out", "qwen_image_edit", **{**SPO, "data": data}, source=rollouts())
    assert not (tmp_path / "out").exists()


def test_flux_is_told_its_guidance_and_not_guided_against_the_empty_prompt(tmp_path: Path) -> None:
    message = r"source\.guidance_scale: got 5\.0, but flux.*guidance_scale: 1 and adapter\.guidance_embedding: 3\.5"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", "flux", **SPO, source=rollouts())
    assert not (tmp_path / "out").exists()
    told = {"adapter": {"guidance_embedding": 3.5}, "source": rollouts(guidance_scale=1.0, window=(0, 999))}
    rows = metrics_of(train(tmp_path / "out", "flux", **SPO, **told))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(("loss", "source", "plain"), [("spo", "rollouts", "dpo"), ("dro", "replay", "hinge")])
def test_a_loss_of_made_pairs_is_told_once_what_it_is_on_given_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, loss: str, source: str, plain: str
) -> None:
    def told(**changes: Any) -> list[str]:
        caplog.clear()
        config = config_of(tree(tmp_path / "run", **changes))
        build_objective(config, read_examples(config.data)[0])
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    (message,) = told(loss={"name": loss})
    assert message.startswith(f"loss {loss} on given pairs is not the method of that name")
    assert f"Set source: {source}" in message and message.endswith(f"or take loss {plain}.")
    assert told(loss={"name": plain}) == []
    if loss == "spo":
        assert told(**SPO, source=rollouts()) == []


def test_a_score_that_is_nan_stops_the_run(tmp_path: Path) -> None:
    source = rollouts(scorer={"name": "image", "scorer": "test_rollouts:spoilt"})
    with pytest.raises(UserError, match=r"source\.scorer: gave NaN or an infinite score"):
        train(tmp_path / "out", **SPO, source=source)
    assert (tmp_path / "out").exists(), "the trial went well"


def test_a_judge_may_compare_the_branches_of_a_prompt(tmp_path: Path) -> None:
    stream = Opened(tmp_path, scorer={"name": "image", "scorer": "test_rollouts:relative"})
    assert stream.round()


def test_a_threshold_that_nobody_passes_is_told_after_ten_rounds(tmp_path: Path) -> None:
    source = rollouts(num_steps=2, num_candidates=2, threshold=0.999)
    with pytest.raises(UserError, match=r"source\.threshold: got 0\.999, and in 10 rounds no pair.*3 prompts"):
        train(tmp_path / "out", **SPO, source=source)


# Outcome


def test_the_policy_comes_to_make_what_the_judge_likes(tmp_path: Path) -> None:
    settings = {"num_steps": 3, "num_candidates": 4, "prompts_per_round": 4, "sampling_batch": 4, "guidance_scale": 1.0}
    found = {}
    for name in ("base", "brightness", "test_rollouts:darkness"):
        weights = None
        if name != "base":
            weights = train(
                tmp_path / name.replace(":", "-"),
                **SPO,
                source=rollouts(**settings, scorer={"name": "image", "scorer": name}),
                adapter={"lora": {"rank": 4}},
                training={"steps": 10, "batch_size": 8, "optimiser": {"learning_rate": 1e-2}, "checkpoint_every": None},
            )
        opened = Opened(tmp_path, weights=weights, **settings)
        opened.round()  # the first, on the same noise for all
        found[name] = opened.stream.notes["rollout/score"]
    assert found["brightness"] - found["base"] > 0.003, found
    assert found["test_rollouts:darkness"] - found["base"] < -0.003, found
