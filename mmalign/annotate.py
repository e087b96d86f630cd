"""`mmalign annotate`: pages on which people judge pairs or lists of images or texts, served from this machine."""

import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from mmalign.annotation.before_after import comparisons_of
from mmalign.annotation.projects import Project
from mmalign.annotation.protocol import Protocol
from mmalign.annotation.store import Store
from mmalign.apps.intake import Data, Intake, data_at
from mmalign.apps.people import add_people, ask_for_administrator
from mmalign.apps.server import Settings, check_reach, create_app, serve
from mmalign.config import Choice, Table, command_line
from mmalign.errors import UserError

logger = logging.getLogger(__name__)

KIND_NAMES = {"images": "image", "texts": "text", "image": "image", "text": "text"}
PATIENCE_S = 20.0


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """What is judged, by whom, and where it is served.

    Args:
        what: `images` or `text`, and the data: a file or folder in one of our own formats, `chosen/` and `rejected/`, or
            folders of images with prompts. Without data the projects of the store are served.
        importer: of the data, where they are in a foreign format; with more settings use data.
        data: an importer with its settings, in place of a path.
        after: what a tuned model made (`mmalign generate` or `mmalign answer`) of the prompts and seeds that its base made the
            data of: each two are judged blind, and the dashboard tells the win rate.
        gold: comparisons whose order is known; mixed in silently.
        calibration: comparisons whose order is known; judged first, and told.
        name: of the project; by default that of the data.
        store: database of the judgements: a file, or `postgresql://user@host/name`.
        guideline: a Markdown file: instructions. Changed, it is a new version.
        protocol: how a new project is judged.
        host: address to listen at. Others than this machine reach it only with accounts.
        port: 0 takes any that is free.
        share_with: `team`: people sign in with accounts; the first administrator's password is asked for.
        accounts: YAML file `{name: {role: admin, password: ...}}`, readable by you alone; names that are new are added.
        names: host names that browsers may call the server by.
        https: browsers come by HTTPS, through a proxy that ends it.
        roots: folders that administrators may import from on the pages; by default that of the data.
        upload_mb: largest file that may be uploaded.
    """

    what: tuple[str, ...] = field(metadata={"positional": True})
    importer: str | None = None
    data: Annotated[Choice, Table("mmalign.importers:IMPORTERS")] | None = None
    after: str | None = None
    gold: str | None = None
    calibration: str | None = None
    name: str | None = None
    store: str = "judgements.db"
    guideline: Path | None = None
    protocol: Protocol = field(default_factory=Protocol)
    host: str = "127.0.0.1"
    port: int = 7870
    share_with: Literal["team"] | None = None
    accounts: Path | None = None
    names: tuple[str, ...] = ()
    https: bool = False
    roots: tuple[Path, ...] | None = None
    upload_mb: int = 512

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not 1 <= len(self.what) <= 2 or self.what[0] not in KIND_NAMES:
            got = " ".join(self.what) or "nothing"
            raise ValueError(f"what: got {got!r}, want `images DATA` or `text DATA`.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: got {self.port}, want 0 to 65535.")

    @property
    def path(self) -> str | None:
        """The data's path; None where an importer names them, or nothing does."""
        return self.what[1] if len(self.what) == 2 else None


def main(config: AnnotateConfig) -> None:
    """Open the data for judging and serve the pages until Ctrl-C. What was judged is on disk at once.

    Raises:
        UserError: no such data, a host beyond this machine without accounts, a port that is taken.
    """
    data = _data(config)
    settings = _settings(config)
    check_reach(settings)
    file = _file(config)
    if not data and file is not None and not Path(file).expanduser().exists():
        raise UserError(f"store: there is no {config.store!r}, want data to judge. Name them after {config.what[0]}.")
    with _bound(settings.host, settings.port) as listener:
        settings = replace(settings, port=listener.getsockname()[1])
        store = Store.open(config.store)
        try:
            if settings.accounts:
                add_people(store, config.accounts)
                ask_for_administrator(store)
            project = _project(store, config, data)
            if project is not None:
                Intake(store, project.id, data).begin(PATIENCE_S)
            app = create_app(store, settings)
            logger.info("%s", _told(settings, project))
            serve(app, settings, listener)
        finally:
            store.close()


def _data(config: AnnotateConfig) -> list[Data]:
    """Everything that goes into the project: items with known answers first, since the others may be many."""
    if config.path is not None and config.data is not None:
        raise UserError("data: got both a path and data, want one. Leave one away.")
    found = [data_at(path, role="calibration") for path in [config.calibration] if path]
    found += [data_at(path, role="gold") for path in [config.gold] if path]
    if config.after is not None:
        if config.path is None or config.importer is not None:
            raise UserError("after: got no folder of the base, want both: `mmalign annotate images BASE --after TUNED`.")
        base, tuned = config.path, config.after
        found.append(Data(place=tuned, role="ordinary", open=lambda: comparisons_of(base, tuned), beside=(base,)))
    elif config.data is not None:
        choice = config.data
        place = f"{choice.name} {choice.settings.get('path', '')}".strip()
        found.append(Data(place=place, role="ordinary", open=lambda: _built(choice)))
    elif config.path is not None:
        found.append(data_at(config.path, importer=config.importer))
    elif found or config.importer or config.name:
        raise UserError("data: got none, want the data to judge. Name them: `mmalign annotate images DATA`.")
    return found


def _built(choice: Choice) -> Iterator[Any]:
    from mmalign.annotation.opening import rows_of

    return rows_of(choice.build())


def _file(config: AnnotateConfig) -> str | None:
    """The store's file; None: it is on a server."""
    store = config.store
    return store.removeprefix("sqlite:///") if "://" not in store or store.startswith("sqlite:///") else None


def _settings(config: AnnotateConfig) -> Settings:
    team = config.share_with is not None or config.accounts is not None
    roots = config.roots
    if roots is None and team:
        place = Path(config.path).expanduser() if config.path else None
        roots = () if place is None or not place.exists() else (place if place.is_dir() else place.parent,)
    database = _file(config)
    return Settings(
        host=config.host,
        port=config.port,
        accounts=team,
        names=config.names,
        https=config.https,
        roots=roots,
        uploads=Path("judgements-uploads" if database is None else f"{database}-uploads"),
        upload_mb=config.upload_mb,
        warm=True,
    )


def _project(store: Store, config: AnnotateConfig, data: list[Data]) -> Project | None:
    """The project of the data, made if there is none of its name; the protocol is frozen with it, its guideline is not."""
    if not data:
        if not store.projects():
            raise UserError(f"store: got no project in {config.store!r}, want data to judge. Name them after {config.what[0]}.")
        return None
    kind = KIND_NAMES[config.what[0]]
    name = config.name or Path(data[-1].place.split()[-1]).expanduser().resolve().stem
    protocol = config.protocol
    if config.guideline is not None:
        protocol = replace(protocol, guideline=_text(config.guideline))
    known = store.project_named(name)
    if known is None:
        return store.create_project(name, kind, protocol)
    if known.kind != kind:
        raise UserError(f"project {name}: got {config.what[0]}, but it is of kind {known.kind}. Set name to make another.")
    if replace(config.protocol, guideline=known.protocol.guideline) not in (
        known.protocol,
        Protocol(guideline=known.protocol.guideline),
    ):
        raise UserError(f"project {name}: got another protocol than it was begun with. Set name to make another project.")
    if config.guideline is not None:
        store.set_guideline(known.id, protocol.guideline)
    return known


def _text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"guideline: {path} cannot be read ({fault}). Give a Markdown file in UTF-8.") from fault


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, so that a port that is taken is told before anything is read."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(2048)
        except OSError as fault:
            raise UserError(f"port: cannot listen at {host} port {port} ({fault}). Set another --port, or --port 0.") from fault
        yield listener


def _told(settings: Settings, project: Project | None) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{settings.port}"
    lines = [
        f"judging: {address}/{'' if project is None else f'judge/{project.id}'}",
        f"dashboard and settings: {address}/admin/",
    ]
    who = "people sign in with their accounts" if settings.accounts else "reachable from this machine alone, without sign-in"
    return "\n".join([*lines, f"{who}; Ctrl-C ends"])


if __name__ == "__main__":
    sys.exit(command_line(AnnotateConfig, main))
