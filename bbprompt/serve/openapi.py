"""What the routes of a server take and answer, as OpenAPI says it: for those who write clients, and for tests.

The document is at `/v1/openapi.json`, behind the token as every other route. There is no page that shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from bbprompt.oracle import OracleInfo
from bbprompt.wire import CONTENT_TYPE

__all__ = ["DIGEST", "MESSAGE", "Description", "Health", "Limits", "Refusal", "body", "document", "refusals"]

#: A parameter that is a SHA-256.
DIGEST: dict[str, Any] = {"pattern": "^[0-9a-f]{64}$"}
#: A message of `bbprompt.wire`.
MESSAGE: dict[str, Any] = {CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}}

#: What the guard in front of every route, or the router, may answer to any request.
_EVERYWHERE = (400, 401, 405, 408, 413, 415, 431, 503)
_SAYS = {
    400: "The request is malformed, or its message is.",
    401: "The token is missing or wrong.",
    404: "Nothing is there, or the texts are not kept (any longer).",
    405: "The route has no such method.",
    408: "The request did not arrive in time.",
    409: "The server holds another model, other prompts, or the same with other settings or versions.",
    413: "The body is too large.",
    415: "The body is of another type, compressed or chunked.",
    422: "The message is sound, and what it asks for cannot be done.",
    431: "The headers are too large.",
    500: "The model failed.",
    503: "Too much is asked of the server at once, it took too long, or the model fails.",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may bring: candidates, texts, bytes."""

    points: int
    texts: int
    body: int


@dataclass(frozen=True, slots=True)
class Description:
    """What a server says of itself."""

    protocol: int
    version: str
    model: OracleInfo
    limits: Limits


@dataclass(frozen=True, slots=True)
class Health:
    """The model answers."""

    ok: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """Every answer that is none: a word for programs and a line for people."""

    error: str
    message: str
    protocol: int


def document(app: FastAPI) -> dict[str, Any]:
    """The document of an application, all of whose routes want the token."""
    said = app.openapi()
    said["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return said | {"security": [{"token": []}]}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route: these and those of every route."""
    return {status: {"model": Refusal, "description": _SAYS[status]} for status in sorted({*_EVERYWHERE, *statuses})}


def body() -> dict[str, Any]:
    """That a route takes a message."""
    return {"requestBody": {"required": True, "content": MESSAGE}}
