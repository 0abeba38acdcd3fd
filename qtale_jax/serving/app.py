"""The routes of the server."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qtale_jax.serving.answers import Answers
from qtale_jax.serving.errors import APIError
from qtale_jax.serving.metrics import CONTENT_TYPE
from qtale_jax.serving.protocol import ChatBody, CompletionBody
from qtale_jax.serving.service import Service


def application(service: Service) -> Starlette:
    """The ASGI application that serves one model."""
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "qtale-jax"}
    card["context_length"] = service.engine.context

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != service.name:
            raise APIError(404, f"model: {name!r} is not here; allowed: {service.name!r}", code="model_not_found")
        return JSONResponse(card)

    async def health(_: Request) -> Response:
        status = "failed" if service.worker.failure else "shutting down" if service.draining else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    routes = [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", Answers(service, CompletionBody), methods=["POST"]),
        Route("/v1/chat/completions", Answers(service, ChatBody), methods=["POST"]),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers = {HTTPException: _http_error, APIError: _api_error, Exception: _bug}
    return Starlette(routes=routes, exception_handlers=handlers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: f"there is no {request.url.path}", 405: f"{request.method} is not allowed for {request.url.path}"}
    answer = APIError(error.status_code, text.get(error.status_code, error.detail)).response()
    answer.headers.update(error.headers or {})
    return answer


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error.response()


async def _bug(_: Request, __: Exception) -> Response:
    """For what nobody foresaw; Starlette raises it again, so that it is logged."""
    return APIError(500, "an internal error, which the server's log describes").response()
