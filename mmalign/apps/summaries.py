"""What the votes of a project say: reckoned once for each new vote, as pictures and as a folder of files."""

import shutil
import tempfile
import threading
from pathlib import Path

from fastapi import APIRouter, HTTPException
from sqlalchemy import func, select
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response

from mmalign.annotation.dashboard import Dashboard, save
from mmalign.annotation.schema import VOTE
from mmalign.annotation.store import Store
from mmalign.annotation.tally import dashboard_of
from mmalign.apps.archives import file_name, packed
from mmalign.apps.sign_in import Number, Reviews, TheStore

SUMMARIES = APIRouter(prefix="/api/projects")
PLOTS = {
    "choices": "Votes by choice",
    "agreement": "Agreement",
    "bias": "How often the left one, and the longer one, wins",
    "raters": "Agreement of each with the majority of the others",
    "ranking": "Strength of each source (Bradley-Terry, nats)",
}
ON_WHITE = '<svg style="background:#fff;color:#1c2024" '
PLOT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
REMEMBERED = 8
_known: dict[tuple[str, int, int], Dashboard] = {}
_turn = threading.Lock()


def last_vote(store: Store, project: int) -> int:
    """Return the number of the newest vote of a project, 0 where there is none."""
    with store.database.read() as connection:
        return connection.execute(select(func.max(VOTE.c.id)).where(VOTE.c.project == project)).scalar_one() or 0


def summary(store: Store, project: int) -> Dashboard:
    """Return the dashboard of the votes that are there now; the last few are kept.

    Raises:
        UserError: no such project.
    """
    key = (store.database.url, project, last_vote(store, project))
    with _turn:
        if key not in _known:
            _known[key] = dashboard_of(store, project)
            while len(_known) > REMEMBERED:
                _known.pop(next(iter(_known)))
        return _known[key]


@SUMMARIES.get("/{project}/plots/{name}.svg")
def plot(project: Number, name: str, known: Reviews, store: TheStore) -> Response:
    """Send a plot of the dashboard."""
    found = summary(store, project).plots()
    if name not in PLOTS or name not in found:
        raise HTTPException(404, "no such plot")
    image = found[name].replace("<svg ", ON_WHITE, 1)
    return Response(
        image,
        media_type="image/svg+xml",
        headers={"cache-control": "private, max-age=3600", "content-security-policy": PLOT_POLICY},
    )


@SUMMARIES.get("/{project}/dashboard")
def files(project: Number, known: Reviews, store: TheStore) -> Response:
    """Send the dashboard as a zipped folder: JSON, tables as CSV, plots as SVG."""
    whole, name = summary(store, project), file_name(f"{store.project(project).name}-dashboard")
    work = Path(tempfile.mkdtemp(prefix="mmalign-dashboard-"))
    try:
        archive = packed(save(whole, work / name))
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    cleaning = BackgroundTask(shutil.rmtree, work, ignore_errors=True)
    return FileResponse(archive, filename=archive.name, media_type="application/zip", background=cleaning)
