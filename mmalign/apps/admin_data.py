"""The tabs of data: what goes into a project, by path or by upload, and what comes out of it."""

import secrets
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from mmalign.annotation.accounts import Account
from mmalign.annotation.formats import FORMATS
from mmalign.annotation.intake import Limits
from mmalign.apps.admin import Desk, table
from mmalign.apps.archives import unpack
from mmalign.apps.intake import Data, Intake, data_at, inside
from mmalign.errors import UserError

UPLOADED = (".jsonl", ".json", ".parquet", ".tar", ".csv", ".zip")
GROWTH = 4  # an archive may unpack to so many times the largest upload
PATIENCE_S = 3600.0
FORMAT_NAMES = [(f"{name}: {format.told}", name) for name, format in FORMATS.items()]


def add_import(desk: Desk) -> None:
    """Put the import onto the page."""
    import gradio

    from mmalign.importers import IMPORTERS

    gradio.Markdown(
        "Rows that the project has are passed over, unusable ones are told. Uploads: one data file, or a .zip of a folder with "
        "its images. Gold items need an order in the data; it is told to nobody. Calibration items come first and are told."
    )
    with gradio.Row():
        path = gradio.Textbox(label="File or folder on the server")
        upload = gradio.File(label="or a file to upload", file_types=list(UPLOADED), type="filepath")
    with gradio.Row():
        importer = gradio.Dropdown([("mmalign's own, or images and prompts", ""), *((n, n) for n in IMPORTERS)], label="Format")
        role = gradio.Radio(["ordinary", "gold", "calibration"], value="ordinary", label="As")
    go = gradio.Button("Add", variant="primary")
    told = gradio.Textbox(label="What became of it", interactive=False, lines=2)
    faults = gradio.Dataframe(label="Rows that could not be used", interactive=False, wrap=True, visible=False)
    fields = [desk.project, path, upload, importer, role]
    go.click(desk.handler(_add, "admin"), fields, [told, faults], api_visibility="private")


def _add(
    desk: Desk, who: Account, project: int | None, path: str | None, upload: str | None, importer: str | None, role: str
) -> list[Any]:
    if project is None or bool(path and path.strip()) == bool(upload):
        raise UserError("data: want a project, and either a path or an upload.")
    data = _uploaded(desk, Path(upload), importer, role) if upload else _on_server(desk, str(path).strip(), importer, role)
    intake = Intake(desk.store, project, [data])
    intake.begin(PATIENCE_S)
    intake.join(PATIENCE_S)
    if intake.fault is not None:
        raise UserError(str(intake.fault))
    added = intake.added
    told = f"{added.added} new items, {added.repeated} known already, {added.num_faults} not usable"
    if not intake.num_read:
        told = "these data were added before, and are unchanged"
    return [told, table([{"where": one.where, "problem": one.problem} for one in added.faults])]


def _on_server(desk: Desk, path: str, importer: str | None, role: Any) -> Data:
    roots = desk.settings.roots
    if roots is not None or not importer:
        path = str(inside(path, roots))
    return data_at(path, importer=importer or None, role=role, limits=Limits(roots=roots))


def _uploaded(desk: Desk, upload: Path, importer: str | None, role: Any) -> Data:
    """Keep an upload where the store finds its images again; its rows may name nothing outside of it."""
    home = desk.settings.uploads.absolute() / secrets.token_hex(8)
    home.mkdir(parents=True, mode=0o700)
    try:
        if upload.suffix == ".zip":
            unpack(upload, home, most_bytes=GROWTH * desk.settings.upload_mb * 2**20)
            inner = [one for one in home.iterdir() if one.name != "__MACOSX"]
            place = inner[0] if len(inner) == 1 else home
        elif upload.suffix in UPLOADED:
            place = home / f"data{upload.suffix}"
            shutil.move(upload, place)
        else:
            raise UserError(f"upload: got a file ending in {upload.suffix!r}, want one of {', '.join(UPLOADED)}.")
        return data_at(str(place), importer=importer or None, role=role, limits=Limits(roots=(home,)))
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def add_export(desk: Desk) -> None:
    """Put the export onto the page."""
    import gradio

    with gradio.Row():
        format = gradio.Dropdown(FORMAT_NAMES, value="trl", label="Format", scale=2)
        container = gradio.Dropdown([("usual", ""), "parquet", "jsonl", "datasets"], value="", label="Container")
    with gradio.Row():
        votes = gradio.Number(1, precision=0, minimum=1, label="Fewest votes of an item")
        agreement = gradio.Number(0.0, minimum=0, maximum=1, step=0.05, label="Least agreement on it")
        names = gradio.Checkbox(False, label="Tell people's names (format judgements)")
    gradio.Markdown("The folder comes zipped, with a card: what is in it, what was dropped and why, the agreement.")
    download = gradio.Button("Download", variant="primary", link="/")
    fields = [desk.project, format, container, votes, agreement, names]
    for field in fields:
        field.change(
            desk.handler(_link),
            fields,
            [download],
            api_visibility="private",
            show_progress="hidden",
            trigger_mode="always_last",
        )


def _link(desk: Desk, who: Account, project: int | None, *values: Any) -> Any:
    import gradio

    if project is None:
        return gradio.Button(interactive=False)
    format, container, votes, agreement, names = values
    asked = {"format": format, "container": container, "min_votes": int(votes or 1), "min_agreement": agreement or 0}
    told = {name: value for name, value in {**asked, "names": "true" if names else ""}.items() if value != ""}
    return gradio.Button(link=f"/api/projects/{project}/export?{urlencode(told)}", interactive=True)
