"""Fixtures: the pretrained digits model and a whole quickstart, made once and shared by the tests that measure outcomes.

A test module takes them with `pytest_plugins = ("digits_base",)`; `outcomes` holds what to do with them.
"""

import os
import shutil
from pathlib import Path

import pytest
from outcomes import SEED, one_process_at_a_time

from mmalign import quickstart
from mmalign.digits import Base, Pretraining, fingerprint, pretrained
from mmalign.digits_flow import FlowPretraining, flow_fingerprint, pretrained_flow
from mmalign.quickstart import QuickstartConfig


@pytest.fixture(scope="session")
def digits_base(request: pytest.FixtureRequest) -> Base:
    """The base at its full recipe, about 90 CPU seconds; pytest's own cache keeps it until the recipe changes."""
    cache = request.config.cache.mkdir("mmalign-digits")
    with one_process_at_a_time(cache):
        name = f"digits-{fingerprint(Pretraining(), SEED)}"
        flow = f"digits-flow-{flow_fingerprint(FlowPretraining(), Base(folder=cache / name, reused=True), SEED)}"
        for old in cache.glob("digits-*"):
            if old.name not in (name, flow):
                shutil.rmtree(old)
        return pretrained(Pretraining(), seed=SEED, cache=cache)


@pytest.fixture(scope="session")
def digits_flow_base(digits_base: Base) -> Base:
    """The rectified-flow base on the autoencoder of `digits_base`, about 90 CPU seconds more; kept beside it."""
    cache = digits_base.folder.parent
    with one_process_at_a_time(cache):
        return pretrained_flow(FlowPretraining(), digits_base, seed=SEED, cache=cache)


@pytest.fixture(scope="session")
def digits_run(digits_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of `mmalign quickstart` at its defaults: scored.parquet, before/, lora/, results.json ..."""
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    out = shared / "digits-run"
    with one_process_at_a_time(shared):
        if not (out / "results.json").is_file():
            quickstart.main(QuickstartConfig(out=out, seed=SEED, cache=digits_base.folder.parent))
    return out
