"""Diffusion-DRO's source: the solver is diffusers', own states stop where the expert is, and runs go on where they stopped."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import (
    comparison_of,
    config_of,
    encoded,
    final_weights,
    forget_accelerate,
    metrics_of,
    train,
    tree,
    write_config,
    write_rows,
)
from test_resume import contents, numbers
from test_step_reward import LATENT, adapter_of
from tiny import tiny_folder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmalign import cli, rank
from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.experiment import build_objective, open_policy, read_examples
from mmalign.models.diffusion import Denoiser, open_pipeline
from mmalign.noise import Schedule, flow_schedule, scaled_linear_alphas_cumprod, vp_schedule
from mmalign.rank import RankConfig
from mmalign.records.table import empty_dataset
from mmalign.sources import Order
from mmalign.sources.replay import own_states, visited_timesteps

with np.load(Path(__file__).parent / "golden" / "dro_buffer.npz") as arrays:
    BASE, JITTER = arrays["buffer_base_timesteps"].tolist(), int(arrays["buffer_perturb_max_exclusive"])

DRO: dict[str, Any] = {"loss": {"name": "dro"}, "data": {"view": "best"}}


def replay(**settings: Any) -> dict[str, Any]:
    return {"name": "replay", "num_steps": 4, **settings}


# Timesteps


def test_a_row_visits_one_timestep_in_each_part_of_the_published_grid_and_its_own_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    timestep = torch.randint(1000, (400,), generator=generator)
    visited = visited_timesteps(timestep, torch.rand(400, 20, generator=generator, dtype=torch.float64), 1000)
    base = torch.tensor(BASE).flip(0)  # least noisy first
    assert ((visited >= base) & (visited < base + JITTER)).all()
    own = (timestep[:, None] >= base).sum(1) - 1
    assert torch.equal(visited[torch.arange(400), own], timestep)
    jittered = visited - base
    assert {int(jittered.min()), int(jittered.max())} == {0, 49}
    assert float(jittered.float().mean()) == pytest.approx(24.5, abs=0.6)


@pytest.mark.parametrize("num_steps", [3, 7, 20, 999, 1000])
@pytest.mark.parametrize("share", [0.0, 1 - 2**-24, 1 - 2**-53])
def test_no_jitter_leaves_its_part(num_steps: int, share: float) -> None:
    timestep = torch.arange(1000)
    visited = visited_timesteps(timestep, torch.full((1000, num_steps), share, dtype=torch.float64), 1000)
    assert (visited.diff(dim=1) > 0).all()
    assert (visited >= 0).all() and (visited < 1000).all()
    assert (visited == timestep[:, None]).any(1).all()


# The solver


def stable_diffusion(prediction: str = "epsilon") -> Schedule:
    return vp_schedule(alphas_cumprod=scaled_linear_alphas_cumprod(dtype=torch.float64), prediction=prediction)


@pytest.mark.parametrize("num_steps", [5, 20])
def test_without_jitter_the_sampler_is_diffusers_dpm_solver(num_steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe = open_pipeline("sd15", tiny_folder("sd15"), dtype=torch.float64)
    solver = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=False,
    )
    timesteps = (torch.arange(num_steps - 1, -1, -1) * (1000 // num_steps)).tolist()
    solver.set_timesteps(timesteps=timesteps)
    width = pipe.unet.config.cross_attention_dim
    text = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sample, states, outputs = start, [], []
    with torch.no_grad():
        for timestep in solver.timesteps:
            states.append(sample)
            outputs.append(pipe.unet(sample, timestep, text, return_dict=False)[0])
            sample = solver.step(outputs[-1], timestep, sample, return_dict=False)[0]
        noisy, output = own_states(
            Denoiser("sd15", pipe.unet),
            stable_diffusion(),
            start.expand(num_steps, -1, -1, -1),
            torch.tensor(timesteps),  # every row ends at another one
            torch.zeros(num_steps, num_steps, dtype=torch.float64),
            {"encoder_hidden_states": text.expand(num_steps, -1, -1)},
        )
    torch.testing.assert_close(noisy, torch.cat(states), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, torch.cat(outputs), rtol=1e-5, atol=1e-5)


SCHEDULES = {
    **{name: stable_diffusion(name) for name in ("epsilon", "v_prediction", "sample")},
    "flow": flow_schedule(shift=3.0, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_network_that_knows_the_clean_latents_is_followed_exactly(name: str) -> None:
    """Then x_t = alpha clean + sigma noise at every timestep, whatever the steps; and its output is the target there."""
    schedule, rows = SCHEDULES[name], 40
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(rows, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    timestep = torch.arange(0, 1000, 25)
    jitter = torch.rand(rows, 6, generator=generator, dtype=torch.float64)
    first = visited_timesteps(timestep, jitter, 1000)[:, -1]

    def network(noisy: Tensor, given: Tensor, *, row: Tensor) -> Tensor:
        return schedule.target(clean[row], noise[row], schedule.index_of(given))

    start = schedule.add_noise(clean, noise, first)
    noisy, output = own_states(network, schedule, start, timestep, jitter, {"row": torch.arange(rows)})
    torch.testing.assert_close(noisy, schedule.add_noise(clean, noise, timestep), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output, schedule.target(clean, noise, timestep), rtol=1e-9, atol=1e-9)


def test_rows_that_have_arrived_are_not_sampled_any_further() -> None:
    rows: list[int] = []

    def network(noisy: Tensor, given: Tensor) -> Tensor:
        rows.append(len(noisy))
        return noisy

    timestep = torch.tensor([999, 760, 740, 300, 260])  # parts 3 3 2 1 1 of four
    own_states(network, stable_diffusion(), torch.randn(5, 1, 2, 2).double(), timestep, torch.rand(5, 4).double(), {})
    assert rows == [5, 3, 2]


def test_sampling_own_states_never_waits_for_the_device_between_steps() -> None:
    asked: list[str] = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    start, jitter = torch.randn(5, 1, 2, 2).double(), torch.rand(5, 4).double()
    with Asked():
        own_states(lambda noisy, given: noisy, stable_diffusion(), start, torch.tensor([760, 999, 300, 740, 260]), jitter, {})
    assert len(asked) > 20
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "equal"} & set(asked)


# The source


class Opened:
    """Policy and stream of a config, without a training loop."""

    def __init__(self, output: Path, family: str = "sd15", source: dict[str, Any] | None = None, **changes: Any) -> None:
        from accelerate import Accelerator

        forget_accelerate()
        merged = {**DRO, "source": source or replay(), **changes}
        config = config_of(tree(output, family, **merged))
        self.examples, _ = read_examples(config.data)
        self.accelerator = Accelerator(cpu=True)
        objective = build_objective(config, self.examples)
        self.policy = open_policy(config, self.examples, objective, self.accelerator)
        self.stream = config.source.build().open(self.examples, self.policy, accelerator=self.accelerator, seed=0)

    def batches(self, steps: int = 1, batch_size: int = 4, **changes: int) -> Iterator[Any]:
        sizes = {"num_examples": len(self.examples), "batch_size": batch_size, "accumulation": 1, "seed": 0, **changes}
        return self.stream.batches(Order(**sizes), 0, steps)


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl", "sd3"])
def test_expert_and_own_state_share_timestep_and_condition_and_the_own_error_is_nothing_at_first(
    tmp_path: Path, family: str
) -> None:
    opened = Opened(tmp_path, family)
    (prepared,) = opened.batches()
    inputs = prepared.inputs
    assert inputs.noisy.shape[:2] == (4, 2) and torch.equal(inputs.timestep[:, 0], inputs.timestep[:, 1])
    for name, value in inputs.condition.items():
        if name in inputs.per_candidate:
            assert torch.equal(value[:, 0], value[:, 1])
        else:
            assert len(value) == 4
    with torch.no_grad():
        logps = inputs.logps(opened.policy.network)
        with opened.policy.reference() as reference:
            torch.testing.assert_close(inputs.logps(reference), logps, rtol=0, atol=1e-6)
    assert (logps[:, 1] > -1e-8).all() and (logps[:, 0] < -1e-3).all()
    with torch.no_grad():
        for parameter in opened.policy.parameters():
            parameter.add_(0.3 * torch.ones_like(parameter))
        assert (inputs.logps(opened.policy.network)[:, 1] < -1e-8).all()


def test_the_expert_is_the_noised_image_of_the_offline_source(tmp_path: Path) -> None:
    own = next(iter(Opened(tmp_path / "a").batches())).inputs
    expert = next(iter(Opened(tmp_path / "b", source={"name": "offline"}, loss={"name": "sft"}).batches())).inputs
    for name in ("noisy", "target", "timestep"):
        assert torch.equal(getattr(own, name)[:, :1], getattr(expert, name))


@pytest.mark.parametrize("split", [(2, 2, 1), (1, 4, 1), (2, 1, 2)])
def test_own_states_depend_on_the_place_in_the_run_and_not_on_how_a_step_is_split(
    tmp_path: Path, split: tuple[int, int, int]
) -> None:
    opened = Opened(tmp_path, source=replay(sampling_batch=3))
    whole = next(iter(opened.batches())).inputs
    batch_size, accumulation, num_processes = split
    found = {}
    for process in range(num_processes):
        sizes = {"batch_size": batch_size, "accumulation": accumulation, "num_processes": num_processes, "process": process}
        for micro, prepared in enumerate(opened.batches(**sizes)):
            found[micro, process] = prepared.inputs.noisy
    parts = torch.cat([found[key] for key in sorted(found)])
    torch.testing.assert_close(parts, whole.noisy, rtol=0, atol=1e-5)


def test_the_policy_is_sampled_anew_at_every_refresh_and_left_in_peace_between(tmp_path: Path) -> None:
    passes: list[int] = []
    opened = Opened(tmp_path, source=replay(refresh_every=2, sampling_batch=16))
    opened.policy.denoiser.core.register_forward_hook(lambda module, given, output: passes.append(len(output[0])))
    seen = []
    for number, prepared in enumerate(opened.batches(4)):
        seen.append((number, len(passes), prepared.inputs.noisy[:, 1]))
    calls = [count for _, count, _ in seen]
    assert calls[0] == calls[1] > 0 and calls[2] == calls[3] > calls[1]
    assert len({state.flatten()[0].item() for _, _, state in seen}) == 4
    assert max(passes) <= 8  # both micro-batches of a block at once


# Runs

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("sd15", {"adapter": {"lora": None}, "training": {"optimiser": {"learning_rate": 1e-4}}}),
    "sdxl": ("sdxl", {"adapter": {"flip": True, "prompt_dropout": 0.2}}),
    "flow": ("sd3", {}),
    "bf16": ("sd15", {"training": {"mixed_precision": "bf16"}, "adapter": {"dtype": "float32"}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_the_policy_and_starts_at_the_margin(tmp_path: Path, name: str) -> None:
    family, changes = RUNS[name]
    output = train(tmp_path / "out", family, source=replay(), **{**DRO, **changes})
    rows = metrics_of(output)
    assert rows[0]["loss"] == pytest.approx(0.001, abs=1e-6)  # policy and reference agree
    assert rows[1]["loss"] != rows[0]["loss"]
    assert rows[0]["mse/rejected"] < 1e-6 < rows[0]["mse/chosen"]
    if name != "flow":
        assert any(
            bool(value.abs().max() > 0) for key, value in final_weights(output).items() if "lora_B" in key or name == "full"
        )


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_a_run_resumed_in_the_middle_of_a_block_ends_bit_for_bit_the_same(tmp_path: Path, refresh_every: int) -> None:
    changes = {
        **DRO,
        "source": replay(refresh_every=refresh_every),
        "training": {"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 5, "accumulation": 2, "batch_size": 1},
    }
    output = train(tmp_path / "out", **changes)
    before, numbers_before = contents(output), numbers(output)
    train(output, **changes, resume=str(output / "checkpoint-2"))
    assert contents(output) == before
    assert numbers(output) == numbers_before


def test_experts_that_rank_selected_are_trained_on(tmp_path: Path) -> None:
    rows = [
        replace(
            comparison_of(n, [encoded(32, 32, seed=10 * n + place) for place in range(2)]), ranks=None, scores={"judge": scores}
        )
        for n, scores in enumerate([(1.0, 5.0), (2.0, 3.0), (9.0, 8.0)])
    ]
    words = [f"data={write_rows(rows, tmp_path / 'scored.parquet')}", f"output={tmp_path / 'experts.jsonl'}"]
    rank.main(read_config(RankConfig, None, [*words, "select={judge: judge, count: 3}"]))
    data = {"importer": {"name": "comparisons", "path": str(tmp_path / "experts.jsonl")}, "view": "best"}
    output = train(tmp_path / "out", **{**DRO, "data": data}, source=replay())
    assert "3 examples" in (output / "README.md").read_text() or len(metrics_of(output)) == 2
    examples, _ = read_examples(config_of(tree(tmp_path / "again", data=data, loss={"name": "sft"})).data)
    expected = [(0, 1), (2, 0), (2, 1)]
    keys = {examples[i].samples[0].completion.images[0].key() for i in range(len(examples))}
    assert keys == {rows[row].candidates[place].images[0].key() for row, place in expected}


def test_a_longer_run_begins_as_the_shorter_one(tmp_path: Path) -> None:
    changes = {**DRO, "source": replay(refresh_every=3)}
    short = train(tmp_path / "short", **changes, training={"steps": 2})
    long = train(tmp_path / "long", **changes, training={"steps": 4})
    assert numbers(short) == numbers(long)[:2]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "view": ({"data": {"view": "pair"}}, r"data\.view: gives 2 candidates, want one expert image.*best"),
    "prompts": ({"data": {"view": "prompts"}}, r"data\.parquet:1: got candidates with 0 images, want 1 each"),
    "guard": ({"adapter": {"winner_guard": {"mu": 0.9}}}, r"adapter\.winner_guard: guards the better of two images"),
    "buckets": (
        {"adapter": {"buckets": {"sizes": [[32, 32], [32, 64]]}}},
        r"adapter\.buckets: replay samples and trains at one size",
    ),
    "num_steps": ({"source": replay(num_steps=0)}, r"num_steps: got 0, want 1 or more"),
    "too_many_steps": ({"source": replay(num_steps=2000)}, r"source\.num_steps: got 2000, want at most 1000"),
    "loss": ({"loss": {"name": "kto"}}, r"loss\.kto: needs the data labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_replay_cannot_use_is_refused_before_a_file_is_written(tmp_path: Path, name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", **{**DRO, "source": replay(), **changes})
    assert not (tmp_path / "out").exists()


def test_an_empty_expert_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experts.jsonl").write_text("")
    data = {"importer": {"name": "single_images", "path": str(tmp_path / "experts.jsonl")}, "view": "best"}
    with pytest.raises(UserError, match=r"experts\.jsonl: got no rows, want at least one image"):
        train(tmp_path / "out", **{**DRO, "data": data}, source=replay())


@pytest.mark.parametrize("name", ["experts.parquet", "experts.jsonl"])
def test_an_empty_table_of_experts_is_one_clear_error_of_the_command(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / name
    if rows.suffix == ".parquet":
        empty_dataset().to_parquet(str(rows))
    else:
        rows.touch()
    config = write_config(tmp_path / "config.yaml", tree(tmp_path / "out", rows=rows, **DRO, source=replay()))
    assert cli.main(["train", str(config)]) == 2
    told = capsys.readouterr().err
    assert "data: got no usable row, want at least one: 0 rows" in told and "The data are empty" in told
    assert "Traceback" not in told and not (tmp_path / "out").exists()


def test_a_reward_model_cannot_be_the_policy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source: got replay with an adapter that makes no samples, want adapter: diffusion"):
        config_of(tree(tmp_path / "out", **{**DRO, "source": replay(), "adapter": adapter_of(LATENT)}))
