"""The tests' own check of mmalign: wrong types and shapes of arguments and results are refused in every kind of function."""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import type_checks
from jaxtyping import TypeCheckError

MODULE = """
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, zeros

if TYPE_CHECKING:
    from nowhere import Nothing


def added(first: Float[Tensor, "rows dim"], second: Float[Tensor, "rows dim"], *, scale: float = 1) -> Float[Tensor, " rows"]:
    return scale * (first + second).sum(0 if first.shape[0] == 7 else 1)


def filled(count: int, size: int) -> Float[Tensor, "{count} dim"]:
    return zeros(size, 2)


def outer(offset: int):
    def inner(value: Float[Tensor, " dim"], other: Float[Tensor, " dim"], count: int = 2) -> int:
        return offset if count else "none"

    return inner


def pieces(whole: Float[Tensor, " dim"], size: int) -> Iterator[Float[Tensor, " part"]]:
    for start in range(0, len(whole), size):
        yield added(whole[None, start : start + size], whole[None, start : start + size])


def later(thing: Nothing, later_one: Own | None = None) -> int:
    return thing


@dataclass(frozen=True, kw_only=True)
class Own:
    rows: Float[Tensor, "batch 2"]
    names: tuple[str, ...] = field(default_factory=tuple)

    def same(self, other: Own) -> Own:
        return other

    @classmethod
    def of(cls, rows: list[int]) -> Own:
        return cls(rows=rows)

    @property
    def width(self) -> str:
        return self.rows.shape[1]
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module that is imported as those of mmalign are."""
    import mmalign

    folder = tmp_path_factory.mktemp("checked")
    (folder / "checked_by_tests.py").write_text(MODULE)
    mmalign.__path__.append(str(folder))
    yield importlib.import_module("mmalign.checked_by_tests")
    mmalign.__path__.remove(str(folder))
    del sys.modules["mmalign.checked_by_tests"]


def test_right_calls_pass(module: Any) -> None:
    two = torch.zeros(3, 2)
    assert module.added(two, two, scale=2).shape == (3,)
    assert module.outer(5)(two[0], two[0]) == 5 and module.outer(6)(two[0], two[0], count=1) == 6
    assert [one.shape for one in module.pieces(torch.zeros(5), 2)] == [(1,)] * 3
    assert module.filled(3, 3).shape == (3, 2)
    one = module.Own(rows=two)
    assert one.same(one) is one and module.later(4, one) == 4


def test_types_and_shapes_of_arguments_are_checked(module: Any) -> None:
    two = torch.zeros(3, 2)
    inner = module.outer(5)
    for wrong in (
        lambda: module.added(two, [1.0]),
        lambda: module.added(two.long(), two),
        lambda: module.added(two, torch.zeros(2, 2)),
        lambda: module.added(two, two, scale="2"),
        lambda: inner(two[0], torch.zeros(3)),
        lambda: inner(two[0], two[0], count="2"),
        lambda: module.pieces(two, 2),
        lambda: module.pieces(two[0], "2"),
        lambda: module.later(4, "own"),
        lambda: module.Own(rows=torch.zeros(2, 3)),
        lambda: module.Own(rows=two, names=["a"]),
        lambda: module.Own(rows=two).same(two),
        lambda: module.Own.of([1]),
        lambda: module.Own.of("rows"),
    ):
        with pytest.raises(TypeCheckError):
            wrong()


def test_results_are_checked_with_the_axes_of_the_arguments(module: Any) -> None:
    for wrong in (
        lambda: module.added(torch.zeros(7, 2), torch.zeros(7, 2)),
        lambda: module.outer(5)(torch.zeros(1), torch.zeros(1), count=0),
        lambda: module.outer("5")(torch.zeros(1), torch.zeros(1)),
        lambda: module.filled(3, 4),
        lambda: module.later("4"),
        lambda: module.Own(rows=torch.zeros(3, 2)).width,
    ):
        with pytest.raises(TypeCheckError):
            wrong()


def test_an_axis_has_a_size_in_one_call_only(module: Any) -> None:
    for count in (2, 3):
        module.added(torch.zeros(count, count), torch.zeros(count, count))


def test_a_check_of_every_function_of_mmalign_can_be_made() -> None:
    """An annotation without meaning is told, also where nothing calls its function."""
    import mmalign

    for found in pkgutil.walk_packages(mmalign.__path__, "mmalign."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    assert len(type_checks.checks) > 1000
    for made in type_checks.checks:
        assert callable(made())
