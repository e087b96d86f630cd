"""Silence for the libraries that load and save models, so that a run's own lines are read."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """diffusers, transformers and datasets show errors only and no bars of their own inside the block; then as before.

    Their bars ("Loading pipeline components ...", "Loading weights ...", "Map ...") and hints would bury the few lines that a
    run has to say. Nothing else is silenced, and no Python warning.
    """
    import datasets
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(one, one.get_verbosity()) for one in (of_diffusers, of_transformers)]
    bars = [
        *((one.disable_progress_bar, one.enable_progress_bar, one.is_progress_bar_enabled()) for one, _ in levels),
        (datasets.disable_progress_bars, datasets.enable_progress_bars, not datasets.are_progress_bars_disabled()),
    ]
    try:
        for one, _ in levels:
            one.set_verbosity_error()
        for disable, _, _ in bars:
            disable()
        yield
    finally:
        for one, level in levels:
            one.set_verbosity(level)
        for _, enable, enabled in bars:
            if enabled:
                enable()
