"""The dashboard tab: progress, agreement, biases, people and sources of a project, as plots and tables."""

from typing import Any

from mmalign.annotation.accounts import Account
from mmalign.annotation.tally import select
from mmalign.apps.admin import Desk, table
from mmalign.apps.summaries import PLOTS, last_vote, summary
from mmalign.errors import UserError

TABLES = {
    "choices": "Votes by choice",
    "agreement": "Agreement (95 % intervals)",
    "bias": "Biases: how often the left one, and the longer one, wins; ties left out",
    "raters": "People. Low agreement alone is no fault: look at gold and repeats too",
    "ranking": "Sources, best first (Bradley-Terry, 95 % intervals)",
    "kappas": "Cohen's kappa of each two people",
    "dropped": "Judged items that give no preference",
}


def add(desk: Desk) -> None:
    """Put the tab's contents onto the page."""
    import gradio

    with gradio.Row():
        refresh = gradio.Button("Look again", size="sm")
        ask = gradio.Button("Ask for uncertain pairs", size="sm")
        files = gradio.Button("Download as files", size="sm", link="/")
    told = gradio.Markdown("The project is being opened …")
    plots = gradio.Markdown()
    tables = [gradio.Dataframe(label=label, interactive=False, visible=False, wrap=True) for label in TABLES.values()]
    shown = [told, plots, files, *tables]
    look = desk.handler(_look)
    refresh.click(look, [desk.project], shown, api_visibility="private")
    glance = desk.project.change(desk.handler(_glance), [desk.project], shown, api_visibility="private", show_progress="hidden")
    glance.then(look, [desk.project], shown, api_visibility="private", show_progress="minimal")
    ask.click(desk.handler(_ask, "admin"), [desk.project], [told], api_visibility="private")


def _glance(desk: Desk, who: Account, project: int | None) -> list[Any]:
    """What is known at once: how far the project is. The statistics of a large one take a while."""
    import gradio

    if project is None:
        return ["No project yet: make one under Instructions and settings.", "", gradio.Button(), *(table([]) for _ in TABLES)]
    waiting = "Agreement, biases and the ranking are being reckoned …"
    button = gradio.Button(link=f"/api/projects/{project}/dashboard")
    return [f"{_progress(desk, project)}.", waiting, button, *(table([]) for _ in TABLES)]


def _progress(desk: Desk, project: int) -> str:
    progress = desk.store.progress(project)
    state = "open" if desk.store.project(project).is_open else "closed"
    votes = f"**{progress.counted} of {progress.wanted} votes** ({progress.share:.0%}) on {progress.items} items"
    return f"{votes}; the project is {state}"


def _look(desk: Desk, who: Account, project: int | None) -> list[Any]:
    import gradio

    if project is None:
        return _glance(desk, who, project)
    whole = summary(desk.store, project)
    told = f"{_progress(desk, project)}; {whole.num_judged} items judged, {whole.num_overlapping} by two people or more."
    if not whole.num_votes:
        nothing = f"No votes yet. Judge at [/judge/{project}](/judge/{project}), then look again."
        return [told, nothing, *_glance(desk, who, project)[2:]]
    note = "" if whole.on_random is None else "\n\nItems were also chosen by their votes: report the random slice."
    plots = whole.plots()
    version = last_vote(desk.store, project)
    found = [name for name in PLOTS if name in plots]
    pictures = "\n\n".join(
        f"## {PLOTS[name]}\n\n![{PLOTS[name]}](/api/projects/{project}/plots/{name}.svg?v={version})" for name in found
    )
    tables = whole.tables()
    button = gradio.Button(link=f"/api/projects/{project}/dashboard")
    return [told + note, pictures, button, *(table(tables.get(name, [])) for name in TABLES)]


def _ask(desk: Desk, who: Account, project: int | None) -> str:
    if project is None:
        raise UserError("project: got none. Choose one.")
    count = select(desk.store, project)
    return f"{count} uncertain pairs are asked for next; the random slice is judged beside them."
