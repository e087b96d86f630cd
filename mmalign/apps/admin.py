"""The pages of reviewers and administrators, in Gradio: dashboard, projects and instructions, data, accounts, export.

Texts of data never enter an HTML or Markdown component: names stand in tables and menus, which show them as they are, and plots
are pictures fetched from their own route.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from mmalign.annotation.accounts import Account, Role
from mmalign.annotation.store import Store
from mmalign.errors import UserError

if TYPE_CHECKING:
    import gradio

    from mmalign.apps.server import Settings

logger = logging.getLogger(__name__)

KEPT_S = 3600  # an upload that nobody added
Handler = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What every tab works with."""

    store: Store
    settings: "Settings"
    project: "gradio.Dropdown"

    def handler(self, function: Handler, role: Role = "reviewer") -> Handler:
        """Return `function(desk, account, *values)` as Gradio calls it: for who may do what the role may, faults as messages.

        Raises:
            gradio.Error: who asks may not, or the user's fault in words.
        """
        import gradio

        def call(request: gradio.Request, *values: Any) -> Any:
            who = self.store.account(request.username or "")
            if who is None or not who.may(role):
                raise gradio.Error(f"This needs the role {role}.", print_exception=False)
            try:
                return function(self, who, *values)
            except UserError as error:
                raise gradio.Error(escape(str(error)), print_exception=False) from error  # messages are shown as HTML

        return call


def build_pages(store: Store, settings: "Settings") -> "gradio.Blocks":
    """Make the pages."""
    import gradio

    from mmalign.apps import admin_dashboard, admin_data, admin_people, admin_projects

    with gradio.Blocks(
        title="mmalign annotation", analytics_enabled=False, fill_width=True, delete_cache=(KEPT_S, KEPT_S)
    ) as pages:
        gradio.Markdown("# Dashboard and settings")
        with gradio.Row(equal_height=True):
            project = gradio.Dropdown(choices=[], label="Project", interactive=True, scale=4)
            gradio.Button("Judge", link="/", scale=1)
        desk = Desk(store=store, settings=settings, project=project)
        with gradio.Tabs():
            with gradio.Tab("Dashboard"):
                admin_dashboard.add(desk)
            with gradio.Tab("Export"):
                admin_data.add_export(desk)
            tabs = []
            for name, fill in (
                ("Instructions and settings", admin_projects.add),
                ("Data", admin_data.add_import),
                ("Calibration", admin_people.add_calibration),
                ("Accounts and backup", admin_people.add_accounts),
            ):
                with gradio.Tab(name) as tab:
                    fill(desk)
                tabs.append(tab)
        pages.load(desk.handler(_welcome), None, [project, *tabs], api_visibility="private", show_progress="hidden")
    return pages


def _welcome(desk: Desk, who: Account) -> list[Any]:
    """The projects, and the tabs that the person may use; whether they may is asked again by every handler."""
    import gradio

    return [projects_menu(desk), *(gradio.Tab(visible=who.may("admin")) for _ in range(4))]


def projects_menu(desk: Desk, chosen: int | None = None) -> Any:
    """Return the menu of projects anew."""
    import gradio

    known = desk.store.projects()
    first = known[-1].id if known else None
    return gradio.Dropdown(choices=[(f"{one.name} ({one.kind})", one.id) for one in known], value=chosen or first)


def table(rows: list[dict[str, Any]]) -> Any:
    """Return rows of plain values as a table, numbers short; hidden where there are none."""
    import gradio

    if not rows:
        return gradio.Dataframe(value=None, visible=False)
    cells = [[_short(value) for value in row.values()] for row in rows]
    return gradio.Dataframe(value={"headers": list(rows[0]), "data": cells}, visible=True)


def _short(value: Any) -> Any:
    if value is None:
        return ""
    return round(value, 3) if isinstance(value, float) else value
