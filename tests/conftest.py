"""Tests run offline, on one thread, with every shape and type annotation of mmalign checked at run time."""

import gc
import os
from collections.abc import Iterator

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
    WANDB_MODE="offline",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
)

import pytest
import torch
import type_checks

type_checks.install()  # before the first import of mmalign
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_environment_of_each_test_is_its_own() -> Iterator[None]:
    """`accelerate` tells its processes by variables: what one test sets must not launch the next."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of minutes come first, so that no process is left alone with one of them at the end."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """The libraries stay until the end: the garbage collector need not look through them again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count what is left of them at the end find nothing."""
    gc.unfreeze()
