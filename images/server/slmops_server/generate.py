"""POST /v1/chat/completions and /v1/completions: from the body to the last byte."""

import asyncio
import logging
import math
from dataclasses import dataclass, field, replace

from slmops_server import asgi, deadline
from slmops_server.choice import Choice
from slmops_server.errors import ApiError, too_late
from slmops_server.grammar import calls_grammar
from slmops_server.metrics import now
from slmops_server.queue_time import Work
from slmops_server.schema import Request, parse
from slmops_server.service import Service
from slmops_server.stream import Stream
from slmops_server.wire import Frames, error_frame

log = logging.getLogger(__name__)

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

SERVER_FAILED = (500, 503)  # whose fault a cut stream is: 504 is the end of the time that its client gave


class Watch:
    """What ends an answer early: the client that leaves, and its deadline. Either rings the answer's bell."""

    def __init__(self, receive: asgi.Receive, end: float, answer: Stream) -> None:
        """end: of CLOCK_MONOTONIC, in seconds."""
        self._answer, self._late = answer, False
        self._gone = asyncio.ensure_future(asgi.gone(receive))
        self._gone.add_done_callback(lambda _: answer.ring())
        self._timer = None
        if end < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, end - now()), self._end)

    def _end(self) -> None:
        self._late = True
        self._answer.ring()

    def check(self) -> None:
        """DisconnectedError when the client has left, ApiError 504 when its time is over."""
        if self._late:
            raise too_late("The time that the request was given has passed.")
        if self._gone.done():
            raise asgi.DisconnectedError

    def stop(self) -> None:
        """The answer is over."""
        self._gone.cancel()
        if self._timer is not None:
            self._timer.cancel()


@dataclass
class Record:
    """What a request came to, for its trace and the metrics."""

    kind: str
    arrival: float
    request: Request | None = None
    id: str = ""
    choices: list[Choice] = field(default_factory=list)
    error: Exception | None = None

    @property
    def error_type(self) -> str:
        """OpenTelemetry's word for the kind of error; "" if there is none."""
        if isinstance(self.error, ApiError):
            return self.error.code or str(self.error.status)
        if isinstance(self.error, asgi.DisconnectedError):
            return "client_left"
        return "internal_error" if self.error else ""

    @property
    def usage(self) -> tuple[int, int, int]:
        """Tokens of the prompts, of the answers that ended, and of the prompts, what was cached."""
        return _counts(self.choices)


class Generate:
    """The endpoint; kind is "chat" or "completions"."""

    def __init__(self, service: Service, kind: str) -> None:
        self._service, self._kind = service, kind

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """ApiError before the first byte, DisconnectedError when the client left: both are the caller's to tell."""
        record = Record(self._kind, now())
        try:
            await self._answer(scope, receive, send, record)
        except Exception as error:
            record.error = error
            raise
        finally:
            if record.error is not None:
                name = record.request.model if record.request else ""
                self._service.metrics.failed(self._kind, name, record.arrival, record.error_type)
            if self._service.traces:
                self._service.traces.ended(scope, record)

    async def _answer(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send, record: Record) -> None:
        arrival = record.arrival
        service = self._service
        end = arrival + deadline.seconds(scope)
        service.admit()
        settings = service.settings
        body = await asgi.read_body(scope, receive, settings.max_body_bytes, settings.receive_timeout)
        request = parse(self._kind, body)
        record.request = request
        service.check_room(max(1, len(request.prompts)) * request.n)  # before any work is done for them
        prompts = await service.prompts(request)
        limits = [service.limit(request, prompt) for prompt in prompts]
        wanted = [Work(len(p), limit) for p, limit in zip(prompts, limits, strict=True) for _ in range(request.n)]
        service.admit(wanted, end)  # others may have come in meanwhile
        answer = self._submit(request, prompts, limits)
        frames = Frames(self._kind, request.model, request.include_usage, request.continuous_usage)
        choices = [
            Choice(service, request, frames, number, prompts[number // request.n])
            for number in range(len(prompts) * request.n)
        ]
        record.id, record.choices = frames.id, choices
        watch = Watch(receive, end, answer)
        try:
            cut = await (self._stream if request.stream else self._whole)(send, answer, watch, frames, choices)
        except asgi.DisconnectedError:
            service.metrics.ended("abort")
            raise
        except ApiError:
            service.metrics.ended("error")
            raise
        finally:
            watch.stop()
            service.supervisor.cancel(answer)
        record.error = cut
        for choice in choices:
            if choice.last is not None:
                last, size = choice.last, len(choice.prompt)
                service.queue_time.note(
                    size - last.cached, last.tokens, last.first - last.started, last.last - last.first
                )
                service.metrics.finished(self._kind, request.model, last, arrival, size)
        if cut is None:
            lasts = [choice.last for choice in choices if choice.last is not None]
            service.metrics.answered(self._kind, request.model, arrival, lasts)
        service.metrics.asked(request.n, max(limits))

    def _submit(self, request: Request, prompts: list[list[int]], limits: list[int]) -> Stream:
        service, grammar, answer = self._service, request.grammar, None
        adapter = service.adapter(request.model)
        template = service.template_of(request)
        tools = service.tools_of(request)
        if tools and template and (grammar or tools.prescribed):
            grammar = calls_grammar(tools, template.tags_calls, service.special_tags, grammar)
        for number in range(len(prompts) * request.n):
            prompt = prompts[number // request.n]
            sampling = request.sampling
            # choices differ, and each is the same again under the request's seed; without one so do equal prompts
            if at := number % request.n if request.seeded else number:
                sampling = replace(sampling, seed=(sampling.seed + at) % (1 << 63))
            answer = service.supervisor.submit(
                prompt,
                limits[number // request.n],
                sampling,
                request.stop,
                request.ignore_eos,
                request.stream,
                grammar,
                request.echo and sampling.logprobs >= 0,
                answer,
                adapter,
                continues=self._kind == "completions",
            )
        assert answer is not None
        return answer

    async def _whole(
        self, send: asgi.Send, answer: Stream, watch: Watch, frames: Frames, choices: list[Choice]
    ) -> ApiError | None:
        made: dict[int, dict[str, object]] = {}
        while len(made) < len(choices):
            for delta in await answer.get(watch.check):
                made[delta.choice] = choices[delta.choice].whole(delta)
        await asgi.respond(send, 200, frames.whole([made[c.number] for c in choices], *_counts(choices)))
        return None

    async def _stream(
        self, send: asgi.Send, answer: Stream, watch: Watch, frames: Frames, choices: list[Choice]
    ) -> ApiError | None:
        """The error that cut it short, if one did."""
        arrived = await answer.get(watch.check)  # a failure before the first token is still a plain status
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
                return None
            try:
                arrived = await answer.get(watch.check)
            except ApiError as error:
                self._service.metrics.ended("error")
                if error.status in SERVER_FAILED:
                    self._service.metrics.cut()
                elif error.reason:
                    self._service.metrics.rejected(error.reason)
                log.warning("Cut a stream short reason=%s", error.code)
                await send({"type": "http.response.body", "body": error_frame(error.body()), "more_body": False})
                return error


def _counts(choices: list[Choice]) -> tuple[int, int, int]:
    """Tokens of the prompts, each counted once; of the answers; and of the prompts, what was cached."""
    done = [choice.last for choice in choices if choice.last is not None]
    prompts = {id(choice.prompt): len(choice.prompt) for choice in choices}
    first = {id(choice.prompt): choice.last.cached for choice in reversed(choices) if choice.last is not None}
    return sum(prompts.values()), sum(last.tokens for last in done), sum(first.values())
