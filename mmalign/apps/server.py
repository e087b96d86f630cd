"""The server of the annotation apps: judging pages and routes at the root, Gradio below /admin, one guard before both."""

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from mmalign.annotation.accounts import Account
from mmalign.annotation.store import Store
from mmalign.apps.admin_mount import AdminPages
from mmalign.apps.files import FILES, Assets
from mmalign.apps.refusals import HANDLERS
from mmalign.apps.routes import JUDGING, SESSION
from mmalign.apps.security import ADMIN, LOOPBACK, App, Guard, Limits, Receive, Scope, Send
from mmalign.apps.sign_in import OWN, Door
from mmalign.apps.summaries import SUMMARIES
from mmalign.errors import UserError

if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

UPLOADS = "mmalign-uploads"
SESSION_PATH = "/api/session"  # what every page asks first


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server is reached, and by whom.

    Args:
        host: address to listen at; other than loopback only with accounts.
        port: 0: any that is free.
        accounts: people sign in; without, everybody who reaches the server is the one person `me`, who may do all.
        names: host names that requests may call it by; empty: loopback's own, or any for servers of teams.
        https: browsers come by HTTPS, through a proxy that ends it.
        roots: folders that an administrator may import from; None: any.
        uploads: where uploaded data are kept.
        upload_mb: largest upload.
        warm: load the dashboard in the background as soon as a reviewer has come, not when they ask for it.
    """

    host: str = "127.0.0.1"
    port: int = 7870
    accounts: bool = False
    names: tuple[str, ...] = ()
    https: bool = False
    roots: tuple[Path, ...] | None = None
    uploads: Path = field(default_factory=lambda: Path(UPLOADS))
    upload_mb: int = 512
    warm: bool = False

    def limits(self) -> Limits:
        """Return what requests must pass."""
        hosts: tuple[str, ...] | None = tuple(name.lower() for name in self.names) or None
        if self.host in LOOPBACK:
            hosts = (*LOOPBACK, *(hosts or ()))
        return Limits(hosts=hosts, upload_bytes=self.upload_mb * 2**20)


def check_reach(settings: Settings) -> None:
    """Refuse to be reached by others without accounts.

    Raises:
        UserError: a host beyond loopback without accounts.
    """
    if settings.host not in LOOPBACK and not settings.accounts:
        raise UserError(
            f"host: got {settings.host!r} without accounts, want {' or '.join(LOOPBACK[:2])}: everybody who reaches the server "
            "could judge, read and export. Name --accounts FILE, or leave host away."
        )


def check(settings: Settings, store: Store) -> None:
    """As `check_reach`, and refuse to wait for an administrator who cannot come.

    Raises:
        UserError: accounts without any administrator.
    """
    check_reach(settings)
    if settings.accounts and not any(one.may("admin") for one in store.accounts() if one.name != OWN):
        raise UserError("accounts: got no administrator, want at least one account of role admin. Name --accounts FILE.")


def own_account(store: Store) -> Account:
    """Return the account of the one person of a session without accounts; nobody can sign in as it."""
    return store.account(OWN) or store.add_account(OWN, None, "admin")


def create_app(store: Store, settings: Settings) -> App:
    """Make the ASGI application.

    Raises:
        UserError: as `check`.
    """
    check(settings, store)
    own = None if settings.accounts else own_account(store)
    door = Door(store, own=own, port=settings.port, https=settings.https)

    def build() -> "gradio.Blocks":
        from mmalign.apps.admin import build_pages

        return build_pages(store, settings)

    reviewer = door.name_of("reviewer")
    admin = AdminPages(build, reviewer, door.name_of("admin"), max_file_size=settings.upload_mb * 2**20)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await admin.stop()

    api = FastAPI(title="mmalign", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    api.state.door = door
    for routes in (SESSION, JUDGING, FILES, SUMMARIES):
        api.include_router(routes)
    api.mount("/static", Assets())
    for fault, reply in HANDLERS.items():
        api.add_exception_handler(fault, reply)

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        below = scope["type"] == "http" and (scope["path"] == ADMIN or scope["path"].startswith(f"{ADMIN}/"))
        await (admin if below else api)(scope, receive, send)
        begins = settings.warm and scope["type"] == "http" and scope["path"] == SESSION_PATH
        if begins and await run_in_threadpool(reviewer, Request(scope)) is not None:
            admin.warm()

    return Guard(inner, limits=settings.limits())


def serve(app: App, settings: Settings, listener: socket.socket | None = None) -> None:
    """Run the application until it is interrupted.

    Args:
        listener: a socket that is bound already, in place of the settings' host and port.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=settings.https,
        timeout_graceful_shutdown=5,
        lifespan="on",
    )
    uvicorn.Server(config).run(sockets=None if listener is None else [listener])
