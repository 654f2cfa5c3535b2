"""POST /v1/chat/completions and /v1/completions: from the body to the last byte."""

import asyncio
import logging
from dataclasses import replace

from slmops_server import asgi
from slmops_server.choice import Choice
from slmops_server.errors import ApiError
from slmops_server.grammar import calls_grammar
from slmops_server.metrics import now
from slmops_server.schema import Request, parse
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
        prompts = await service.prompts(request)
        service.admit(len(prompts) * request.n)  # others may have come in meanwhile
        answer = self._submit(request, prompts)
        frames = Frames(self._kind, request.model, request.include_usage)
        choices = [
            Choice(service, request, frames, number, prompts[number // request.n])
            for number in range(len(prompts) * request.n)
        ]
        watch = asyncio.ensure_future(asgi.gone(receive))
        try:
            await (self._stream if request.stream else self._whole)(send, answer, watch, frames, choices)
        except asgi.DisconnectedError:
            service.metrics.ended("abort")
            raise
        except ApiError:
            service.metrics.ended("error")
            raise
        finally:
            watch.cancel()
            service.supervisor.cancel(answer)
        for choice in choices:
            if choice.last is not None:
                service.took(choice.last.last - arrival)
                service.metrics.finished(self._kind, choice.last, arrival, len(choice.prompt))

    def _submit(self, request: Request, prompts: list[list[int]]) -> Stream:
        service, grammar, answer = self._service, request.grammar, None
        if request.tools and request.tools.forced and service.template:
            grammar = calls_grammar(request.tools, service.template.tags_calls)
        for number in range(len(prompts) * request.n):
            prompt = prompts[number // request.n]
            sampling = request.sampling
            if number:  # choices differ, and each is the same again under the request's seed
                sampling = replace(sampling, seed=(sampling.seed + number % request.n) % (1 << 63))
            answer = service.supervisor.submit(
                prompt,
                request.max_tokens or service.max_len - len(prompt),
                sampling,
                request.stop,
                request.ignore_eos,
                request.stream,
                grammar,
                request.echo and sampling.logprobs >= 0,
                answer,
            )
        assert answer is not None
        return answer

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
        self, send: asgi.Send, answer: Stream, watch: "asyncio.Future[None]", frames: Frames, choices: list[Choice]
    ) -> None:
        made: dict[int, dict[str, object]] = {}
        while len(made) < len(choices):
            for delta in await self._next(answer, watch):
                made[delta.choice] = choices[delta.choice].whole(delta)
        await asgi.respond(send, 200, frames.whole([made[c.number] for c in choices], *_counts(choices)))

    async def _stream(
        self, send: asgi.Send, answer: Stream, watch: "asyncio.Future[None]", frames: Frames, choices: list[Choice]
    ) -> None:
        arrived = await self._next(answer, watch)  # a failure before the first token is still a plain status
        await send({"type": "http.response.start", "status": 200, "headers": list(SSE_HEADERS)})
        left = len(choices)
        while True:
            out = b""
            for delta in arrived:
                out += choices[delta.choice].frames(delta)
                left -= delta.finish is not None
            if not left:
                out += frames.end(*_counts(choices))
            await send({"type": "http.response.body", "body": out, "more_body": left > 0})
            if not left:
                return
            if watch.done():
                raise asgi.DisconnectedError
            try:
                arrived = await self._next(answer, watch)
            except ApiError as error:
                self._service.metrics.ended("error")
                log.warning("Cut a stream short reason=%s", error.code)
                await send({"type": "http.response.body", "body": error_frame(error.body()), "more_body": False})
                return


def _counts(choices: list[Choice]) -> tuple[int, int, int]:
    """Tokens of the prompts, each counted once; of the answers; and of the prompts, what was cached."""
    done = [choice.last for choice in choices if choice.last is not None]
    prompts = {id(choice.prompt): len(choice.prompt) for choice in choices}
    first = {id(choice.prompt): choice.last.cached for choice in reversed(choices) if choice.last is not None}
    return sum(prompts.values()), sum(last.tokens for last in done), sum(first.values())
