"""Gradio below /admin: loaded when an administrator first asks for it, so that judging starts at once and costs no more."""

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from mmalign.apps.security import ADMIN, App, Receive, Scope, Send

if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)


class AdminPages:
    """ASGI application of the admin pages; every request, of assets and of uploads too, must be an administrator's.

    Args:
        build: makes the Blocks; runs in a thread, once.
        administrator: the name of the administrator who sends a request, or None.
        max_file_size: of an upload, in bytes.
    """

    def __init__(
        self, build: "Callable[[], gradio.Blocks]", administrator: Callable[[Request], str | None], *, max_file_size: int
    ) -> None:
        """Nothing is loaded yet."""
        self._build = build
        self._administrator = administrator
        self._max_file_size = max_file_size
        self._app: App | None = None
        self._starting = asyncio.Lock()
        self._stop = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        self._scratch: Path | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request below /admin."""
        request = Request(scope)
        if await run_in_threadpool(self._administrator, request) is None:
            await _turned_away(request)(scope, receive, send)
            return
        app = await self._ready()
        await app(scope, receive, send)

    async def stop(self) -> None:
        """End Gradio's own life, if it ever began."""
        self._stop.set()
        if self._life is not None:
            await self._life
        if self._scratch is not None:
            await run_in_threadpool(shutil.rmtree, self._scratch, ignore_errors=True)

    async def _ready(self) -> App:
        async with self._starting:
            if self._app is None:
                inner = await run_in_threadpool(self._mounted)
                began: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._life = asyncio.create_task(self._live(inner, began))
                await began
                self._app = inner
        return self._app

    async def _live(self, inner: "App", began: "asyncio.Future[None]") -> None:
        """Hold the lifespan in one task: what it opens must be closed where it was opened."""
        try:
            async with inner.router.lifespan_context(inner):  # type: ignore[attr-defined]
                began.set_result(None)
                await self._stop.wait()
        except Exception as fault:
            if began.done():
                raise
            began.set_exception(fault)

    def _mounted(self) -> App:
        self._scratch = prepare_gradio()
        import gradio
        from fastapi import FastAPI

        inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        gradio.mount_gradio_app(
            inner,
            self._build(),
            path=ADMIN,
            run_history=False,
            footer_links=[],
            auth_dependency=self._administrator,
            allowed_paths=[],
            show_error=True,
            max_file_size=self._max_file_size,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            theme=gradio.themes.Default(
                primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
        )
        return inner


def prepare_gradio() -> Path | None:
    """Set, before Gradio is imported, that it phones nobody and that its files are this process's own; return their folder.

    None where the environment names a folder: it is kept.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if "GRADIO_TEMP_DIR" in os.environ:
        return None
    scratch = Path(tempfile.mkdtemp(prefix="mmalign-annotate-"))
    os.environ["GRADIO_TEMP_DIR"] = str(scratch)
    return scratch


def _turned_away(request: Request) -> Response:
    if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
        return RedirectResponse(f"/login?next={quote(request.url.path)}", status_code=303)
    return JSONResponse({"detail": "sign in as an administrator"}, status_code=401)
