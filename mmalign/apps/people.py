"""The accounts of a team: from a file that its owner alone can read, and the first administrator from the keyboard."""

import getpass
import logging
import stat
import sys
from pathlib import Path
from typing import Any

import yaml

from mmalign.annotation.accounts import ROLES
from mmalign.annotation.store import Store
from mmalign.apps.sign_in import OWN
from mmalign.errors import UserError

logger = logging.getLogger(__name__)


def add_people(store: Store, path: Path | None) -> int:
    """Add the people of a YAML file `{name: {role: admin, password: ...}}` who are not there yet, and return how many.

    Who is there stays as they are: roles and passwords are changed on the accounts page.

    Raises:
        UserError: the file cannot be read, others can read it, or it holds something else.
    """
    if path is None:
        return 0
    place = path.expanduser()
    try:
        mode = place.stat().st_mode
        entries = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"accounts: {path} cannot be read ({fault}). Write `name: {{role: ..., password: ...}}`.") from fault
    except yaml.YAMLError:  # its message would quote the file, which holds passwords
        raise UserError(f"accounts: {path} is no valid YAML. Write `name: {{role: ..., password: ...}}`.") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"accounts: {path} can be read by others, want by you alone: it holds passwords. chmod 600 {path}")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"accounts: {path}: want a mapping `name: {{role: ..., password: ...}}`. Correct the file.")
    new = {str(name): _entry(str(path), str(name), entry) for name, entry in entries.items() if not store.account(str(name))}
    for name, (role, password) in new.items():
        store.add_account(name, password, role)
    return len(new)


def _entry(path: str, name: str, entry: Any) -> tuple[Any, str]:
    role, password = (entry.get("role", "annotator"), entry.get("password")) if isinstance(entry, dict) else (None, None)
    if role not in ROLES or not isinstance(password, str):
        raise UserError(f"accounts: {path}: {name}: want a role of {', '.join(ROLES)} and a password (a text). Correct it.")
    return role, password


def ask_for_administrator(store: Store) -> None:
    """Ask for the name and password of the first administrator, where there is none and somebody sits at the keyboard."""
    if any(one.may("admin") and one.name != OWN for one in store.accounts()) or not sys.stdin.isatty():
        return
    name = input("No administrator yet. Name [admin]: ").strip() or "admin"
    password = getpass.getpass("Password (10 characters or more): ")
    if password != getpass.getpass("Once more: "):
        raise UserError("accounts: the two passwords differ. Start again.")
    store.add_account(name, password, "admin")
