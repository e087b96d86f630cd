"""The last layer of a backbone, run for those tokens of a packed row alone whose states are asked for."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmalign.language import packed

OF_A_TOKEN = ("mlp", "feed_forward")  # of a layer: what it makes of a token is made of that token alone
OF_A_QUERY = ("q_proj", "o_proj", "out_proj", "c_proj", "dense")  # the same, of its attention


class LastLayer:
    """Hooks on the last layer of a model, which spare what no prediction hangs on.

    Of a token whose state nobody asks for, most of all those of a prompt, the last layer's keys and values are needed and
    nothing else. Its query, the output of its attention and its feed-forward part are left out, and are zero. The states asked
    for and all gradients are the same. Every call of the attention tells the row (`packed.Row.needed`), as does gradient
    checkpointing when it computes the layer again; without one, or with `needed` None, the layer does as ever.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module) -> None:
        """Hook the parts that are known by name.

        Args:
            layer: the last one.
            attention: its own.
        """
        self._row: weakref.ref[packed.Row] | None = None  # lives as long as the pass that it is of, and its recomputation
        self.handles = [
            attention.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.register_forward_hook(self._end),
        ]
        for owner, names in ((layer, OF_A_TOKEN), (attention, OF_A_QUERY)):
            for name, part in owner.named_children():
                if name in names:
                    self.handles += [part.register_forward_pre_hook(self._select), part.register_forward_hook(self._spread)]

    @property
    def row(self) -> packed.Row | None:
        """The row that is run; None: there is none, or it is a padded one."""
        return None if self._row is None else self._row()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _begin(self, _: nn.Module, __: Any, kwargs: Mapping[str, Any]) -> None:
        row = kwargs.get(packed.NAME)
        self._row = None if row is None else weakref.ref(row)

    def _end(self, *_: Any) -> None:
        self._row = None

    def _select(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Take the tokens out, where a part is called with the states of all of them and nothing else (a residual, say)."""
        row = self.row
        if row is None or row.needed is None or len(args) != 1 or args[0].shape[-2:-1] != (row.num_tokens,):
            return None
        return (args[0].index_select(-2, row.needed),)

    def _spread(self, _: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """Put what became of them back into their places; hooks that follow `_select` get what it left as `args`."""
        row = self.row
        if row is None or row.needed is None or len(args) != 1 or args[0].shape[-2:-1] != (len(row.needed),):
            return None
        of_tokens = out[0] if isinstance(out, tuple) else out  # experts tell what their router said, too
        spread = of_tokens.new_zeros(*of_tokens.shape[:-2], row.num_tokens, of_tokens.shape[-1])
        spread = spread.index_copy(of_tokens.ndim - 2, row.needed, of_tokens)
        return (spread, *out[1:]) if isinstance(out, tuple) else spread


def spare(model: nn.Module, attention: nn.Module) -> LastLayer | None:
    """Hook the layer of a model that holds this attention; None: it is hooked already, as in a copy of a hooked model.

    Args:
        model: the whole.
        attention: the last to be called.
    """
    name = next(name for name, module in model.named_modules() if module is attention)
    name = name.rpartition(".")[0]
    while isinstance(model.get_submodule(name), nn.ModuleList):  # a layer of several attentions
        name = name.rpartition(".")[0]
    layer = model.get_submodule(name)
    if any(isinstance(getattr(hook, "__self__", None), LastLayer) for hook in attention._forward_pre_hooks.values()):
        return None
    return LastLayer(layer, attention)
