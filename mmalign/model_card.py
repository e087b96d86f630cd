"""The README.md of a trained model: where it comes from, how it was tuned, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

TASKS = {"diffusers": "text-to-image", "transformers": "text-generation"}  # the hub's names, by library


def write_card(
    folder: Path,
    *,
    base_model: str,
    config: Mapping[str, Any],
    data: str,
    plan: str,
    loading: str,
    lora: bool,
    library: str = "diffusers",
    reward: bool = False,
) -> None:
    """Write `README.md` with the hub's metadata block.

    Args:
        base_model: hub id or path of the model that was tuned.
        config: the resolved config.
        data: summary of the examples.
        plan: the arithmetic of the run.
        loading: stock code that loads the result.
        lora: whether the result is low-rank weights.
        library: whose code loads it: diffusers or transformers.
        reward: whether it is a reward model: of texts, or for the noisy states of a base model of images.
    """
    losses = " + ".join(f"{one.get('weight', 1.0):g} * {one['name']}" for one in config["loss"])
    header = yaml.safe_dump(
        {
            "base_model": base_model,
            "library_name": "mmalign"
            if reward and library == "diffusers"
            else "peft"
            if lora and library == "transformers"
            else library,
            **({} if reward else {"pipeline_tag": TASKS[library]}),
            "tags": [
                "mmalign",
                "reward-model" if reward else "preference-optimization",
                *(["lora"] if lora else []),
                *[one["name"] for one in config["loss"]],
            ],
        },
        sort_keys=False,
    )
    tuned = f"{'Low-rank weights (LoRA)' if lora else 'A full fine-tune'} of `{base_model}`, aligned with human preferences"
    judged = "A reward model of texts on" if library == "transformers" else "A reward model for the sampling steps of"
    what = f"{judged} `{base_model}`, trained on human preferences" if reward else tuned
    text = f"""---
{header}---

# {folder.resolve().name}

{what} by mmalign.

- Loss: {losses}
- Data: `{config["data"]["importer"].get("path", config["data"]["importer"]["name"])}`; {data}
- Seed: {config["seed"]}

The weights carry the licence of the base model, and the data its own: look both up before you share them.

## Use

```python
import {library}

{loading}
```

## Run

```
{plan}
```

The whole config is in `config.yaml`, package versions in `environment.json`, metrics in `metrics.jsonl`.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
