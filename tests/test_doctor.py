from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.cli import main
from mmalign.doctor import (
    UNCOUNTED,
    Device,
    DoctorConfig,
    Findings,
    check_packages,
    ram_gb,
    requirements,
    what_fits,
    what_language_models_take,
)
from mmalign.families import FAMILIES
from mmalign.memory import SIZES


def load_nothing(name: str) -> Any:
    return name


def load_with_a_fault(name: str) -> Any:
    raise OSError("libcudart.so.11: cannot open shared object file")


def test_the_lower_bounds_come_from_the_installed_metadata() -> None:
    bounds = requirements()
    assert bounds["diffusers"] == "0.42"
    assert bounds["open-clip-torch"] == "3.3"
    assert bounds["torchvision"] is None
    assert "ruff" not in bounds


def test_a_missing_package_is_reported() -> None:
    [package] = check_packages({"no-such-package-at-all": "1.0"}, optional={}, load=load_nothing)
    assert package.found is None
    assert package.fault == "not installed: pip install no-such-package-at-all"


def test_an_old_package_is_reported() -> None:
    [old] = check_packages({"pydantic": "999.1"}, optional={}, load=load_nothing)
    assert old.fault == "older than 999.1: pip install -U pydantic"
    [right] = check_packages({"pydantic": "2.9"}, optional={}, load=load_nothing)  # 2.14 is newer than 2.9
    assert right.fault is None


def test_a_broken_package_is_reported_and_not_raised() -> None:
    [package] = check_packages({"pydantic": None}, optional={}, load=load_with_a_fault)
    assert package.fault == "cannot be imported (OSError: libcudart.so.11: cannot open shared object file)"


def test_only_required_packages_make_the_doctor_unhappy() -> None:
    def findings(required: dict[str, str | None], optional: dict[str, str]) -> Findings:
        packages = tuple(check_packages(required, optional=optional, load=load_nothing))
        device = Device(kind="cpu", name="2 cores", memory_gb=None, bf16=True)
        return Findings(as_json=False, system={}, packages=packages, devices=(device,), disk=DISK, hub=HUB, fits=())

    assert findings({"pydantic": None}, {"no-such-package-at-all": "x"}).exit_code == 0
    unhappy = findings({"no-such-package-at-all": None}, {})
    assert unhappy.exit_code == 1
    assert "not installed: pip install no-such-package-at-all" in str(unhappy)
    assert "memory unknown" in str(unhappy)


DISK = {"folder": "x", "free_gb": 3.0, "writable": False}
HUB = {"cache": "y", "writable": False, "offline": True}


def test_unwritable_places_and_offline_are_told() -> None:
    device = Device(kind="cpu", name="2 cores", memory_gb=1.0, bf16=True)
    text = str(Findings(as_json=False, system={}, packages=(), devices=(device,), disk=DISK, hub=HUB, fits=()))
    assert "3.0 GB free in x, NOT WRITABLE" in text
    assert "offline (HF_HUB_OFFLINE), cache y, NOT WRITABLE: set HF_HOME" in text


def test_what_fits_grows_with_memory_and_shrinks_with_the_model() -> None:
    small, large = ({(f.family, f.training, f.checkpointing): f.pairs for f in what_fits(gb)} for gb in (24.0, 80.0))
    assert set(small) == {(f, t, c) for f in SIZES for t in ("lora 8", "full") for c in (False, True)}
    assert all(large[key] >= small[key] for key in small)
    assert small["sdxl", "lora 8", False] == 1
    assert small["sdxl", "full", True] == 0
    assert large["sdxl", "lora 8", False] == 4
    assert small["sd15", "lora 8", True] > small["sd15", "lora 8", False]


def test_every_family_is_in_the_table_or_named_beside_it() -> None:
    assert set(FAMILIES) <= {*SIZES, *UNCOUNTED} and not set(UNCOUNTED) & set(SIZES)
    device = Device(kind="cuda", name="a GPU", memory_gb=24.0, bf16=True)
    fits, language = tuple(what_fits(24.0)), tuple(what_language_models_take(24.0))
    text = str(
        Findings(as_json=False, system={}, packages=(), devices=(device,), disk=DISK, hub=HUB, fits=fits, language=language)
    )
    assert "qwen_image, qwen_image_edit, qwen_image_edit_plus, wan, z_image: not counted" in text
    assert "language models on a GPU" in text


def test_what_a_language_model_takes_is_the_arithmetic_of_its_weights() -> None:
    found = {(one.size, one.training): one for one in what_language_models_take(24.0)}
    assert found["7B", "lora 8"].fixed_gb == pytest.approx((2 * 7_615_616_512 + 18 * 8 * 2_523_136) / 2**30)
    assert found["0.5B", "full"].fixed_gb == pytest.approx(22 * 494_032_768 / 2**30)  # 4 + 4 + 8 + 2, and 4 of the copy
    assert found["0.5B", "full"].left_gb == pytest.approx(24.0 - 1.0 - found["0.5B", "full"].fixed_gb)
    assert found["7B", "full"].left_gb < 0


def test_a_container_may_allow_less_memory_than_the_machine_has(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(f"{2**29}\n")
    assert ram_gb(limit) == 0.5
    limit.write_text("max\n")
    assert ram_gb(limit) == ram_gb(tmp_path / "absent")


def test_the_doctor_prints_json_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--json", "--folder", str(tmp_path / "not/yet/there")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"system", "packages", "devices", "disk", "hub", "fits", "language"}
    assert found["devices"][-1]["kind"] == "cpu"
    assert found["disk"]["writable"] is True
    assert found["hub"]["offline"] is True
    assert {p["name"] for p in found["packages"]} >= {"torch", "diffusers", "bitsandbytes", "wandb", "tensorboard"}


def test_the_doctor_looks_at_the_working_folder_by_default() -> None:
    assert DoctorConfig() == DoctorConfig(json=False, folder=Path("."))
