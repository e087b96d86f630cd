"""The tab of instructions and settings: versions of the guideline, opening and closing, new projects with their protocol."""

import json
from dataclasses import asdict
from typing import Any

from mmalign.annotation.accounts import Account
from mmalign.annotation.protocol import CHOICES, KINDS, Protocol
from mmalign.apps.admin import Desk, projects_menu, table
from mmalign.errors import UserError

MORE = ("overlap_share", "overlap_votes", "gold_share", "repeat_share", "random_share", "lease_minutes", "min_dwell_ms")


def add(desk: Desk) -> None:
    """Put the tab's contents onto the page."""
    import gradio

    told = gradio.Textbox(label="State", interactive=False)
    text = gradio.Textbox(label="Instructions (Markdown); saved, they are a new version, which everybody is shown", lines=14)
    with gradio.Row():
        save = gradio.Button("Save instructions", variant="primary")
        toggle = gradio.Button("Open or close the project")
    protocol = gradio.Dataframe(label="Protocol (fixed when the project was made)", interactive=False, wrap=True)
    shown = [told, text, protocol]
    desk.project.change(desk.handler(_show, "admin"), [desk.project], shown, api_visibility="private")
    save.click(desk.handler(_save, "admin"), [desk.project, text], shown, api_visibility="private")
    toggle.click(desk.handler(_toggle, "admin"), [desk.project], shown, api_visibility="private")
    with gradio.Accordion("New project", open=False):
        _add_form(desk)


def _add_form(desk: Desk) -> None:
    import gradio

    usual = Protocol()
    with gradio.Row():
        name = gradio.Textbox(label="Name", max_length=100)
        kind = gradio.Radio(list(KINDS), value="image", label="Candidates are")
        votes = gradio.Number(usual.votes_per_item, precision=0, minimum=1, label="Votes per item (3; test sets 5 or more)")
        calibration = gradio.Number(0, precision=0, minimum=0, label="Calibration items (20 to 30 before real work)")
    with gradio.Row():
        choices = gradio.CheckboxGroup(list(CHOICES), value=list(usual.choices), label="Choices of a pair")
        strength = gradio.Checkbox(usual.strength, label="Strength from -3 to 3")
        rationale = gradio.Radio(["off", "optional", "required"], value=usual.rationale, label="Reason in words")
    with gradio.Row():
        aspects = gradio.Textbox(label="Aspects, with commas between", placeholder="fidelity, aesthetics")
        flags = gradio.Textbox(label="Flags, with commas between", placeholder="unsafe, watermark")
    with gradio.Row():
        more = [gradio.Number(getattr(usual, one), label=one.replace("_", " "), minimum=0) for one in MORE]
    make = gradio.Button("Make the project", variant="primary")
    fields = [name, kind, votes, calibration, choices, strength, rationale, aspects, flags, *more]
    make.click(desk.handler(_make, "admin"), fields, [desk.project], api_visibility="private")


def _show(desk: Desk, who: Account, project: int | None) -> list[Any]:
    if project is None:
        return ["no project yet", "", table([])]
    known, guideline = desk.store.project(project), desk.store.guideline(project)
    state = "open" if known.is_open else "closed: nothing is handed out"
    settings = {name: value for name, value in asdict(known.protocol).items() if name != "guideline"}
    rows = [{"setting": name, "value": json.dumps(value)} for name, value in settings.items()]
    return [f"{known.name}: {state}; instructions version {guideline.version}", guideline.text, table(rows)]


def _save(desk: Desk, who: Account, project: int | None, text: str) -> list[Any]:
    if project is None:
        raise UserError("project: got none. Make one first.")
    desk.store.set_guideline(project, text)
    return _show(desk, who, project)


def _toggle(desk: Desk, who: Account, project: int | None) -> list[Any]:
    if project is None:
        raise UserError("project: got none. Make one first.")
    desk.store.set_open(project, not desk.store.project(project).is_open)
    return _show(desk, who, project)


def _make(desk: Desk, who: Account, name: str, kind: str, *values: Any) -> Any:
    votes, calibration, choices, strength, rationale, aspects, flags, *more = values
    numbers = {one: type(getattr(Protocol(), one))(value) for one, value in zip(MORE, more, strict=True)}
    protocol = Protocol(
        votes_per_item=int(votes),
        calibration=int(calibration),
        choices=tuple(one for one in CHOICES if one in choices),
        strength=bool(strength),
        rationale=rationale,
        aspects=_listed(aspects),
        flags=_listed(flags),
        **numbers,
    )
    made = desk.store.create_project(name.strip(), kind, protocol)
    return projects_menu(desk, made.id)


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
