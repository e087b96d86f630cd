"""Moving weights between precisions and devices as loading would have put them."""

import torch
from torch import nn


def cast(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Move a module in place, keeping in float32 what its class keeps so in float16: T5's `wo`, whose products overflow.

    `from_pretrained` keeps it too; `.to(torch.float16)` does not.
    """
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    for name, part in module.named_modules():
        wanted = torch.float32 if kept & set(name.split(".")) else dtype
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            tensor.data = tensor.data.to(device, wanted if tensor.is_floating_point() else tensor.dtype)
