"""Accounts: people, roles and passwords; sessions that outlive restarts and end; sign-ins that get slower as they fail."""

import base64
import functools
import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from mmalign.annotation.database import Database
from mmalign.annotation.events import log
from mmalign.annotation.schema import ANNOTATOR, SESSION, THROTTLE
from mmalign.errors import UserError

Role = Literal["annotator", "reviewer", "admin"]
ROLES = ("annotator", "reviewer", "admin")  # each may do what those before it may
SHORTEST_PASSWORD = 10
LONGEST_PASSWORD = 1024
LONGEST_NAME = 100
SCRYPT = {"n": 2**15, "r": 8, "p": 3}
SCRYPT_MEMORY = 64 * 2**20
FREE_FAILURES = {"pair": 5, "name": 20, "address": 20}  # of a name from one address, of a name, of an address
LONGEST_WAIT_S = 900.0
FORGET_S = 3600.0
SEEN_EVERY_S = 60.0
VISITOR = (  # every request asks for it
    select(SESSION.c.token, SESSION.c.seen_at, ANNOTATOR.c.id, ANNOTATOR.c.name, ANNOTATOR.c.role, ANNOTATOR.c.active)
    .join(ANNOTATOR, SESSION.c.annotator == ANNOTATOR.c.id)
    .where(SESSION.c.token == bindparam("digest"), SESSION.c.expires_at > bindparam("now"))
)


@dataclass(frozen=True, kw_only=True)
class Account:
    """A person. `id` is what the store calls an annotator."""

    id: int
    name: str
    role: Role
    active: bool = True

    def may(self, role: Role) -> bool:
        """Return whether the account may do what a role may."""
        return self.active and ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True, kw_only=True)
class SignIn:
    """The answer to a name and a password.

    Args:
        status: ok, wrong (name or password, it is not told which), wait (too many failures).
        wait_s: seconds until the next try is looked at.
        token: what the browser keeps; only its hash is stored. Never log it.
    """

    status: Literal["ok", "wrong", "wait"]
    wait_s: float = 0.0
    account: Account | None = None
    token: str = ""

    def __repr__(self) -> str:
        """Tell everything but the token."""
        return f"SignIn(status={self.status!r}, wait_s={self.wait_s:.0f}, account={self.account!r})"


def hash_password(password: str) -> str:
    """Return `scrypt$n$r$p$salt$hash`, salt and hash in base64.

    Source: RFC 7914; n = 2^15, r = 8, p = 1 (32 MiB).
    """
    salt = os.urandom(16)
    key = _scrypt(password, salt, **SCRYPT)
    return "$".join(["scrypt", *map(str, SCRYPT.values()), *(base64.b64encode(part).decode() for part in (salt, key))])


def fits(password: str, hashed: str) -> bool:
    """Return whether a password has that hash."""
    _, n, r, p, salt, key = hashed.split("$")
    found = _scrypt(password, base64.b64decode(salt), n=int(n), r=int(r), p=int(p))
    return hmac.compare_digest(found, base64.b64decode(key))


def _scrypt(password: str, salt: bytes, *, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, n=n, r=r, p=p, maxmem=SCRYPT_MEMORY, dklen=32)


@functools.cache
def _nobody() -> str:
    """Return the hash of a password that nobody has, so that an unknown name takes as long as a known one."""
    return hash_password(secrets.token_hex())


def add(connection: Connection, name: str, password: str | None, role: Role, now: float) -> Account:
    """Add a person.

    Args:
        password: None: nobody can sign in with one (a session on one's own machine).

    Raises:
        UserError: the name is taken or none, the password is too short, no such role.
    """
    name = name.strip()
    if not name or len(name) > LONGEST_NAME or any(not c.isprintable() for c in name):
        raise UserError(f"account: got the name {name[:LONGEST_NAME]!r}, want 1 to {LONGEST_NAME} visible characters.")
    if role not in ROLES:
        raise UserError(f"account {name}: got the role {role!r}, want one of {', '.join(ROLES)}.")
    if connection.execute(select(ANNOTATOR.c.id).where(ANNOTATOR.c.folded == name.casefold())).first():
        raise UserError(f"account {name}: the name is taken. Choose another.")
    hashed = None if password is None else _checked(name, password)
    values = {"name": name, "folded": name.casefold(), "role": role, "password": hashed, "active": True, "created_at": now}
    id = connection.execute(insert(ANNOTATOR).values(**values).returning(ANNOTATOR.c.id)).scalar_one()
    log(connection, now, "account", annotator=id, of="added", role=role)
    return Account(id=id, name=name, role=role)


def _checked(name: str, password: str) -> str:
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise UserError(f"account {name}: want a password of at least {SHORTEST_PASSWORD} characters. Choose a longer one.")
    if password.casefold() == name.casefold():
        raise UserError(f"account {name}: the password is the name. Choose another.")
    return hash_password(password)


def change(
    connection: Connection, account: int, now: float, *, password: str | None, role: Role | None, active: bool | None
) -> Account:
    """Change a person's password, role, or whether the account is open; a new password and a closed account end all sessions.

    Raises:
        UserError: no such account, or what `add` refuses.
    """
    before = by_id(connection, account)
    if before is None:
        raise UserError(f"account {account}: there is none. Check the number.")
    changes: dict[str, Any] = {}
    if password is not None:
        changes["password"] = _checked(before.name, password)
    if role is not None:
        if role not in ROLES:
            raise UserError(f"account {before.name}: got the role {role!r}, want one of {', '.join(ROLES)}.")
        changes["role"] = role
    if active is not None:
        changes["active"] = active
    if changes:
        connection.execute(update(ANNOTATOR).where(ANNOTATOR.c.id == account).values(**changes))
        told = {name: value for name, value in changes.items() if name != "password"}
        log(connection, now, "account", annotator=account, of="changed", password_changed=password is not None, **told)
    if password is not None or active is False:
        connection.execute(delete(SESSION).where(SESSION.c.annotator == account))
    after = by_id(connection, account)
    assert after is not None
    return after


def by_id(connection: Connection, account: int) -> Account | None:
    """Return an account by its number."""
    return _account(connection.execute(select(ANNOTATOR).where(ANNOTATOR.c.id == account)).first())


def by_name(connection: Connection, name: str) -> Account | None:
    """Return an account by its name; capitals do not count."""
    return _account(connection.execute(select(ANNOTATOR).where(ANNOTATOR.c.folded == name.strip().casefold())).first())


def everybody(connection: Connection) -> list[Account]:
    """Return all accounts by name."""
    rows = connection.execute(select(ANNOTATOR).order_by(ANNOTATOR.c.folded)).all()
    return [found for row in rows if (found := _account(row))]


def _account(row: Any) -> Account | None:
    return None if row is None else Account(id=row.id, name=row.name, role=row.role, active=row.active)


def sign_in(database: Database, name: str, password: str, address: str, now: float, session_s: float) -> SignIn:
    """Check a password and open a session.

    A try counts as failed before it is looked at, so that many at once do not get through; the slow hash runs outside the lock.
    """
    folded = name.strip().casefold() if name.isprintable() else ""
    subjects = {"pair": f"pair {address} {folded}", "name": f"name {folded}", "address": f"address {address}"}
    with database.write() as connection:
        wait = max(_wait(connection, kind, subject, now) for kind, subject in subjects.items())
        if wait > 0:
            log(connection, now, "sign_in", of="wait")
            return SignIn(status="wait", wait_s=wait)
        for subject in subjects.values():
            _note_failure(connection, subject, now)
        row = connection.execute(select(ANNOTATOR).where(ANNOTATOR.c.folded == folded)).first()
    hashed = None if row is None or not row.active else row.password
    right = fits(password[:LONGEST_PASSWORD], hashed or _nobody()) and hashed is not None and len(password) <= LONGEST_PASSWORD
    with database.write() as connection:
        account = None if row is None else by_id(connection, row.id)
        if not right or account is None or not account.active:
            log(connection, now, "sign_in", annotator=None if row is None else row.id, of="wrong")
            return SignIn(status="wrong")
        _forgive(connection, subjects)
        token = open_session(connection, account.id, now, session_s)
        log(connection, now, "sign_in", annotator=account.id, of="ok")
        return SignIn(status="ok", account=account, token=token)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _wait(connection: Connection, kind: str, subject: str, now: float) -> float:
    """Return the seconds that a subject has to wait: 1, 2, 4 ... after the failures that are free."""
    row = connection.execute(select(THROTTLE).where(THROTTLE.c.subject == _digest(subject))).first()
    if row is None or now - row.last_at > FORGET_S or row.failures < FREE_FAILURES[kind]:
        return 0.0
    wait: float = min(2.0 ** min(row.failures - FREE_FAILURES[kind], 30), LONGEST_WAIT_S)
    return min(wait, max(0.0, float(row.last_at) + wait - now))  # not longer where the clock was set back


def _note_failure(connection: Connection, subject: str, now: float) -> None:
    digest = _digest(subject)
    row = connection.execute(select(THROTTLE).where(THROTTLE.c.subject == digest)).first()
    if row is None:
        connection.execute(insert(THROTTLE).values(subject=digest, failures=1, last_at=now))
        return
    failures = 1 if now - row.last_at > FORGET_S else row.failures + 1
    connection.execute(update(THROTTLE).where(THROTTLE.c.subject == digest).values(failures=failures, last_at=now))


def _forgive(connection: Connection, subjects: Mapping[str, str]) -> None:
    """Forget a name's failures after a right password; of its address only this try, or one account would free it to guess."""
    named = [_digest(subjects[kind]) for kind in ("pair", "name")]
    connection.execute(delete(THROTTLE).where(THROTTLE.c.subject.in_(named)))
    of_address = THROTTLE.c.subject == _digest(subjects["address"])
    connection.execute(update(THROTTLE).where(of_address).values(failures=THROTTLE.c.failures - 1))


def open_session(connection: Connection, account: int, now: float, session_s: float) -> str:
    """Open a session and return its token; sessions that have ended are cleared away."""
    connection.execute(delete(SESSION).where(SESSION.c.expires_at <= now))
    token = secrets.token_urlsafe(32)
    values = {"token": _digest(token), "annotator": account, "created_at": now, "seen_at": now, "expires_at": now + session_s}
    connection.execute(insert(SESSION).values(**values))
    return token


def session(database: Database, token: str, now: float) -> Account | None:
    """Return whose session a token is; None when it has ended, or never was, or the account is closed."""
    with database.read() as connection:
        row = connection.execute(VISITOR, {"digest": _digest(token), "now": now}).first()
    account = _account(row)
    if row is None or account is None or not account.active:
        return None
    if now - row.seen_at > SEEN_EVERY_S:
        with database.write() as connection:
            connection.execute(update(SESSION).where(SESSION.c.token == row.token).values(seen_at=now))
    return account


def close_session(connection: Connection, token: str) -> None:
    """End a session."""
    connection.execute(delete(SESSION).where(SESSION.c.token == _digest(token)))
