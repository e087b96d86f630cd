"""Open, tune and save language models with transformers and peft."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmalign.checkpoints import move_into_place
from mmalign.errors import UserError
from mmalign.language.tiny import TINY, tiny_folder, tiny_tokenizer

logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # whose kernels read two layers' weights past a LoRA
Quantization = Literal["4bit", "8bit"]


def open_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False, **more: Any) -> Any:
    """A tokenizer of transformers, with a padding token.

    Raises:
        UserError: no tokenizer there.
    """
    if name == TINY:
        return tiny_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code, **more)
    except (OSError, ValueError) as fault:
        raise UserError(f"adapter.tokenizer: cannot open {name} ({_first_line(fault)}). Name a folder or a hub id.") from fault
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    tiny: Mapping[str, Any] | None = None,
    sees: bool = False,
    **more: Any,
) -> Any:
    """A causal language model of transformers, without dropout, in evaluation mode.

    Args:
        name: a folder, a hub id, or `tiny`.
        revision: of the hub's repository.
        dtype: of the weights.
        attention: the implementation, as transformers names it. None: the model's own choice.
        quantization: frozen weights in 4 bits (NF4, double quantisation) or 8 bits by bitsandbytes.
        device: where it runs.
        trust_remote_code: run code that comes with the model.
        tiny: changes of the config of a tiny model.
        sees: a model of images and texts is wanted.
        more: further arguments of `from_pretrained`, such as `gguf_file`, whose weights are unpacked.
    Raises:
        UserError: no model there, one of another kind, or quantisation without a GPU or bitsandbytes.
    """
    if name == TINY:
        name = str(tiny_folder(tiny))
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    opener, kind = (
        (AutoModelForImageTextToText, "model of images and texts") if sees else (AutoModelForCausalLM, "causal language model")
    )
    if (Path(name) / ADAPTER_FILES[0]).is_file():
        raise UserError(
            f"adapter.model: {name} is a LoRA, want a whole model. Merge it into its base (peft's merge_and_unload) and name "
            "the merged folder."
        )
    if quantization is not None:
        _check_quantization(quantization)
        more["quantization_config"] = quantization_config(quantization, dtype)
        more["device_map"] = {"": device}
    if attention is not None:
        more["attn_implementation"] = attention
    known = {"revision": revision, "trust_remote_code": trust_remote_code}
    read = {name: value for name, value in more.items() if name == "gguf_file"}
    if read:
        more["quantization_config"] = _unpacking()
    try:
        config = without_dropout(AutoConfig.from_pretrained(name, **known, **read))
        model = opener.from_pretrained(name, config=config, dtype=dtype, **known, **more)
        model = _plain(model, attention) if read else model
    except (OSError, ValueError, ImportError) as fault:
        raise UserError(
            f"adapter.model: cannot open {name} as a {kind} ({_first_line(fault)}). Name a folder or a hub id."
        ) from fault
    return (model if quantization is not None else model.to(device)).eval()


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer of another model, and tell of a mixture of experts that its router's auxiliary loss is not added.

    TRL 1.16 adds that loss, times the config's `router_aux_loss_coef`, to any preference loss, whatever the config says of
    `output_router_logits`. It is about how evenly the experts are used, not about preferences.

    Raises:
        UserError: it has more tokens than the model.
    """
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"adapter.tokenizer: got one of {tokenizer.vocab_size} tokens for a model of {rows}. Name the model's own one."
        )
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if coefficient and hasattr(config, "output_router_logits"):
        logger.warning(
            "a mixture of experts: the auxiliary loss that balances its experts (router_aux_loss_coef %g) is not added, unlike "
            "in TRL; only the losses of the config train it. With a full fine-tune watch that experts are used, or set lora.",
            coefficient,
        )


def learned_positions(model: Any) -> int | None:
    """How many positions a model has learnt; None where they are computed, and reach further."""
    config = model.config.get_text_config()
    count = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    return count if count and any(0 <= m.num_embeddings - count <= 2 for m in tables) else None


def without_dropout(config: Any) -> Any:
    """The config of a model with every dropout at 0: masks would differ between policy and reference."""
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_diff_dict"))):
        for key, value in vars(part).items():
            if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float) and value > 0:
                setattr(part, key, 0.0)
    return config


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    task: str = "CAUSAL_LM",
    whole: Sequence[str] = (),
) -> None:
    """Freeze the model and put trainable low-rank weights beside its layers: W x + (alpha / rank) B A x.

    A is Kaiming uniform and B zero, PEFT's default, so that the policy starts as the reference; both are float32.
    Source: Hu et al., arXiv 2106.09685, eq. 3.
    Args:
        rank: published 4 to 64.
        alpha: None: the rank.
        targets: names of layers, matched at the end of the module path. None: every linear layer but the output layer.
        dropout: on the input of A; keep 0 for preference training.
        seed: of A; the global generator is left as it was.
        task: PEFT's name for what the model does.
        whole: names of layers that are trained as they are, and saved beside the low-rank weights: a new head.
    Raises:
        UserError: a rank below 1, or a target that no layer bears or that peft refuses.
    """
    from peft import LoraConfig

    if rank < 1:
        raise UserError(f"adapter.lora.rank: got {rank}, want 1 or more.")
    _check_targets(model, targets)
    mamba = getattr(model.config, "model_type", None) in MAMBAS
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules="all-linear" if targets is None else list(targets),
        exclude_modules=["out_proj", "conv1d"] if mamba and targets is None else None,
        lora_dropout=dropout,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's transposed layers
        task_type=task,
        modules_to_save=list(whole) or None,
    )
    model.requires_grad_(False)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        _prepare_quantised(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # transformers names ranks for experts, which "all-linear" does not target.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        torch.manual_seed(seed)
        try:
            model.add_adapter(config, adapter_name=ADAPTER_NAME)
        except ValueError as fault:
            raise UserError(f"adapter.lora.targets: {_first_line(fault)}") from fault
    take_up_lora(model)


def take_up_lora(model: Any) -> None:
    """Train the low-rank weights and layers that are trained whole, in float32, and nothing else."""
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or "modules_to_save" in name
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()


def lora_layers(model: nn.Module) -> list[Any]:
    """Layers with low-rank weights; found once, because the search walks the whole model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def lora_off(layers: Sequence[Any]) -> Iterator[None]:
    """The reference: inside the block these layers run without their low-rank weights.

    Raises:
        ValueError: there are none, so that the policy would pass for its own reference.
    """
    if not layers:
        raise ValueError("lora_off: the model has no LoRA. For full fine-tuning use a frozen copy as the reference.")
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def load_weights(model: Any, folder: Path) -> None:
    """Go on from what a run left: its LoRA, or its full model.

    Raises:
        UserError: neither is there, or it does not fit.
    """
    from safetensors.torch import load_file

    if (folder / ADAPTER_FILES[0]).is_file():
        model.requires_grad_(False)
        try:
            model.load_adapter(str(folder), adapter_name=ADAPTER_NAME, is_trainable=True)
        except (RuntimeError, ValueError) as fault:
            raise UserError(f"{folder}: its LoRA does not fit the model ({_first_line(fault)}).") from fault
        take_up_lora(model)
        return
    files = sorted((folder / "model").glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: got neither a LoRA nor a folder `model`, want the output of a run.")
    weights = {name: value for file in files for name, value in load_file(file).items()}
    missing = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if missing.unexpected_keys or set(missing.missing_keys) - tied:
        raise UserError(f"{folder}: its weights do not fit the model ({(missing.unexpected_keys or missing.missing_keys)[0]}).")
    model.requires_grad_(True)


def frozen_copy(model: Any, dtype: torch.dtype) -> Any:
    """The reference for full fine-tuning: a copy that takes no gradient."""
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    return twin.to(dtype)


def from_anywhere(model: str) -> str:
    """A folder by its whole path, so that a reader finds it from any other; a hub id as it is."""
    place = Path(model).expanduser()
    return str(place.absolute()) if place.is_dir() else model


def save_lora(model: Any, folder: Path, base: str, revision: str | None = None) -> Path:
    """Write a PEFT adapter, which `AutoModelForCausalLM.from_pretrained` and `PeftModel.from_pretrained` read.

    Written beside, brought to disk and renamed.
    Args:
        base: where its base is found from any folder: see `from_anywhere`.
        revision: of the base, on the hub.
    Returns: the path of the weights.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Beside a GGUF file there is none, and no vocabulary is modified here.
        warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
        weights = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
    weights = {f"base_model.model.{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    config = copy.copy(model.peft_config[ADAPTER_NAME])
    config.inference_mode = True
    config.base_model_name_or_path = base
    config.revision = revision
    with _scratch(folder / ADAPTER_FILES[-1]) as scratch:
        config.save_pretrained(str(scratch))
        save_file(weights, scratch / ADAPTER_FILES[-1], metadata={"format": "pt"})
        for name in ADAPTER_FILES:
            (scratch / name).chmod(0o666 & ~_umask())
            move_into_place(scratch / name, folder / name)
    return folder / ADAPTER_FILES[-1]


def save_full(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write model and tokenizer as a folder for `from_pretrained`. Written beside, brought to disk and renamed.

    Raises:
        UserError: the folder holds something that is no model.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: got a folder with other files, want an empty or absent one. Name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        move_into_place(scratch, folder)
    return folder


def _prepare_quantised(model: Any) -> None:
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _check_quantization(quantization: Quantization) -> None:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise UserError(
            f"adapter.quantization: got {quantization}, which needs a GPU and the package bitsandbytes. Install it, or set "
            "quantization to null."
        )


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """What transformers is told to pack weights into 8 bits, or into 4 as QLoRA does: NF4 with double quantisation.

    Source: Dettmers et al. 2023 (QLoRA).
    Args:
        quantization: which.
        dtype: that the products are taken in, of 4 bits.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _unpacking() -> Any:
    """How weights of GGUF are read: as plain ones, which can be trained; older transformers know no other way."""
    import transformers

    known = getattr(transformers, "GgufConfig", None)
    return None if known is None else known(dequantize=True)


def _plain(read: Any, attention: str | None) -> Any:
    """A model like one that transformers read from GGUF, with its weights: that one itself cannot be saved."""
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    more = {} if attention is None else {"attn_implementation": attention}
    model = type(read).from_pretrained(None, config=config, state_dict=read.state_dict(), dtype=read.dtype, **more)
    model.generation_config = read.generation_config
    return model


def _check_targets(model: nn.Module, targets: Sequence[str] | None) -> None:
    if targets is None:
        return
    if not targets:
        raise UserError("adapter.lora.targets: got an empty list, want at least one layer name.")
    names = [name for name, module in model.named_modules() if not list(module.children())]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            near = difflib.get_close_matches(target, known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known[:12])}."
            raise UserError(f"adapter.lora.targets: got {target!r}, which ends no layer's name. {remedy}")


@contextlib.contextmanager
def _scratch(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, removed at the end; after a kill `checkpoints.remove_leftovers` knows it by its name."""
    folder = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
