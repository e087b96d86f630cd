"""What a run writes about itself beside its preferences: memory, and a file of metrics that can be gone back in."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def peak_memory() -> float:
    """Peak memory of this process in GB (2^30 bytes): of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def forget_after(path: Path, step: int) -> None:
    """Drop from a JSONL file the metrics of steps that will be taken again, and a line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            logger.info("%s: dropped a line cut short", path)
    part = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)
