"""Gradio below /admin: loaded once somebody who may see it has come, in the background, so that judging starts at once."""

import asyncio
import contextlib
import importlib
import logging
import os
import shutil
import tempfile
import threading
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

NEEDED = ("gradio", "krippendorff", "scipy.stats", "sklearn.metrics", "choix", "openskill.models")  # by the first look
UPLOAD = "/upload"
Named = Callable[[Request], str | None]
FIRST_PAIR_S = 2.0  # in which the judging page has the processor to itself


class AdminPages:
    """ASGI application of the admin pages; every request, of assets and of uploads too, must be an administrator's.

    Args:
        build: makes the Blocks; runs in a thread, once.
        administrator: the name of who sends a request, if they may see the pages, or None.
        uploader: the same, if they may upload.
        max_file_size: of an upload, in bytes.
    """

    def __init__(
        self, build: "Callable[[], gradio.Blocks]", administrator: Named, uploader: Named, *, max_file_size: int
    ) -> None:
        """Nothing is loaded yet."""
        self._build = build
        self._administrator = administrator
        self._uploader = uploader
        self._max_file_size = max_file_size
        self._app: App | None = None
        self._starting = asyncio.Lock()
        self._stop = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        self._scratch: Path | None = None
        self._loader: threading.Thread | None = None
        self._hurry = threading.Event()

    def warm(self) -> None:
        """Begin to load what the pages need, once, in a thread that holds up nobody's exit; to be called in the event loop."""
        if self._loader is None and self._app is None:
            self._scratch = prepare_gradio()
            self._loader = threading.Thread(target=self._load, name="loading the dashboard", daemon=True)
            self._loader.start()

    def _load(self) -> None:
        self._hurry.wait(FIRST_PAIR_S)
        for name in NEEDED:
            with contextlib.suppress(ImportError):  # who uses it says so
                importlib.import_module(name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request below /admin."""
        request = Request(scope)
        if await run_in_threadpool(self._administrator, request) is None:
            await _turned_away(request)(scope, receive, send)
            return
        if request.url.path.endswith(UPLOAD) and await run_in_threadpool(self._uploader, request) is None:
            await JSONResponse({"detail": "administrators only"}, status_code=403)(scope, receive, send)
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
                self.warm()
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
        self._hurry.set()
        if self._loader is not None:
            self._loader.join()
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
