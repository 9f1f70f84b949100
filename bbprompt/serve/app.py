"""The routes of a server: what it is, texts to keep, candidates to score, health, metrics.

| route | what |
|---|---|
| `GET /v1/info` | the model, as JSON; free |
| `PUT /v1/batches/{digest}` | keep these texts |
| `POST /v1/score` | score candidates on kept texts; 404 when they are gone |
| `GET /healthz` | 200 while the model is at work or after a forward that worked, else 503 |
| `GET /metrics` | counters for Prometheus |
| `GET /v1/openapi.json` | these routes, as OpenAPI describes them |

A refusal is JSON with `error` (a word for programs), `message` (a line for people) and `protocol`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse

from bbprompt import __version__
from bbprompt.errors import BBPromptError, DataError, OracleError
from bbprompt.oracle import Oracle
from bbprompt.serve.batches import Batches
from bbprompt.serve.guard import Guard, problem
from bbprompt.serve.metrics import Metrics
from bbprompt.serve.openapi import DIGEST, MESSAGE, Description, Health, Limits, body, document, refusals
from bbprompt.serve.scorer import Full, OtherRequest, Scorer
from bbprompt.serve.settings import ServeSettings
from bbprompt.wire import (
    CONTENT_TYPE,
    MOST_BATCH,
    PROTOCOL,
    OtherModel,
    WireError,
    check_model,
    decode_batch,
    decode_request,
)

__all__ = ["build_app", "routes"]

_log = logging.getLogger("bbprompt")


def routes(scorer: Scorer, settings: ServeSettings, metrics: Metrics) -> FastAPI:
    """The application without its guard.

    Args:
        scorer: The model.
        settings: What it allows.
        metrics: Where it counts.
    """
    info = scorer.info
    kept = Batches(settings.batches, settings.lease, settings.room)
    app = FastAPI(
        title="bbprompt serve",
        version=str(PROTOCOL),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def refuse(request: Request, error: Any) -> Response:  # an HTTPException of the router
        return _refusal(error.status_code, "route", error.detail, error.headers)

    @app.get("/v1/info", responses={200: {"model": Description}, **refusals()})
    async def describe() -> JSONResponse:
        limits = Limits(settings.points, settings.texts, settings.body)
        return JSONResponse(asdict(Description(PROTOCOL, __version__, info, limits)))

    @app.put(
        "/v1/batches/{digest}",
        status_code=201,
        response_class=Response,
        responses={201: {"description": "Kept."}, 204: {"description": "Kept already."}, **refusals(422)},
        openapi_extra=body(),
    )
    async def keep(digest: Annotated[str, Path(json_schema_extra=DIGEST)], request: Request) -> Response:
        if refused := _wrong_type(request):
            return refused
        if kept.get(digest) is not None:
            return Response(status_code=204)
        if int(request.headers.get("content-length", 0)) > MOST_BATCH:  # a number, or the guard had refused it
            return _refusal(413, "body", f"texts of at most {MOST_BATCH} bytes are taken at once")
        sent = await request.body()
        try:
            batch = decode_batch(sent, most=settings.texts)
        except WireError as error:
            return _refusal(400, "message", str(error))
        if batch.digest() != digest:
            return _refusal(422, "digest", "the texts are not those of this digest")
        kept.put(digest, batch, len(sent))
        metrics.batches.set(len(kept))
        return Response(status_code=201)

    @app.post(
        "/v1/score",
        response_class=Response,
        responses={200: {"content": MESSAGE}, **refusals(404, 409, 422, 500)},
        openapi_extra=body(),
    )
    async def score(request: Request) -> Response:
        if refused := _wrong_type(request):
            return refused
        try:
            asked = decode_request(await request.body(), layers=info.layers, dim=info.dim, most=settings.points)
            check_model(asked, info)
        except WireError as error:
            return _refusal(400, "message", str(error))
        except OtherModel as error:
            return _refusal(409, "model", str(error))
        batch = kept.get(asked.batch)
        metrics.batches.set(len(kept))
        if batch is None:
            return _refusal(404, "batch", "these texts are not kept here, or no longer; register them again")
        try:
            return Response(await scorer.score(asked, batch), media_type=CONTENT_TYPE)
        except OtherRequest as error:
            return _refusal(422, "call_id", str(error))
        except Full:
            return _refusal(503, "busy", f"{settings.at_once} requests wait for the model", {"Retry-After": "1"})
        except DataError as error:
            return _refusal(422, "data", str(error))
        except OracleError as error:
            return _refusal(422, "oracle", str(error))
        except BBPromptError as error:
            return _refusal(500, "failed", str(error))
        except Exception as error:  # one request must not take the server along; /healthz tells if the model is gone
            _log.exception("a request failed")
            return _refusal(500, "failed", f"the model failed ({type(error).__name__}); the server's log has more")

    @app.get("/healthz", responses={200: {"model": Health}, **refusals()})
    async def healthz() -> Response:
        return (
            JSONResponse(asdict(Health(ok=True)))
            if await scorer.healthy()
            else _refusal(503, "failed", "the model fails")
        )

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals()},
    )
    async def counters() -> Response:
        metrics.batches.set(len(kept))
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/openapi.json", include_in_schema=False)
    async def described() -> JSONResponse:
        return JSONResponse(document(app))

    return app


def build_app(oracle: Oracle, settings: ServeSettings) -> tuple[Guard, Scorer]:
    """An ASGI application that answers for `oracle`, and what is to be closed behind it."""
    metrics = Metrics()
    scorer = Scorer(oracle, settings, metrics)
    return Guard(routes(scorer, settings, metrics), settings, metrics), scorer


def _wrong_type(request: Request) -> Response | None:
    if request.headers.get("content-type") == CONTENT_TYPE:
        return None
    return _refusal(415, "type", f"content-type {CONTENT_TYPE} is expected")


def _refusal(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(problem(code, message), status, headers, media_type="application/json")
