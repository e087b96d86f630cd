"""Files by address: media by opaque key, the pages, their scripts and styles, plots and exports."""

import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

from fastapi import APIRouter, HTTPException
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from mmalign.annotation.media import MediaFile
from mmalign.apps.archives import file_name, packed
from mmalign.apps.sign_in import Administers, Door, Number, Reads, Reviews, TheDoor, TheStore
from mmalign.errors import UserError

FILES = APIRouter()
STATIC = Path(__file__).parent / "static"
RANGE = re.compile(r"bytes ?= ?([0-9]{0,18})-([0-9]{0,18})")
FOR_EVER = "private, max-age=31536000, immutable"
SHOWN_MIMES = ("image/png", "image/jpeg", "image/webp", "image/gif", "video/mp4", "video/webm")


@FILES.get("/media/{key}")
def media(key: str, request: Request, known: Reads, store: TheStore) -> Response:
    """Send the bytes of an image or video to who is signed in, to be kept for ever: a key's bytes never change."""
    try:
        found = store.media(key)
    except UserError as error:
        raise HTTPException(410, "the picture is gone or was changed; tell who runs the project") from error
    if found is None or found.mime not in SHOWN_MIMES:
        raise HTTPException(404, "no such picture")
    return _media_reply(found, request)


def _media_reply(found: MediaFile, request: Request) -> Response:
    headers = {"etag": f'"{found.etag}"', "cache-control": FOR_EVER, "accept-ranges": "bytes", "content-disposition": "inline"}
    if f'"{found.etag}"' in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    span = _span(request.headers.get("range", ""), len(found.data))
    if span is None:
        return Response(found.data, media_type=found.mime, headers=headers)
    start, end = span
    if start >= end:
        return Response(status_code=416, headers={**headers, "content-range": f"bytes */{len(found.data)}"})
    headers["content-range"] = f"bytes {start}-{end - 1}/{len(found.data)}"
    return Response(found.data[start:end], status_code=206, media_type=found.mime, headers=headers)


def _span(wanted: str, size: int) -> tuple[int, int] | None:
    """Return the one range that a header asks for, end excluded; None: all of it. Browsers seek in videos so."""
    found = RANGE.fullmatch(wanted)
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def _page(name: str, request: Request, door: Door) -> Response:
    """Send a page; it holds no data, its scripts fetch them."""
    response = FileResponse(STATIC / name, media_type="text/html; charset=utf-8", headers={"cache-control": "no-cache"})
    if door.welcome(request, response) is None and name != "login.html":
        return RedirectResponse(f"/login?next={quote(request.url.path)}", status_code=303)
    return response


@FILES.get("/")
def home(request: Request, door: TheDoor) -> Response:
    """Send the list of projects."""
    return _page("projects.html", request, door)


@FILES.get("/login")
def login(request: Request, door: TheDoor) -> Response:
    """Send the page on which one signs in."""
    return _page("login.html", request, door)


@FILES.get("/judge/{project}")
def judge(project: Number, request: Request, door: TheDoor) -> Response:
    """Send the page on which one judges."""
    return _page("judge.html", request, door)


@FILES.get("/favicon.ico")
def icon() -> Response:
    """Send the icon."""
    return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")


@FILES.get("/health")
def health(store: TheStore) -> dict[str, str]:
    """Say that server and store answer."""
    store.account("")
    return {"status": "ok"}


class Assets(StaticFiles):
    """Scripts and styles of the pages, looked at anew after an upgrade; no link is followed, no folder listed."""

    def __init__(self) -> None:
        """Serve the folder beside this file."""
        super().__init__(directory=STATIC, html=False, follow_symlink=False)

    def file_response(self, *args: object, **kwargs: object) -> Response:
        """Serve a file with an order to ask whether it is still the same."""
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers["cache-control"] = "no-cache"
        return response


@FILES.get("/api/backup")
def backup(known: Administers, store: TheStore) -> Response:
    """Send a copy of the whole store, an SQLite file, while it is used."""
    work = Path(tempfile.mkdtemp(prefix="mmalign-backup-"))
    try:
        store.backup(work / "judgements.db")
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    cleaning = BackgroundTask(shutil.rmtree, work, ignore_errors=True)
    return FileResponse(work / "judgements.db", filename="judgements-backup.db", background=cleaning)


@FILES.get("/api/projects/{project}/export")
def export(
    project: Number,
    known: Reviews,
    store: TheStore,
    format: str = "trl",
    container: str | None = None,
    min_votes: int = 1,
    min_agreement: float = 0.0,
    names: bool = False,
) -> Response:
    """Send the judgements of a project as a zipped folder, with its card."""
    from mmalign.annotation.export import Settings
    from mmalign.annotation.export import export as write_export

    name = file_name(f"{store.project(project).name}-{format}")
    work = Path(tempfile.mkdtemp(prefix="mmalign-export-"))
    try:
        settings = Settings(
            format=format, container=container or None, min_votes=min_votes, min_agreement=min_agreement, names=names
        )
        done = write_export(store, project, work / name, settings)
        archive = packed(done.folder)
    except UserError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise HTTPException(409, str(error)) from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    cleaning = BackgroundTask(shutil.rmtree, work, ignore_errors=True)
    return FileResponse(archive, filename=archive.name, media_type="application/zip", background=cleaning)
