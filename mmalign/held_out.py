"""How well a tuned model orders preference pairs that it was not trained on, by its implicit reward."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.adapters.image_text import ImageTextAdapter
from mmalign.adapters.step_reward import StepRewardAdapter
from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_reward import TextRewardAdapter
from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.experiment import Data, TrainConfig, read_examples, read_run
from mmalign.records import Example, Examples
from mmalign.records.table import in_batches
from mmalign.report import PairFit
from mmalign.statistics import win_rate

logger = logging.getLogger(__name__)


def pair_fit(run: Path, data: Data, *, draws: int = 8, batch_size: int = 4, device: str | None = None) -> PairFit:
    """Implicit-reward accuracy and error drift of a run's final weights on held-out pairs.

    reward = logp of the tuned model - logp of its base: of diffusion models the mean over `draws` seeded (timestep, noise)
    draws of each pair, of language models the sum over the tokens, in nats and in one pass. The drift is the mean error above
    the base's; of language models it is -reward. A pair counts as right if the chosen candidate has the higher reward, an equal
    one half. A pair whose label is a tie (prob 0.5) has no chosen candidate: it is left out and counted.

    Source: the implicit-reward accuracy of Wallace et al. 2023, section 5.2 (60.8 % SD 1.5, 72.0 % SDXL, published).
    Args:
        run: output folder of `mmalign train`.
        data: held-out pairs, in any importer's format.
        draws: of every pair; more draws, less noise. Language models need one.
        batch_size: pairs at a time.
        device: None: the GPU if there is one.
    Raises:
        UserError: no run there, no such device, data that are not pairs, or only ties.
    """
    config = run_config(run)
    where = torch_device(device or "auto")
    examples, summary = read_examples(data)
    if len(examples[0].samples) != 2:
        raise UserError(f"pairs: got {len(examples[0].samples)} candidates an example, want 2. Set pairs.view: pair.")
    logger.info("pairs      %s", summary)
    of_text = config.adapter.target in (TextAdapter, ImageTextAdapter)
    draws = 1 if of_text else draws
    unused: dict[str, Any] = {"cache": None, "validation": None, "features": None}
    unused |= {"draws": draws, "prompt_dropout": 0.0, "winner_guard": None}
    unused = {name: value for name, value in unused.items() if name in config.adapter.settings}
    policy = (
        config.adapter.with_settings(**unused)
        .build()
        .open(
            device=where,
            seed=config.seed + 1,  # other draws than in training
            needs_reference=True,
            weights=run,
        )
    )
    policy.network.eval()
    batches = list(_batches(policy, examples, draws, batch_size))
    if not batches:
        raise UserError(f"pairs: got {len(examples)} ties, want pairs with a better image. Give other data.")
    rewards, readings = zip(*batches, strict=True)
    mean_rewards = torch.cat(list(rewards))
    drift = torch.cat(list(readings)).mean(0).tolist()
    num_tied_labels = len(examples) - len(mean_rewards)
    if num_tied_labels:
        logger.info("pairs      %d of %d are ties by their label (prob 0.5) and left out", num_tied_labels, len(examples))
    return PairFit(
        num_draws=draws,
        accuracy=win_rate(mean_rewards[:, 1], mean_rewards[:, 0]),
        chosen_drift=drift[0],
        rejected_drift=drift[1],
        num_tied_labels=num_tied_labels,
        error="negative log-likelihood in nats" if of_text else "denoising error",
    )


def _decided(examples: Examples) -> Iterator[Example]:
    """The pairs whose label is no tie."""
    from tqdm import tqdm

    return (example for example in tqdm(examples, desc="held-out pairs") if example.side.get("prob") != 0.5)


def _batches(policy: Any, examples: Examples, draws: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(rewards, error above the reference's), each (batch, 2) and averaged over the draws."""
    size = 1 if getattr(policy.settings, "buckets", None) is not None else batch_size  # a batch is of one bucket
    for group in in_batches(_decided(examples), size):
        ratios, drifts = [], []
        for draw in range(draws):
            prepared = policy.prepare(policy.collate([policy.item(example, draw) for example in group]))
            with torch.no_grad():
                logps = prepared.inputs.logps(policy.network)
                with policy.reference() as network:
                    reference = prepared.inputs.logps(network)
            ratios.append((logps - reference).double().cpu())
            drift = next(iter(prepared.inputs.readings(logps - reference).values()), reference - logps)
            drifts.append(drift.double().cpu())
        yield torch.stack(ratios).mean(0), torch.stack(drifts).mean(0)


def run_config(run: Path) -> TrainConfig:
    """The config of a run that tuned a model.

    Raises:
        UserError: no run there, or one of a reward model.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"run: got {run}, want the output folder of `mmalign train`, with config.yaml. Check the path.")
    config = read_run(path)
    if config.adapter.target in (StepRewardAdapter, TextRewardAdapter):
        raise UserError(
            f"run: got {run}, which trained a reward model, want the run of a diffusion or language model. A reward model's "
            "accuracy is rewards/accuracies in its metrics.jsonl."
        )
    return config
