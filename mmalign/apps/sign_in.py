"""Who sends a request: the session cookie, the token against forged requests, the one person where there are no accounts."""

import hashlib
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, cast

from anyio import CapacityLimiter
from fastapi import Depends, HTTPException
from fastapi import Path as PathParameter
from starlette.requests import Request
from starlette.responses import Response

from mmalign.annotation.accounts import Account, Role
from mmalign.annotation.store import SESSION_HOURS, Store

logger = logging.getLogger(__name__)

CSRF_HEADER = "x-csrf-token"
LONGEST_TOKEN = 200
OWN = "me"  # the one person of a session without accounts


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """A signed-in person and the session they came with."""

    account: Account
    token: str


class Door:
    """Knows visitors by their session cookie. Sessions lie in the store, so they outlive restarts.

    Args:
        store: with accounts and sessions.
        own: the account that everybody is, on one's own machine; None: people sign in.
        port: part of the cookie's name, since browsers share the cookies of a host among its ports.
        https: the browser comes by HTTPS (through a proxy): the cookie is sent by no other way.
    """

    def __init__(self, store: Store, *, own: Account | None, port: int, https: bool = False) -> None:
        """Nobody has come yet."""
        self.store = store
        self.own = own
        self.https = https
        self.hashing: CapacityLimiter | None = None
        self.cookie = f"{'__Host-' if https else ''}mmalign_session_{port}"

    def token_of(self, request: Request) -> str:
        """Return the token that the browser sends, which need not be of a session; empty where it sends none."""
        token = request.cookies.get(self.cookie, "")
        return token if len(token) <= LONGEST_TOKEN else ""

    def visitor(self, request: Request) -> Visitor | None:
        """Return who sends the request; None: nobody that is known."""
        token = self.token_of(request)
        if not token:
            return None
        account = self.store.session(token)
        if account is None or (self.own is None and account.name == OWN):  # a team has nobody who need not sign in
            return None
        return Visitor(account=account, token=token)

    def welcome(self, request: Request, response: Response) -> Visitor | None:
        """As `visitor`; on one's own machine a session is opened where there is none, and its cookie put on the response."""
        known = self.visitor(request)
        if known is not None or self.own is None:
            return known
        token = self.store.open_session(self.own.id)
        self.give(response, token)
        return Visitor(account=self.own, token=token)

    def name_of(self, role: Role) -> Callable[[Request], str | None]:
        """Return a function that tells the name of who sends a request, if they may do what the role may."""

        def name(request: Request) -> str | None:
            known = self.visitor(request)
            return known.account.name if known is not None and known.account.may(role) else None

        return name

    def give(self, response: Response, token: str) -> None:
        """Put the session's cookie on a response."""
        response.set_cookie(
            self.cookie,
            token,
            max_age=SESSION_HOURS * 3600,
            path="/",
            secure=self.https,
            httponly=True,
            samesite="strict",
        )

    def take_back(self, response: Response) -> None:
        """Remove the cookie."""
        response.delete_cookie(self.cookie, path="/", secure=self.https, httponly=True, samesite="strict")


async def door_of(request: Request) -> Door:
    """Return the door of the application that a request came to."""
    return cast(Door, request.app.state.door)


async def store_of(request: Request) -> Store:
    """Return the store of the application that a request came to."""
    return cast(Door, request.app.state.door).store


Number = Annotated[int, PathParameter(ge=1, lt=2**31)]  # of a project
TheDoor = Annotated[Door, Depends(door_of)]
TheStore = Annotated[Store, Depends(store_of)]


def reads(request: Request, door: TheDoor) -> Visitor:
    """Let a signed-in person in.

    Raises:
        HTTPException: 401.
    """
    known = door.visitor(request)
    if known is None:
        raise HTTPException(401, "sign in first")
    return known


Reads = Annotated[Visitor, Depends(reads)]


async def changes(request: Request, known: Reads) -> Visitor:
    """Let a signed-in person in who sends the session's token in a header, which a foreign page cannot know.

    Raises:
        HTTPException: 401, or 403 where the token is missing or of another session.
    """
    if not hmac.compare_digest(request.headers.get(CSRF_HEADER, "").encode(), csrf(known.token).encode()):
        raise HTTPException(403, "the page is of another session; load it again")
    return known


async def reviews(known: Reads) -> Visitor:
    """Let reviewers and administrators in.

    Raises:
        HTTPException: 401, 403.
    """
    if not known.account.may("reviewer"):
        raise HTTPException(403, "reviewers and administrators only")
    return known


Changes = Annotated[Visitor, Depends(changes)]


async def administers(known: Reads) -> Visitor:
    """Let administrators in.

    Raises:
        HTTPException: 401, 403.
    """
    if not known.account.may("admin"):
        raise HTTPException(403, "administrators only")
    return known


Reviews = Annotated[Visitor, Depends(reviews)]
Administers = Annotated[Visitor, Depends(administers)]


def csrf(token: str) -> str:
    """Return the token against forged requests that belongs to a session; the session's own cannot be told from it."""
    return hmac.new(token.encode(), b"csrf", hashlib.sha256).hexdigest()


def address_of(request: Request) -> str:
    """Return where a request comes from, for slowing down failed sign-ins."""
    return request.client.host if request.client else ""
