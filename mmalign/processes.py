"""The processes that `accelerate launch` started: which one this is, its share of the work, and where all of them meet."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from mmalign.devices import torch_device
from mmalign.errors import UserError

Item = TypeVar("Item")
LONGEST_WAIT = timedelta(days=7)  # one process may be done long before another


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among its peers; alone where nothing was launched.

    Args:
        state: `accelerate.PartialState` of several processes, None of one.
    """

    state: Any = None

    @property
    def index(self) -> int:
        """0 is the main process."""
        return 0 if self.state is None else int(self.state.process_index)

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.state is not None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what all of them made."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of the items, which are the same on all; together the parts are the whole, in order."""
        if self.state is None:
            return list(items)
        with self.state.split_between_processes(list(items)) as part:
            return list(part)

    def wait(self) -> None:
        """Go on when all are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def gathered(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, in the order of the processes."""
        if self.state is None:
            return list(items)
        from accelerate.utils import gather_object

        return list(gather_object(list(items)))

    def agreed(self, value: Item) -> Item:
        """The main process's value, on all."""
        if self.state is None:
            return value
        from accelerate.utils import broadcast_object_list

        found: list[Item] = broadcast_object_list([value])
        return found[0]

    def device(self, name: str) -> torch.device:
        """The device of a setting; `auto` is this process's own.

        Raises:
            UserError: as `devices.torch_device`.
        """
        return self.state.device if self.state is not None and name == "auto" else torch_device(name)


def launched_processes() -> Processes:
    """The processes of this launch, connected.

    Raises:
        UserError: several processes that do not find each other, and would all do the same work.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if count == 1:
        return Processes()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")), timeout=LONGEST_WAIT)
    if state.num_processes != count:
        raise UserError(
            f"launch: got {count} processes, each of which works alone, want them connected. For several processes on CPUs "
            "set ACCELERATE_USE_CPU=1 in the environment; for GPUs see that each process has one."
        )
    return Processes(state=state)
