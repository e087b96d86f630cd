"""The JSON routes of the judging page: session, next, displayed, vote, undo, keep, renew, release, instructions.

Routes that change something want the header X-CSRF-Token, which GET /api/session tells. A vote is answered when it is on disk.
"""

from functools import partial
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, HTTPException
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mmalign.annotation.accounts import SignIn
from mmalign.annotation.progress import Progress
from mmalign.annotation.projects import Project
from mmalign.annotation.shown import Shown
from mmalign.annotation.store import Store
from mmalign.annotation.votes import Receipt
from mmalign.apps import rendering
from mmalign.apps.bodies import AssignmentBody, GuidelineBody, PasswordBody, SignInBody, UndoBody, VoteBody
from mmalign.apps.sign_in import Changes, Door, Number, Reads, TheDoor, TheStore, Visitor, address_of, csrf
from mmalign.errors import UserError

HASHES_AT_ONCE = 2  # of passwords
SESSION = APIRouter(prefix="/api")
JUDGING = APIRouter(prefix="/api/projects")


@SESSION.get("/session")
def session(request: Request, door: TheDoor) -> Response:
    """Tell who is signed in, and the token that changing requests carry; on one's own machine open a session."""
    response = JSONResponse({})
    known = door.welcome(request, response)
    if known is None:
        raise HTTPException(401, "sign in first")
    return _with_body(response, _told(known, door))


@SESSION.post("/login")
async def login(request: Request, body: SignInBody, door: TheDoor) -> Response:
    """Open a session for a name and a password; who fails often has to wait."""
    answer = await _signed_in(door, body.name, body.password, request)
    former = door.token_of(request)
    if answer.status == "ok" and former:  # this browser's earlier session would go on unseen
        await run_in_threadpool(door.store.sign_out, former)
    if answer.status == "wait":
        seconds = max(1, round(answer.wait_s))
        told = {"detail": f"too many tries; wait {seconds} seconds", "wait_s": seconds}
        return JSONResponse(told, status_code=429, headers={"retry-after": str(seconds)})
    if answer.status == "wrong" or answer.account is None:
        raise HTTPException(403, "name or password is wrong")
    response = JSONResponse(_told(Visitor(account=answer.account, token=answer.token), door))
    door.give(response, answer.token)
    return response


@SESSION.post("/logout")
def logout(known: Changes, door: TheDoor) -> Response:
    """End the session."""
    door.store.sign_out(known.token)
    response = JSONResponse({"signed_out": True})
    door.take_back(response)
    return response


async def _signed_in(door: Door, name: str, password: str, request: Request) -> SignIn:
    """Check a password where it holds up nobody: the hash takes its time and 32 MiB, and threads are for those who judge."""
    return await run_sync(partial(door.store.sign_in, name, password, address=address_of(request)), limiter=_limiter(door))


def _limiter(door: Door) -> CapacityLimiter:
    """Return the gate of the hashes of one server; it belongs to the event loop that first asks."""
    if door.hashing is None:
        door.hashing = CapacityLimiter(HASHES_AT_ONCE)
    return door.hashing


@SESSION.post("/password")
async def password(request: Request, known: Changes, body: PasswordBody, door: TheDoor) -> Response:
    """Change one's own password; all other sessions end."""
    answer = await _signed_in(door, known.account.name, body.old, request)
    if answer.status != "ok":
        raise HTTPException(429 if answer.status == "wait" else 403, "the old password is wrong")
    change = partial(door.store.change_account, known.account.id, password=body.new)
    await run_sync(change, limiter=_limiter(door))
    token = await run_in_threadpool(door.store.open_session, known.account.id)
    response = JSONResponse(_told(Visitor(account=known.account, token=token), door))
    door.give(response, token)
    return response


@JUDGING.get("")
def projects(known: Reads, store: TheStore) -> Response:
    """List the projects with one's own progress."""
    told = [_listed(one, store.progress(one.id, known.account.id)) for one in store.projects()]
    return JSONResponse({"projects": told})


@JUDGING.get("/{project}/next")
def next(project: Number, known: Reads, store: TheStore) -> Response:
    """Tell what is to be judged now, and what comes after it."""
    return JSONResponse(_state(store, _project(store, project), known))


@JUDGING.post("/{project}/displayed")
def displayed(project: Number, known: Changes, store: TheStore, body: AssignmentBody) -> Response:
    """Note that an assignment is on the screen."""
    return JSONResponse({"displayed": store.displayed(body.assignment, known.account.id)})


@JUDGING.post("/{project}/vote")
def vote(project: Number, known: Changes, store: TheStore, body: VoteBody) -> Response:
    """Store a vote; the reply names what is next."""
    receipt = store.vote(
        body.assignment,
        body.revision,
        body.verdict(),
        known.account.id,
        dwell_ms=body.dwell,
        app_version=body.app_version,
    )
    both = (receipt.next, receipt.ahead) if receipt.next is not None and receipt.next.project == project else None
    return JSONResponse(_receipt(receipt) | _state(store, _project(store, project), known, both))


@JUDGING.post("/{project}/undo")
def undo(project: Number, known: Changes, store: TheStore, body: UndoBody) -> Response:
    """Open the last judgement again."""
    reopened = store.undo(project, known.account.id, body.assignment)
    return JSONResponse({"reopened": reopened is not None} | _state(store, _project(store, project), known))


@JUDGING.post("/{project}/keep")
def keep(project: Number, known: Changes, store: TheStore) -> Response:
    """Let stand what was opened again."""
    store.keep(project, known.account.id)
    return JSONResponse(_state(store, _project(store, project), known))


@JUDGING.post("/{project}/renew")
def renew(project: Number, known: Changes, store: TheStore) -> Response:
    """Put off the end of what is held."""
    return JSONResponse({"expires_at": store.renew(project, known.account.id)})


@JUDGING.post("/{project}/release")
def release(project: Number, known: Changes, store: TheStore) -> Response:
    """Give back what is held, as the page is left."""
    return JSONResponse({"released": store.release(project, known.account.id)})


@JUDGING.get("/{project}/guideline")
def guideline(project: Number, known: Reads, store: TheStore) -> Response:
    """Tell the newest instructions."""
    newest = store.guideline(project)
    return JSONResponse(rendering.guideline(newest.text, newest.version))


@JUDGING.post("/{project}/guideline")
def guideline_read(project: Number, known: Changes, store: TheStore, body: GuidelineBody) -> Response:
    """Note that the instructions were read."""
    store.guideline_read(project, known.account.id, min(body.version, store.guideline(project).version))
    return JSONResponse({"read": True})


def _project(store: Store, project: int) -> Project:
    try:
        return store.project(project)
    except UserError as error:
        raise HTTPException(404, str(error)) from error


def _state(
    store: Store, project: Project, known: Visitor, both: tuple[Shown | None, Shown | None] | None = None
) -> dict[str, Any]:
    """What is judged now, what comes after it (handed out where that is not known), and how far the person is."""
    who = known.account.id
    current, ahead = store.take_both(project.id, who) if both is None else both
    return {
        "project": {"id": project.id, "name": project.name, "kind": project.kind, "open": project.is_open},
        "protocol": rendering.asked(project.protocol),
        "current": None if current is None else rendering.shown(current, kind=project.kind),
        "ahead": None if ahead is None else rendering.shown(ahead, kind=project.kind),
        "progress": _progress(store.progress(project.id, who)),
    }


def _progress(progress: Progress) -> dict[str, Any]:
    """A person's own progress; `total` is what one person could judge of the project."""
    return {
        "judged": progress.mine,
        "total": max(progress.items + progress.calibration, progress.mine),
        "share": progress.share,
        "calibration": progress.calibration,
        "calibration_done": progress.calibration_done,
    }


def _receipt(receipt: Receipt) -> dict[str, Any]:
    feedback = receipt.feedback
    return {
        "status": receipt.status,
        "reason": receipt.reason,
        "message": receipt.message,
        "late": receipt.late,
        "wait_ms": receipt.wait_ms,
        "stands": None if receipt.stands is None else rendering.verdict(receipt.stands),
        "feedback": None
        if feedback is None
        else {
            "right": feedback.right,
            "expected": rendering.verdict(feedback.expected),
            "explanation": feedback.explanation,
        },
    }


def _listed(project: Project, progress: Progress) -> dict[str, Any]:
    return {
        "id": project.id,
        "name": project.name,
        "kind": project.kind,
        "open": project.is_open,
        "progress": _progress(progress),
    }


def _told(known: Visitor, door: Door) -> dict[str, Any]:
    return {
        "annotator": known.account.id,
        "name": known.account.name,
        "role": known.account.role,
        "csrf": csrf(known.token),
        "accounts": door.own is None,
    }


def _with_body(response: JSONResponse, content: dict[str, Any]) -> Response:
    """Put a body into a response that holds a cookie already."""
    made = JSONResponse(content)
    made.raw_headers += [pair for pair in response.raw_headers if pair[0] == b"set-cookie"]
    return made
