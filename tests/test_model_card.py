"""The card of a run: what it says is true where it stands, and its code runs there."""

import re
from pathlib import Path
from typing import Any

import pytest
from text_runs import train_text


@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_the_code_of_a_card_runs_in_its_folder_wherever_that_is_moved(
    lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = train_text(tmp_path / "run", adapter={"lora": lora}, training={"steps": 1}).rename(tmp_path / "elsewhere")
    card = (moved / "README.md").read_text()
    code = re.search(r"## Use.*?```python\n(.*?)```", card, re.DOTALL)
    assert code is not None and str(tmp_path) not in code[1]
    monkeypatch.chdir(moved)
    names: dict[str, Any] = {}
    exec(code[1], names)
    ids = names["tokenizer"]("red", return_tensors="pt").input_ids
    assert names["model"](ids).logits.shape[:2] == ids.shape
