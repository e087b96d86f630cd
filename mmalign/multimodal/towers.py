"""What a frozen tower makes of images, known to all networks that have it, so that it runs once though projectors learn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmalign.multimodal.families import Family

MOST_BYTES = 2**28  # of remembered outputs, beside those of the pass at hand


class Towers:
    """Outputs of a tower that is the same in several networks: a policy and its frozen copy, or a policy with its LoRA off.

    What the tower gives for the same images is remembered; projectors run anew, since a policy's learns. Where projectors lie
    inside a tower (the mergers of Qwen-VL) the layers whose outputs they take are remembered.

    Attributes:
        num_encoded: how often a tower ran.
    """

    def __init__(self) -> None:
        """Nothing is remembered yet."""
        self._memo: OrderedDict[Hashable, list[Any]] = OrderedDict()
        self.num_encoded = 0

    @contextmanager
    def known(self, model: nn.Module, family: Family, key: Hashable) -> Iterator[None]:
        """Within it, the model's tower says what it said before under this key; if it said nothing yet, that is remembered.

        Args:
            model: of the family; no weight of its tower may take a gradient.
            family: its facts.
            key: of everything that the tower is given: the images in their order, the precision.
        """
        asked, passed_over = _layers(model, family)
        with ExitStack() as replaced:
            if key in self._memo:
                self._memo.move_to_end(key)
                answers = iter(self._memo[key])
                for layer in asked:
                    replaced.enter_context(_forward(layer, lambda *_, **__: next(answers)))
                for layer in passed_over:
                    replaced.enter_context(_forward(layer, lambda states, *_, **__: states))
                yield
                return
            made: list[Any] = []
            self.num_encoded += 1
            for layer in asked:
                replaced.enter_context(_forward(layer, _noting(layer.forward, made)))
            yield
        self._remember(key, [_needed(output, model) for output in made])

    def forget(self) -> None:
        """Remember nothing."""
        self._memo.clear()

    def _remember(self, key: Hashable, outputs: list[Any]) -> None:
        self._memo[key] = outputs
        while len(self._memo) > 1 and sum(map(_num_bytes, self._memo.values())) > MOST_BYTES:
            self._memo.popitem(last=False)


def _layers(model: Any, family: Family) -> tuple[list[nn.Module], list[nn.Module]]:
    """Of the tower, what is asked for its output, and what need not run once those are known."""
    tower = model.model.get_submodule(family.tower)
    if not any(path.startswith(f"{family.tower}.") for path in family.projectors):
        return [tower], []
    taken = {len(tower.blocks) - 1, *getattr(tower.config, "deepstack_visual_indexes", ())}
    blocks = dict(enumerate(tower.blocks))
    return [blocks[n] for n in sorted(taken)], [block for n, block in blocks.items() if n not in taken]


@contextmanager
def _forward(layer: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    before = vars(layer).get("forward")
    layer.forward = answer
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _noting(forward: Callable[..., Any], made: list[Any]) -> Callable[..., Any]:
    def noted(*given: Any, **named: Any) -> Any:
        made.append(forward(*given, **named))
        return made[-1]

    return noted


def _needed(output: Any, model: Any) -> Any:
    """An output without the states of layers whose features the model does not take."""
    states = getattr(output, "hidden_states", None)
    if states is None:
        return output
    told = getattr(model.config, "vision_feature_layer", None)
    layers = {n % len(states) for n in ((told,) if isinstance(told, int) else told or ())}
    output.hidden_states = tuple(state if n in layers else None for n, state in enumerate(states))
    return output


def _num_bytes(outputs: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor))
