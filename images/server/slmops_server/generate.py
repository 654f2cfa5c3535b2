"""POST /v1/chat/completions and /v1/completions: from the body to the last byte."""

import asyncio
import logging

from slmops_server import asgi
from slmops_server.errors import ApiError
from slmops_server.metrics import now
from slmops_server.schema import parse
from slmops_server.service import Service
from slmops_server.supervisor import Delta, Stream
from slmops_server.wire import Frames, error_frame

log = logging.getLogger(__name__)

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Generate:
    """The endpoint; kind is "chat" or "completions"."""

    def __init__(self, service: Service, kind: str) -> None:
        self._service, self._kind = service, kind

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """ApiError before the first byte, DisconnectedError when the client left: both are the caller's to tell."""
        arrival = now()
        service = self._service
        service.admit()
        request = parse(self._kind, await asgi.read_body(scope, receive, service.settings.max_body_bytes))
        prompt = await service.prompt(request)
        service.admit()  # others may have come in meanwhile
        answer = service.supervisor.submit(
            prompt,
            request.max_tokens or service.max_len - len(prompt),
            request.sampling,
            request.stop,
            request.ignore_eos,
            request.stream,
        )
        frames = Frames(self._kind, request.model, request.include_usage)
        watch = asyncio.ensure_future(asgi.gone(receive))
        try:
            if request.stream:
                last = await self._stream(send, answer, watch, frames, len(prompt))
            else:
                last = await self._whole(send, answer, watch, frames, len(prompt))
        except asgi.DisconnectedError:
            service.metrics.ended("abort")
            raise
        except ApiError:
            service.metrics.ended("error")
            raise
        finally:
            watch.cancel()
            service.supervisor.cancel(answer)
        if last is not None:
            service.took(last.last - arrival)
            service.metrics.finished(self._kind, last, arrival, len(prompt))

    async def _next(self, answer: Stream, watch: "asyncio.Future[None]") -> list[Delta]:
        """What has arrived; DisconnectedError when the client leaves first."""
        arrived = answer.poll()
        if arrived:
            return arrived
        got = asyncio.ensure_future(answer.get())
        try:
            await asyncio.wait((got, watch), return_when=asyncio.FIRST_COMPLETED)
            if got.done():
                return got.result()
            raise asgi.DisconnectedError
        finally:
            got.cancel()

    async def _whole(
        self, send: asgi.Send, answer: Stream, watch: "asyncio.Future[None]", frames: Frames, prompt: int
    ) -> Delta:
        last = (await self._next(answer, watch))[-1]
        await asgi.respond(send, 200, frames.whole(last.text, last.finish or "error", prompt, last.tokens, last.cached))
        return last

    async def _stream(
        self, send: asgi.Send, answer: Stream, watch: "asyncio.Future[None]", frames: Frames, prompt: int
    ) -> Delta | None:
        arrived = await self._next(answer, watch)  # a failure before the first token is still a plain status
        await send({"type": "http.response.start", "status": 200, "headers": list(SSE_HEADERS)})
        out = frames.role()
        while True:
            for delta in arrived:
                if delta.text:
                    out += frames.text(delta.text)
                if delta.finish:
                    out += frames.end(delta.finish, prompt, delta.tokens, delta.cached)
            last = arrived[-1]
            await send({"type": "http.response.body", "body": out, "more_body": last.finish is None})
            if last.finish:
                return last
            if watch.done():
                raise asgi.DisconnectedError
            out = b""
            try:
                arrived = await self._next(answer, watch)
            except ApiError as error:
                self._service.metrics.ended("error")
                log.warning("Cut a stream short reason=%s", error.code)
                await send({"type": "http.response.body", "body": error_frame(error.body()), "more_body": False})
                return None
