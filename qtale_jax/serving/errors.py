"""Errors in the form that OpenAI's API gives them."""

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from qtale_jax.config.catalogue import value_text
from qtale_jax.engine.requests import QueueFull, TooLong
from qtale_jax.errors import InputError


class APIError(Exception):
    """A request that is not answered: the status, and what its error object says."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, " ".join(message.split()), code, param

    @property
    def document(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response; clients are told to try again only where that may help."""
        headers = {}
        if self.status in (429, 503):
            headers["retry-after"] = "1"
        if self.status in (500, 504):
            headers["x-should-retry"] = "false"
        if self.status in (413, 503):
            headers["connection"] = "close"
        return JSONResponse(self.document, self.status, headers)


class Disconnected(Exception):
    """The client is gone; nobody waits for an answer."""


def shutting_down() -> APIError:
    """For requests that come, or are not done, when the server ends."""
    return APIError(503, "the server is shutting down", code="shutting_down")


def timed_out(seconds: float) -> APIError:
    """For requests that took too long."""
    return APIError(504, f"the request took longer than {seconds:g} seconds", code="timeout")


def failed() -> APIError:
    """For requests whose engine has failed; its log says how."""
    return APIError(500, "the engine has failed", code="engine_failed")


def of_engine(error: InputError) -> APIError:
    """What the engine refuses."""
    if isinstance(error, QueueFull):
        return APIError(429, str(error), code="queue_full")
    if isinstance(error, TooLong):
        return APIError(400, str(error), code="context_length_exceeded")
    return APIError(400, str(error))


def of_validation(error: ValidationError) -> APIError:
    """The first thing that is wrong with a request's body."""
    first: dict[str, Any] = dict(error.errors(include_url=False)[0])
    names = [str(part) for part in first["loc"]]
    key = names[0] if names else None
    kind = first["type"]
    if kind == "json_invalid":
        return APIError(400, f"the body is not valid JSON: {first['ctx']['error']}")
    if kind == "extra_forbidden":
        return APIError(400, f"{'.'.join(names)}: unknown key", code="unknown_parameter", param=key)
    if kind == "missing":
        return APIError(400, f"{'.'.join(names)}: missing", code="missing_required_parameter", param=key)
    if kind == "value_error":
        return APIError(400, str(first["ctx"]["error"]), param=key)
    if key is None:
        return APIError(400, f"the body: {first['msg'].lower()}")
    return APIError(400, f"{key}: found {value_text(first['input'])}; {first['msg'].lower()}", param=key)
