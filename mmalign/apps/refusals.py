"""What a server says when something cannot be: JSON to scripts, a page with a way back to who followed a link."""

from collections.abc import Mapping
from html import escape

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from mmalign.errors import UserError

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>That cannot be</title>
<link rel="stylesheet" href="/static/base.css"><link rel="stylesheet" href="/static/pages.css">
<script src="/static/theme.js"></script>
</head>
<body><main class="sheet narrow"><h1>That cannot be</h1>
<p>{told}</p><p><a class="button" href="{back}">Back</a></p></main></body>
</html>
"""


async def of_user(request: Request, error: Exception) -> Response:
    """Answer a user's fault."""
    return _reply(request, 404 if str(error).startswith("project:") else 409, str(error))


async def of_http(request: Request, error: Exception) -> Response:
    """Answer what a route refused, or that there is none."""
    assert isinstance(error, HTTPException)
    return _reply(request, error.status_code, str(error.detail), error.headers)


async def of_body(request: Request, error: Exception) -> Response:
    """Say where a request is wrong, and nothing of what it holds: it may be a password."""
    assert isinstance(error, RequestValidationError)
    told = [f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in error.errors()]
    return _reply(request, 422, "; ".join(told))


def _reply(request: Request, status: int, told: str, headers: Mapping[str, str] | None = None) -> Response:
    if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
        back = "/admin/" if request.url.path.startswith("/api/") else "/"
        return HTMLResponse(PAGE.format(told=escape(told), back=back), status_code=status, headers=headers)
    return JSONResponse({"detail": told}, status_code=status, headers=headers)


HANDLERS = {UserError: of_user, HTTPException: of_http, RequestValidationError: of_body}
