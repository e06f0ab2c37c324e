"""The web application: the report's files at /, the API at /api/. Every error is JSON."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from sae.errors import PipelineError
from sae.serve import bodies
from sae.serve.bodies import Body, Generation, TextLatent, TextLatents, parse_body
from sae.serve.encode import Check, text_latent, text_latents
from sae.serve.generate import FORMULA, generate
from sae.serve.guard import Guard
from sae.serve.live import Live, LiveSAE
from sae.serve.refusals import Refused
from sae.serve.site import Site
from sae.serve.work import ClientGone, Work

logger = logging.getLogger(__name__)

LIVE_HEADER = "SAE-Live"
"""On the report's files: how the page finds out, without a request that fails, that there is an API beside it."""
BODY_SECONDS = 10.0
"""For a client to send its body."""


def make_app(site: Site, live: Live, work: Work, host: str) -> Starlette:
    """The application over one report.

    Args:
        host: what the server listens on; requests for other names are refused.
    """

    async def serve_file(request: Request) -> Response:
        answer = await site.respond(request)
        answer.headers[LIVE_HEADER] = "api"
        return answer

    async def info(_request: Request) -> Response:
        return JSONResponse(describe(live, work))

    def computed(kind: type[Body], call: Callable[[LiveSAE, Body, Check], dict[str, Any]]) -> Any:
        async def answer(request: Request) -> Response:
            asked = parse_body(kind, await _read_body(request))
            chosen = _choose(live, asked.sae)

            def work_and_encode(check: Check) -> bytes:
                return json.dumps(call(chosen, asked, check), ensure_ascii=False, allow_nan=False).encode()

            async def gone() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass

            found = await work.run(work_and_encode, gone)
            return Response(found, media_type="application/json", headers={"Cache-Control": "no-store"})

        return answer

    return Starlette(
        routes=[
            Mount(
                "/api",
                routes=[
                    Route("/info", info, methods=["GET"]),
                    Route("/latents", computed(TextLatents, text_latents), methods=["POST"]),
                    Route("/latent", computed(TextLatent, text_latent), methods=["POST"]),
                    Route("/generate", computed(Generation, generate), methods=["POST"]),
                ],
            ),
            Route("/{path:path}", serve_file, methods=["GET"]),
        ],
        middleware=[Middleware(Guard, host=host)],
        exception_handlers={
            Refused: _refused,
            HTTPException: _http_error,
            ClientGone: _nobody_listens,
            ClientDisconnect: _nobody_listens,
            PipelineError: _failed,
            Exception: _failed,
        },
    )


def describe(live: Live, work: Work) -> dict[str, Any]:
    """What can be done, with which model, within which limits."""
    saes: dict[str, dict[str, Any]] = {key: {"live": False, "why": why} for key, why in live.why_not.items()}
    for key, one in live.saes.items():
        saes[key] = {
            "live": True,
            "model": one.model_name,
            "hook_point": one.hook_point,
            "n_latents": one.sae.d_sae,
            "max_tokens": one.max_tokens,
            "generates": one.subject.causal,
        }
    return {
        "live": bool(live.saes),
        "saes": saes,
        "formula": FORMULA,
        "limits": {
            "body_bytes": bodies.MAX_BODY_BYTES,
            "top": bodies.MAX_TOP,
            "new_tokens": bodies.MAX_NEW_TOKENS,
            "interventions": bodies.MAX_INTERVENTIONS,
            "strength": bodies.MAX_STRENGTH,
            "waiting": work.max_waiting,
            "seconds": work.seconds,
        },
    }


def _choose(live: Live, key: str) -> LiveSAE:
    """Raises: Refused: 409 when nothing can be computed with that SAE, 404 when the report has none of that name."""
    if key in live.saes:
        return live.saes[key]
    if key in live.why_not:
        raise Refused(409, live.why_not[key], "body.sae", "The report's pages work without a model")
    known = ", ".join([*live.saes, *live.why_not])
    raise Refused(404, "the report has no such SAE", "body.sae", f"Choose one of {known}")


async def _read_body(request: Request) -> bytes:
    """Raises: Refused: 413 when it is too long, 415 when it is not said to be JSON, 408 when it does not come."""
    too_long = Refused(413, f"longer than {bodies.MAX_BODY_BYTES} bytes", "body", "Send a shorter text")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "not application/json", "Content-Type header", "Send JSON and say so")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > bodies.MAX_BODY_BYTES:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > bodies.MAX_BODY_BYTES:
                    raise too_long
    except TimeoutError as err:
        raise Refused(408, f"did not come within {BODY_SECONDS:g} s", "body", "Send it at once") from err
    return bytes(data)


def _refused(_request: Request, err: Exception) -> Response:
    assert isinstance(err, Refused)
    return JSONResponse(err.body, err.status, err.headers)


def _http_error(request: Request, err: Exception) -> Response:
    """Starlette's own: an unknown path, a wrong method."""
    assert isinstance(err, HTTPException)
    if err.status_code == 405:
        allowed = (err.headers or {}).get("Allow", "")
        refused = Refused(405, f"{request.method[:20]} is not allowed", "method", f"Use {allowed}")
    else:
        refused = Refused(err.status_code, err.detail, "path", "The calls are info, latents, latent and generate")
    return JSONResponse(refused.body, err.status_code, err.headers)


def _nobody_listens(_request: Request, _err: Exception) -> Response:
    return Response(status_code=499)  # as nginx says it; the client is gone


def _failed(request: Request, err: Exception) -> Response:
    """What nobody expected: the trace is for the terminal, not for the client."""
    logger.error("%s failed", request.url.path, exc_info=err)
    refused = Refused(500, "the server failed", "server", "Its terminal says why")
    return JSONResponse(refused.body, refused.status)
