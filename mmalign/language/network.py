"""A causal language model of transformers as a network of token layouts: `network(layout) -> {name: (slots,)}`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from mmalign.errors import UserError
from mmalign.language import packed
from mmalign.language.distillation import Lesson, distilled_sums
from mmalign.language.head import Head, likeliest, slot_sums, target_logits
from mmalign.language.last_layer import spare
from mmalign.likelihoods import Layout, Tokens
from mmalign.likelihoods.tokens import GRADED, PER_TOKEN

logger = logging.getLogger(__name__)

# Nats that the probe's sums may differ by: what rounding makes of them; transformers' norms compute in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-4, torch.float16: 0.1, torch.bfloat16: 0.5}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@runtime_checkable
class Sight(Protocol):
    """What a model that sees is given beside the ids of a layout; see `multimodal.network`."""

    @property
    def within_windows(self) -> bool:
        """See `packed.Row`."""

    @property
    def crosses(self) -> bool:
        """Whether the model attends to images across, so that its rows cannot be packed."""

    def probe(self, vocab: int) -> Tokens:
        """Tokens to try a model with."""

    def alike(self, layout: Layout) -> Iterator[tuple[Int[Tensor, " some"], Layout]]:
        """Padded rows in groups that the model can run together, one after the other."""

    def blocks(self, layout: Layout) -> dict[int, tuple[tuple[int, int], ...]]:
        """See `packed.Row`."""

    def arguments(self, model: Any, layout: Layout, takes: frozenset[str]) -> dict[str, Any]:
        """Arguments of the backbone that take the place of others."""

    def logits(self, model: Any, layout: Layout) -> Float[Tensor, "rows length vocab"]:
        """The model's own, of the probe's padded rows."""

    def touched(self, model: Any, layout: Layout) -> Tensor | None:
        """Zero with a graph to weights that the layout does not use; None: there are none."""


class TokenNetwork(nn.Module):
    """A causal language model that gives sums of log-probabilities instead of logits.

    The output layer is called inside this forward, so that wrappers that shard or gather weights see it.

    Args:
        model: a transformers causal language model, plain or with PEFT adapters injected (`model.add_adapter`).
        pack: try to run packed rows; False: padded rows only, and the model's attention stays as it was.
        kernel: of packed attention, see `packed.Row`.
        rows, accumulators: see `slot_sums`.
        sight: what gives a model that sees the images of a layout's media; None: a model of texts.
    Raises:
        UserError: an encoder-decoder, an output layer that is not a plain or LoRA linear one, or logits that mmalign does
            not get as the model does.
    """

    def __init__(
        self,
        model: Any,
        *,
        pack: bool = True,
        kernel: Literal["sdpa", "flex"] = "sdpa",
        rows: int | None = None,
        accumulators: int = 2,
        sight: Sight | None = None,
    ) -> None:
        """Check the probe's log-probabilities, and whether rows may be packed."""
        super().__init__()
        self.model = model
        self.kernel: Literal["sdpa", "flex"] = kernel
        self.rows, self.accumulators = rows, accumulators
        self.sight = sight
        if model.config.is_encoder_decoder:
            raise UserError(f"model: got {type(model).__name__}, an encoder-decoder, want a causal language model.")
        self._takes = frozenset(inspect.signature(self.backbone.forward).parameters)
        self._check_logits()
        self.why_not = "pack is off" if not pack else self._try_packing()
        if pack and self.why_not:
            logger.info("rows are padded, not packed: %s.", self.why_not)

    @property
    def packs(self) -> bool:
        """Whether packed layouts may be run."""
        return not self.why_not

    @property
    def backbone(self) -> Any:
        """The model without its output layer."""
        inner = self.model.base_model
        return self.model.model if inner is self.model else inner  # Llama 4's text model names another part as its base

    def forward(
        self, layout: Layout, wanted: frozenset[str] = frozenset(), lesson: Lesson | None = None
    ) -> dict[str, Float[Tensor, " slots"]]:
        """Sums over the scored tokens of every slot.

        Args:
            layout: what is run, on the model's device.
            wanted: see `slot_sums`, and `distilled_sums` where there is a lesson; `target_logits` are one a scored token;
                `rival` are the sums where each token's place is taken by the one that is likeliest there but for it.
            lesson: what a teacher makes of the same layout.
        Raises:
            ValueError: a packed layout, and the network does not pack.
        """
        states = self.states(layout)
        return self._sums(layout, states, self.head(states), wanted, lesson)

    def observe(
        self, layout: Layout, wanted: frozenset[str] = frozenset()
    ) -> tuple[dict[str, Float[Tensor, " slots"]], Lesson]:
        """What a call gives, and the lesson that makes this network the teacher of another, in one pass without a graph."""
        with torch.no_grad():
            states = self.states(layout)
            head = self.head(states)
            return self._sums(layout, states, head, wanted, None), Lesson(states=states, head=head)

    def likeliest(self, layout: Layout) -> Int[Tensor, " scored"]:
        """The tokens that the model finds likeliest in the places of the scored ones, without a graph."""
        with torch.no_grad():
            states = self.states(layout)
            return likeliest(states, self.head(states), rows=self.rows)

    def _sums(
        self, layout: Layout, states: Tensor, head: Head, wanted: frozenset[str], lesson: Lesson | None
    ) -> dict[str, Tensor]:
        scored = (layout.target, layout.slot, layout.counts)
        how: dict[str, Any] = {"rows": self.rows, "accumulators": self.accumulators}
        sums = slot_sums(states, head, *scored, weight=layout.weight, wanted=wanted & PER_TOKEN, opposed=layout.opposed, **how)
        if lesson is not None:
            sums |= distilled_sums(states, head, lesson, *scored, wanted=wanted & GRADED, **how)
        if "target_logits" in wanted:
            sums["target_logits"] = target_logits(states, head, layout.target)
        if "rival" in wanted:
            rivals = likeliest(states, head, rows=self.rows, but=layout.target)
            above = target_logits(states, head, rivals) - target_logits(states, head, layout.target)
            above = above if layout.weight is None else above * layout.weight.to(above)
            sums["rival"] = sums["logps"].index_add(0, layout.slot, above.to(sums["logps"]))
        return sums

    def states(self, layout: Layout) -> Float[Tensor, "scored dim"]:
        """Hidden states that predict the scored tokens.

        Raises:
            ValueError: a packed layout, and the network does not pack.
        """
        if layout.segments and not self.packs:
            raise ValueError(f"layout: got a packed one, want padded rows: {self.why_not}.")
        return self._hidden(layout).flatten(0, 1).index_select(0, layout.at)

    def hidden(self, layout: Layout) -> Float[Tensor, "rows length dim"]:
        """Last hidden states of all tokens."""
        return self._hidden(replace(layout, needed=None))

    def _hidden(self, layout: Layout) -> Float[Tensor, "rows length dim"]:
        """Last hidden states, of those tokens at least that are needed.

        No mask is needed for rows padded on the right: no token attends to what follows it.
        """
        if self.sight is None or layout.segments or not self.sight.crosses:
            states = self._run(layout)
        else:
            parts = [(rows, self._run(part)) for rows, part in self.sight.alike(layout)]
            states = torch.cat([part for _, part in parts])[torch.cat([rows for rows, _ in parts]).argsort()]
        nothing = None if self.sight is None else self.sight.touched(self.model, layout)
        return states if nothing is None else states + nothing.to(states.dtype)

    def _run(self, layout: Layout) -> Tensor:
        arguments = self._arguments(layout)
        out = self._entry(arguments)(use_cache=False, **arguments)
        if layout.segments and not arguments[packed.NAME].windows:
            raise ValueError("layout: got a packed one for a model whose attention was changed since. Pad the rows.")
        states: Tensor = out.last_hidden_state
        return states

    def _arguments(self, layout: Layout) -> dict[str, Any]:
        """Of the backbone, for a layout."""
        arguments: dict[str, Any] = {"attention_mask": None}
        if layout.segments:
            blocks: dict[str, Any] = {}
            if self.sight is not None:
                blocks = {"blocks": self.sight.blocks(layout), "within_windows": self.sight.within_windows}
            arguments = packed.row_arguments(layout, self.kernel, needed=layout.needed, **blocks)
        if "position_ids" in self._takes:
            arguments["position_ids"] = layout.positions
        arguments["input_ids"] = layout.ids
        return arguments if self.sight is None else arguments | self.sight.arguments(self.model, layout, self._takes)

    def _entry(self, arguments: dict[str, Any]) -> Any:
        """What is called: the backbone, or its language model alone with what only that takes (Qwen3-VL's deepstack)."""
        return self.backbone.language_model if "deepstack_visual_embeds" in arguments else self.backbone

    def head(self, states: Float[Tensor, "n dim"]) -> Head:
        """The output layer as it stands now, with the adapters that are switched on."""
        layer = self.model.get_output_embeddings()
        if hasattr(layer, "modules_to_save"):
            off = layer.disable_adapters or not layer.active_adapters
            layer = layer.original_module if off else layer.modules_to_save[layer.active_adapters[0]]
        base = getattr(layer, "base_layer", layer)
        if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
            raise UserError(f"model: got an output layer of {type(base).__name__}, want a linear one that is not quantised.")
        inner, outer = _low_rank(layer, states) if base is not layer else (None, None)
        config = self.model.config.get_text_config()
        return Head(
            weight=base.weight,
            bias=base.bias,
            inner=inner,
            outer=outer,
            scale=getattr(self.model, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0),
            softcap=next((getattr(config, name) for name in SOFTCAPS if getattr(config, name, None)), None),
        )

    def checkpoint_gradients(self, on: bool) -> None:
        """Recompute activations layer by layer in the backward pass, or keep them.

        Raises:
            UserError: the architecture has no such thing.
        """
        if on and not self.model.supports_gradient_checkpointing:
            raise UserError(
                f"gradient_checkpointing: got true for {type(self.model).__name__}, which has none. Set it to false."
            )
        # transformers renamed both in 5.23.
        new = hasattr(self.model, "activation_checkpointing_enable")
        name = f"{'activation' if new else 'gradient'}_checkpointing_{'enable' if on else 'disable'}"
        getattr(self.model, name)(*([{"use_reentrant": False}] if on else []))

    def _check_logits(self) -> None:
        """Compare the probe's log-probabilities with those of the model's own logits."""
        if self._is_meta():
            return
        layout = self._probe().padded().to(self._device())
        with _at_rest(self.model):
            ours = self(layout)["logps"]
            logits = self._logits(layout).flatten(0, 1)[layout.at]
        theirs = logits.to(ours.dtype).log_softmax(-1).gather(1, layout.target[:, None])[:, 0]
        sums = ours.new_zeros(layout.num_slots).index_add(0, layout.slot, theirs)
        off = float((ours - sums).abs().max())
        if not off <= self._tolerance():
            raise UserError(
                f"model: got {type(self.model).__name__}, whose log-probabilities are {off:.3g} nats off what mmalign makes of "
                "its hidden states, want a model whose logits are a linear layer's, scaled or soft-capped. Report its name."
            )

    def _try_packing(self) -> str:
        """Set the model's attention to the packed one and compare; why it may not be, with the attention set back, or ""."""
        reason = _static_reason(self.model, self.backbone)
        if not reason and self.sight is not None and self.sight.crosses:
            reason = "its tokens attend to images across, not within the row"
        if reason or self._is_meta():
            return reason
        before = self.model.config.get_text_config()._attn_implementation
        self._attend(packed.register())
        reason, attention = self._compare()
        if reason or attention is None:
            self._attend(before)
            return reason
        spared = spare(self.model, attention)
        if spared is not None and self._compare()[0]:
            spared.remove()
        return ""

    def _attend(self, implementation: str) -> None:
        """Set the attention of the language model; that of a vision tower stays as it is."""
        parts = self.model.config.sub_configs
        self.model.set_attn_implementation({"text_config": implementation} if "text_config" in parts else implementation)

    def _compare(self) -> tuple[str, nn.Module | None]:
        """Why the probe's packed row does not give what its padded rows do, or ""; and the attention that was called last."""
        tokens = self._probe()
        self.why_not = ""
        with _at_rest(self.model):
            padded = self(tokens.padded().to(self._device()))["logps"]
            layout = tokens.packed().to(self._device())
            arguments = self._arguments(layout)
            try:
                self._entry(arguments)(use_cache=False, **arguments)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                return f"its layers do not take a packed row ({str(error).splitlines()[0][:200]})", None
            row: packed.Row = arguments[packed.NAME]
            reason = _strange_windows(row.windows, self.model.config.get_text_config())
            if reason:
                return reason, None
            together = self(layout)["logps"]
        off = float((together - padded).abs().max())
        if not off <= self._tolerance():
            return f"{type(self.model).__name__} makes of a packed row what is {off:.3g} nats off", None
        return "", row.last

    def _probe(self) -> Tokens:
        vocab = self.model.config.get_text_config().vocab_size
        return _probe(vocab) if self.sight is None else self.sight.probe(vocab)

    def _logits(self, layout: Layout) -> Tensor:
        """The model's own logits of padded rows."""
        if self.sight is not None:
            return self.sight.logits(self.model, layout)
        logits: Tensor = self.model(input_ids=layout.ids, use_cache=False).logits
        return logits

    def _tolerance(self) -> float:
        """Of the least precise weights; quantised ones compute in bfloat16."""
        return max(TOLERANCE.get(parameter.dtype, TOLERANCE[torch.bfloat16]) for parameter in self.model.parameters())

    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def _is_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.model.parameters())


class _at_rest:
    """Without graph and dropout inside the block."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.no_grad = torch.no_grad()
        self.no_grad.__enter__()
        self.model.eval()

    def __exit__(self, *raised: Any) -> None:
        self.no_grad.__exit__(*raised)
        self.model.train(self.training)


def _low_rank(layer: Any, states: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A LoRA's own part of the output layer, adapters side by side: inner (n, rank) with its factor, outer (vocab, rank)."""
    if layer.disable_adapters or layer.merged:
        return None, None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None, None
    if any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in names):
        raise UserError("lora: got a variant of LoRA (DoRA, aLoRA, a bias) on the output layer, want plain LoRA there.")
    inner, outer = [], []
    for name in names:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        inner.append(linear(layer.lora_dropout[name](states.to(down.dtype)), down) * layer.scaling[name])
        outer.append(up)
    return torch.cat(inner, 1), torch.cat(outer, 1)


def _static_reason(model: Any, backbone: Any) -> str:
    """Why the architecture cannot be packed, as far as its class and config tell; or ""."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} carries a recurrent state from token to token"
    if getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False):
        return "its attention depends on places in the row (ALiBi)"
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS)
    if strange:
        return f"it has layers of {', '.join(strange)}"
    if not model._can_set_attn_implementation() or not model._supports_attention_backend:
        return f"{type(model).__name__} has an attention of its own"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{type(model).__name__} takes no positions"
    return ""


def _strange_windows(windows: Sequence[int | None], config: Any) -> str:
    """What is wrong with the windows that the layers asked for, one a layer; or ""."""
    if len(windows) != config.num_hidden_layers:
        return f"{len(windows)} of its {config.num_hidden_layers} layers attend as mmalign can steer"
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds.count("sliding_attention") != sum(window is not None for window in windows):
        return "its layers do not tell their sliding windows"
    return ""


def _probe(vocab: int) -> Tokens:
    """A few random tokens: two contexts, continuations of several lengths."""
    draw = torch.Generator().manual_seed(0)
    one = [torch.randint(vocab, (length,), generator=draw) for length in (5, 3, 4, 1, 3, 4, 2)]
    return Tokens(contexts=tuple(one[:2]), continuations=tuple(one[2:]), context_of=(0, 0, 1, 0, 1))
