"""An output folder that a verb fills in several runs: it holds the settings that made what is there, and takes no others."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mmalign.config import differences, write_resolved
from mmalign.errors import UserError
from mmalign.records.stamps import replace_file


def check_claim(state: Path, settings: dict[str, Any], made: str) -> None:
    """Refuse a folder of other files, or one made with other settings.

    Args:
        state: the file in the output folder that holds the settings.
        settings: everything that what is made depends on, as JSON values.
        made: what it is, for messages: images, answers.
    Raises:
        UserError: such a folder, or a file of settings that is damaged.
    """
    output = state.parent
    if state.is_file():
        try:
            changed = differences(json.loads(state.read_text(encoding="utf-8")), settings)
        except ValueError as fault:
            raise UserError(
                f"{state}: got no valid JSON ({fault}), want the settings that made the {made}. Name another output folder."
            ) from fault
        if changed:
            raise UserError(
                f"{output}: was made with other settings: {'; '.join(changed)}. "
                "Go on with the same ones, or name another output folder."
            )
    elif output.exists() and (not output.is_dir() or any(not path.name.startswith(".") for path in output.iterdir())):
        raise UserError(f"{output}: exists and holds no {state.name}, want a new folder. Name another output.")


def claim(state: Path, settings: dict[str, Any], config: Any) -> None:
    """Write the settings before anything is made, so that nothing can stand beside settings that did not make it.

    Args:
        state, settings: see `check_claim`.
        config: the verb's, whose resolved form is written beside them.
    """
    state.parent.mkdir(parents=True, exist_ok=True)
    replace_file(state, (json.dumps(settings, indent=2) + "\n").encode())
    write_resolved(config, state.parent)


def digest_of(value: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of a JSON value."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
