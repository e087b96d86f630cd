"""The tabs of people: how each did in the calibration round, and the accounts."""

from typing import Any

from mmalign.annotation.accounts import ROLES, Account
from mmalign.apps.admin import Desk, table
from mmalign.errors import UserError


def add_calibration(desk: Desk) -> None:
    """Put the calibration round onto the page."""
    import gradio

    gradio.Markdown(
        "A round of 20 to 30 items of known answer before real work; after each the answer is told, with its reason. "
        "Add them under Data as calibration; how many everybody judges is a setting of the project."
    )
    refresh = gradio.Button("Look again", size="sm")
    people = gradio.Dataframe(label="People", interactive=False, visible=False)
    look = desk.handler(_calibration, "admin")
    for event in (refresh.click, desk.project.change):
        event(look, [desk.project], [people], api_visibility="private")


def _calibration(desk: Desk, who: Account, project: int | None) -> Any:
    if project is None:
        return table([])
    rows = []
    for one in desk.store.accounts():
        progress = desk.store.progress(project, one.id)
        done = progress.calibration_done
        rows.append(
            {
                "name": one.name,
                "calibration judged": f"{done} of {progress.calibration}",
                "right": progress.calibration_right,
                "share": round(progress.calibration_right / done, 3) if done else None,
                "instructions read": progress.guideline_read,
                "newest": progress.guideline_version,
                "items judged": progress.mine,
            }
        )
    return table(rows)


def add_accounts(desk: Desk) -> None:
    """Put the accounts onto the page."""
    import gradio

    if desk.store.database.is_sqlite:
        gradio.Button("Download a backup of the whole store", size="sm", link="/api/backup")
    if not desk.settings.accounts:
        gradio.Markdown("This server has one person, on its own machine. For accounts start it with `--share-with team`.")
        return
    people = gradio.Dataframe(label="Accounts", interactive=False)
    with gradio.Row():
        name = gradio.Textbox(label="Name", max_length=100)
        role = gradio.Radio(list(ROLES), value="annotator", label="Role")
        password = gradio.Textbox(label="Password (10 characters or more)", type="password", max_length=1000)
    with gradio.Row():
        add = gradio.Button("Add", variant="primary")
        change = gradio.Button("Change role, and password if one is given")
        close = gradio.Button("Close the account")
        reopen = gradio.Button("Open it again")
    refresh = gradio.Button("Look again", size="sm")
    fields, shown = [name, role, password], [people, password]
    for button, does in ((add, _add), (change, _change), (close, _close), (reopen, _reopen), (refresh, _list)):
        button.click(desk.handler(does, "admin"), fields, shown, api_visibility="private")
    desk.project.change(desk.handler(_list, "admin"), fields, shown, api_visibility="private", show_progress="hidden")


def _list(desk: Desk, who: Account, *values: Any) -> list[Any]:
    """The table anew, and an empty field for the next password."""
    rows = [{"name": one.name, "role": one.role, "open": one.active} for one in desk.store.accounts()]
    return [table(rows), ""]


def _named(desk: Desk, name: str) -> Account:
    found = desk.store.account(name)
    if found is None:
        raise UserError(f"account: got the name {name!r}, which nobody has. Look at the table.")
    return found


def _add(desk: Desk, who: Account, name: str, role: Any, password: str) -> list[Any]:
    desk.store.add_account(name, password, role)
    return _list(desk, who)


def _change(desk: Desk, who: Account, name: str, role: Any, password: str) -> list[Any]:
    one = _named(desk, name)
    _keep_one_administrator(desk, one, leaves=role != "admin")
    desk.store.change_account(one.id, role=role, password=password or None)
    return _list(desk, who)


def _close(desk: Desk, who: Account, name: str, *values: Any) -> list[Any]:
    one = _named(desk, name)
    _keep_one_administrator(desk, one, leaves=True)
    desk.store.change_account(one.id, active=False)
    return _list(desk, who)


def _reopen(desk: Desk, who: Account, name: str, *values: Any) -> list[Any]:
    desk.store.change_account(_named(desk, name).id, active=True)
    return _list(desk, who)


def _keep_one_administrator(desk: Desk, one: Account, *, leaves: bool) -> None:
    others = [other for other in desk.store.accounts() if other.may("admin") and other.id != one.id]
    if leaves and one.may("admin") and not others:
        raise UserError(f"account {one.name}: is the last administrator. Make another one first.")
