"""Exceptions -> OpenAI's error shape, `{"error": {message, type, param, code}}`.

Every error of the server leaves in this shape, also the framework's 404 and 405; an exception that
nobody raised on purpose says nothing of the inside.
"""

import json
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from boundary.store.store import JobRunning, NoSuchJob, NoSuchVersion, StoreError
from server.api.exchange import exchange_of
from server.api.security_headers import HEADERS
from server.errors import (
    Conflict,
    FathomError,
    NotFound,
    Overloaded,
    RateLimited,
    StoreUnavailable,
    Unauthorized,
)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; nobody reads it."""


def error_json(error: FathomError) -> str:
    """The body for an error raised on purpose."""
    return _json(error.message, error.type, error.param, error.code)


def internal_error_json() -> str:
    """The body for a bug: the log has the rest."""
    return _json("internal server error", "server_error", None, "internal_error")


def told(error: StoreError) -> FathomError:
    """The same of the store of calibrations, as a client is told it."""
    if isinstance(error, JobRunning):
        return Conflict(f"{error}; wait for it or cancel it", code="job_running")
    if isinstance(error, NoSuchJob):
        return NotFound(str(error), param="id")
    if isinstance(error, NoSuchVersion):
        return NotFound(str(error), param="version")
    return StoreUnavailable(f"the store of calibrations fails: {error}")


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception of `app` in OpenAI's shape."""
    app.add_exception_handler(FathomError, _on_fathom_error)
    app.add_exception_handler(StoreError, _on_store_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


async def _on_fathom_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FathomError)
    _tell_the_log(request, error.code or error.type)
    headers = {}
    if isinstance(error, Overloaded | RateLimited):
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return Response(error_json(error), error.status, headers, "application/json")


async def _on_store_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)
    return await _on_fathom_error(request, told(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Mostly an unknown path or a method that the path does not take."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    _tell_the_log(request, phrase.lower().replace(" ", "_"))
    body = _json(
        f"{request.method} {request.url.path}: {error.detail}",
        "invalid_request_error" if error.status_code < 500 else "server_error",
        None,
        phrase.lower().replace(" ", "_"),
    )
    headers = dict(error.headers or {})
    return Response(body, error.status_code, headers, "application/json")


async def _on_disconnect(request: Request, _: Exception) -> Response:
    _tell_the_log(request, "disconnect")
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_bug(request: Request, __: Exception) -> Response:
    """Sent outside of the app's own middleware, so it says itself what that adds."""
    headers = dict(HEADERS)
    if request_id := request.scope.get("state", {}).get("request_id"):
        headers["x-request-id"] = request_id
    return Response(internal_error_json(), 500, headers, "application/json")


def _tell_the_log(request: Request, code: str) -> None:
    exchange_of(request).error = code


def _json(message: str, type_: str, param: str | None, code: str | None) -> str:
    return json.dumps({"error": {"message": message, "type": type_, "param": param, "code": code}})
