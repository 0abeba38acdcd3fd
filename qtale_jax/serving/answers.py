"""One completion request, from its bytes to its last event: an ASGI application for each kind."""

import asyncio
import json
import time
from collections.abc import Awaitable, Sequence

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from qtale_jax.engine.requests import Completion
from qtale_jax.errors import InputError, nearest
from qtale_jax.serving import errors
from qtale_jax.serving.errors import APIError, Disconnected
from qtale_jax.serving.forms import DONE, Form, event
from qtale_jax.serving.protocol import Body, ChatBody
from qtale_jax.serving.service import Service
from qtale_jax.serving.worker import Ticket


class Answers:
    """Answers requests of one kind."""

    def __init__(self, service: Service, body: type[Body]):
        self._service, self._body = service, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, within the time that it may take; nothing is sent to clients that are gone."""
        service, reply = self._service, _Reply(send, self._service)
        try:
            with service.open():
                async with asyncio.timeout(service.timeout):
                    await self._answer(scope, receive, reply)
        except (Disconnected, ClientDisconnect):
            service.metrics.responses.labels("disconnected").inc()
        except TimeoutError:
            await reply.refuse(errors.timed_out(service.timeout), scope, receive)
        except APIError as error:
            await reply.refuse(error, scope, receive)

    async def _answer(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        service = self._service
        body = _parsed(self._body, await _read(Request(scope, receive), service.max_body_bytes))
        if body.model != service.name:
            hint = nearest(body.model, [service.name])
            raise APIError(
                404,
                f"model: {body.model!r} is not here{hint}; allowed: {service.name!r}",
                code="model_not_found",
                param="model",
            )
        try:
            # Encoding a long prompt takes a while: the event loop does not wait for it.
            prompts = await asyncio.to_thread(body.prompts, service.engine, service.chat_template)
            options = [body.options(len(ids), service.engine.context, service.max_new_tokens) for ids in prompts]
            tickets = service.submit(prompts, options)
        except InputError as error:
            raise errors.of_engine(error) from error
        form = Form.new(service.name, chat=self._body is ChatBody)
        try:
            work = self._stream(reply, form, body, tickets) if body.stream else self._whole(reply, form, tickets)
            await _while_connected(receive, work)
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def _whole(self, reply: "_Reply", form: Form, tickets: Sequence[Ticket]) -> None:
        completions = [await self._finished(ticket, reply) for ticket in tickets]
        await reply.whole(form.whole(completions))

    async def _finished(self, ticket: Ticket, reply: "_Reply") -> Completion:
        completion = None
        async for update in ticket:
            reply.has_text()
            completion = update.completion
        return _complete(completion)

    async def _stream(self, reply: "_Reply", form: Form, body: Body, tickets: Sequence[Ticket]) -> None:
        await reply.start()
        if form.chat:
            await reply.send(form.piece(0, "", first=True))

        async def choice(index: int, ticket: Ticket) -> Completion:
            completion = None
            async for update in ticket:
                reply.has_text()
                if update.text:
                    await reply.send(form.piece(index, update.text))
                completion = update.completion
            completion = _complete(completion)
            await reply.send(form.piece(index, "", completion.finish_reason))
            return completion

        completions = await _all(choice(index, ticket) for index, ticket in enumerate(tickets))
        if body.stream_options is not None and body.stream_options.include_usage:
            await reply.send(form.usage(completions))
        await reply.send(DONE)
        await reply.end()


class _Reply:
    """What is sent to one client."""

    def __init__(self, send: Send, service: Service):
        self._send, self._metrics = send, service.metrics
        self._since = time.perf_counter()
        self._started = self._has_text = False

    def has_text(self) -> None:
        """Notes the time of the first text."""
        if not self._has_text:
            self._has_text = True
            self._metrics.first_token.observe(time.perf_counter() - self._since)

    async def start(self, kind: bytes = b"text/event-stream; charset=utf-8", length: int | None = None) -> None:
        """Sends status 200 and the headers."""
        headers = [(b"content-type", kind), (b"cache-control", b"no-cache")]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        self._started = True
        await self._sent({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(self, part: bytes) -> None:
        """Sends a part of the body."""
        await self._sent({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        """Ends the body of an answer that succeeded."""
        await self._sent({"type": "http.response.body", "body": b"", "more_body": False})
        self._metrics.duration.observe(time.perf_counter() - self._since)
        self._metrics.responses.labels("200").inc()

    async def whole(self, document: dict) -> None:
        """Sends a JSON document."""
        content = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        await self.start(b"application/json", len(content))
        await self.send(content)
        await self.end()

    async def refuse(self, error: APIError, scope: Scope, receive: Receive) -> None:
        """Sends an error: as the answer, or as the last event of one that has begun."""
        self._metrics.responses.labels(str(error.status)).inc()
        try:
            if self._started:
                await self.send(event(error.document))
                await self._sent({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await error.response()(scope, receive, self._send)
        except (Disconnected, OSError):
            pass  # nobody is there to read it

    async def _sent(self, message: dict) -> None:
        try:
            await self._send(message)
        except OSError as error:
            raise Disconnected from error


def _complete(completion: Completion | None) -> Completion:
    """The completion, if it came to its own end.

    Raises:
        APIError: the server ended it.
    """
    if completion is None or completion.finish_reason == "failed":
        raise errors.failed()
    if completion.finish_reason == "cancelled":
        raise errors.shutting_down()
    return completion


def _parsed(body: type[Body], content: bytes) -> Body:
    try:
        return body.model_validate_json(content)
    except ValidationError as error:
        raise errors.of_validation(error) from error


async def _read(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise APIError(413, f"the body has more than {most} bytes, which are allowed", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


async def _all(work) -> list:
    """Results of several coroutines that run side by side; the first exception ends the others and is raised bare."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Does the work, unless the client goes before it is done.

    Raises:
        Disconnected: it went.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        raise Disconnected

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        done, _ = await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        await (working if working in done else watching)
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
