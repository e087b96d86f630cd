"""What every request must pass and every reply must carry: host, origin, size, content security policy."""

import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ADMIN = "/admin"
MEDIA = "/media/"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self'; "
    "font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; object-src 'none'"
)
MEDIA_POLICY = "default-src 'none'; sandbox; frame-ancestors 'none'"
# Gradio writes styles from scripts, and starts its page by inline scripts: those get a nonce, styles cannot.
ADMIN_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "manifest-src 'self'; form-action 'self'; base-uri 'self'; frame-ancestors 'none'; object-src 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=()",
}
LENGTH = re.compile(r"[0-9]{1,18}")
SCRIPT_TAG = re.compile(rb"<script(?=[\s>])")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes.

    Args:
        hosts: names that a request may call the server by, without port; None: any. On loopback only loopback's own names
            are allowed, so that a foreign page whose name was rebound to 127.0.0.1 gets nothing.
        body_bytes: largest body of a request of the judging page.
        upload_bytes: largest body of a request of the admin pages.
    """

    hosts: tuple[str, ...] | None = LOOPBACK
    body_bytes: int = 64 * 1024
    upload_bytes: int = 512 * 1024 * 1024


class TooLarge(HTTPException):
    """A body turned out longer than allowed while it was read. As an HTTPException it passes through who reads the body."""

    def __init__(self, limit: int) -> None:
        """Tell the limit in bytes."""
        super().__init__(413, f"got a body of more than {limit} bytes, want a smaller one")


class Guard:
    """ASGI middleware in front of everything: refuses what is foreign or too large, and sets the headers of every reply.

    Streams pass through it unbuffered; only the HTML of the admin pages is held, to put the nonce on its scripts.
    """

    def __init__(self, app: App, *, limits: Limits) -> None:
        """Stand before `app`."""
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        nonce = secrets.token_urlsafe(16)
        reply = _Reply(send, scope["path"], nonce)
        refusal = self._refusal(scope)
        if refusal:
            logger.info("refused %s %r: %s", scope["method"], scope["path"], refusal[1])
            await _refuse(reply.send, *refusal)
            return
        limit = self._limit(scope)
        if _is_admin(scope["path"]):  # a compressed page could not be given its nonce
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]}
        try:
            await self.app(scope, _bounded(receive, limit), reply.send)
        except TooLarge as fault:
            if not reply.started:
                await _refuse(reply.send, fault.status_code, fault.detail)

    def _limit(self, scope: Scope) -> int:
        return self.limits.upload_bytes if _is_admin(scope["path"]) else self.limits.body_bytes

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.limits.hosts is not None and host_name(host) not in self.limits.hosts:
            return 421, f"got the host name {host_name(host)!r}, want one this server was started for"
        if scope["method"] not in SAFE_METHODS and not is_own_page(headers):
            return 403, "the request comes from another site"
        limit = self._limit(scope)
        length = headers.get("content-length", "0")
        if not LENGTH.fullmatch(length):
            return 400, "got a content-length that is no number"
        if int(length) > limit:
            return 413, f"got a body of {length} bytes, want at most {limit}"
        return None


class _Reply:
    """Sets the headers of one reply, and the nonce in the HTML of an admin page."""

    def __init__(self, send: Send, path: str, nonce: str) -> None:
        self._send = send
        self._path = path
        self._nonce = nonce
        self._held: Message | None = None
        self._body = b""
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            self._dress(headers)
            if _is_admin(self._path) and headers.get("content-type", "").startswith("text/html"):
                self._held = message
                return
        elif self._held is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            message = {**message, "body": self._with_nonce(self._held)}
            await self._send(self._held)
            self._held = None
        await self._send(message)

    def _with_nonce(self, start: Message) -> bytes:
        body = SCRIPT_TAG.sub(f'<script nonce="{self._nonce}"'.encode(), self._body)
        MutableHeaders(scope=start)["content-length"] = str(len(body))
        return body

    def _dress(self, headers: MutableHeaders) -> None:
        policy = PAGE_POLICY
        if _is_admin(self._path):
            policy = ADMIN_POLICY.format(nonce=self._nonce)
        elif self._path.startswith(MEDIA):
            policy = MEDIA_POLICY
        headers.setdefault("content-security-policy", policy)
        for name, value in HEADERS.items():
            headers[name] = value
        if "cache-control" not in headers:
            headers["cache-control"] = "no-store"
        if "server" in headers:
            del headers["server"]


def host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def is_own_page(headers: Headers) -> bool:
    """Tell whether a request that changes something was sent by a page of this server, or by no browser at all.

    Browsers send Origin with every such request, and Sec-Fetch-Site where they know it; both must agree with the Host that
    was called. What sends neither is no browser, and holds no cookie that it was not given.
    """
    origin = headers.get("origin")
    site = headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    if origin is None:
        return True
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and authority.lower() == headers.get("host", "").lower()


def _is_admin(path: str) -> bool:
    return path == ADMIN or path.startswith(f"{ADMIN}/")


def _bounded(receive: Receive, limit: int) -> Receive:
    """Count what is read: a chunked body names no length."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                raise TooLarge(limit)
        return message

    return bounded


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
