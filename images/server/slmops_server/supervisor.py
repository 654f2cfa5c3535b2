"""The front's side of the engine process: starts it, feeds it, hears it, and outlives it."""

import asyncio
import contextlib
import itertools
import logging
import math
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import orjson

from slmops_server.engines.base import Sampling
from slmops_server.engines.choose import EngineOptions
from slmops_server.errors import ApiError, bad_request, come_again, format_failed, internal, overloaded, unavailable
from slmops_server.grammar import Grammar
from slmops_server.queue_time import Work
from slmops_server.stream import Delta, Stream

log = logging.getLogger(__name__)

BACKOFF = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before the n-th restart in a row
STEADY = 30.0  # an engine that ran this long has earned a fresh count
GIVE_UP = 5  # engine processes in a row that were of no use, after which the server ends and says why
BEAT = 1.0  # seconds between pings
RELOAD = 300.0  # seconds that loading or warming may take after the first time, or SLOWER times what it took then
SLOWER = 10
UNCROWDED = 10  # seconds after which grammars that are being compiled have been, or were given up


class Adapter(NamedTuple):
    """One that the engine holds: its folder, and when it was loaded, in seconds since the epoch."""

    folder: Path
    created: int


class _Load(NamedTuple):
    name: str
    folder: Path
    told: asyncio.Future[str | None]  # what is wrong with the adapter


class _Job(NamedTuple):
    stream: Stream
    work: Work
    adapter: str


class _Lines(asyncio.Protocol):
    """Cuts the socket's bytes into JSON messages."""

    def __init__(self, take: Callable[[dict[str, Any]], None]) -> None:
        self._take, self._rest = take, b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(orjson.loads(line))


class Supervisor:
    """Keeps one engine process alive.

    `phase` is starting, loading, warming, ready, stuck (silent for too long, told to end, and not yet gone),
    restarting or failed.
    """

    def __init__(self, model: Path, options: EngineOptions, log_level: str, step_timeout: float) -> None:
        self.phase = "starting"
        self.problem = ""  # the last failure, in words
        self.info: dict[str, Any] = {}
        self.restarts = 0
        self.pid: int | None = None
        self.on_restart: Callable[[], None] = lambda: None
        self.failed = asyncio.Event()
        self.was_ready = asyncio.Event()
        self._model, self._options, self._log_level = model, options, log_level
        self.adapters = {name: Adapter(Path(folder), int(time.time())) for name, folder in options.adapters}
        self._required = set(self.adapters)  # those without which the engine is not to start
        self._loading: dict[int, _Load] = {}
        self._step_timeout = step_timeout
        self._numbers = itertools.count(1)
        self.steps: dict[str, float] = {}  # what the engine process last told about its steps
        self._jobs: dict[int, _Job] = {}  # in order of arrival, which is the order in which they get slots
        self._transport: asyncio.WriteTransport | None = None
        self._unheard = 0  # pings sent since the engine process last said anything
        self._unready = 0  # starts in a row that did not come to be ready
        self._useless: set[int] = set()  # processes, by number, that were asked for answers since a step last ended
        self._reason = ""  # why this life of the engine process ends, if anything was told or seen
        self._begun = 0.0  # when this life of the engine process began, or the last one ended
        self._took = 0.0  # seconds from there until it was ready, the last time that it was
        self._closing = False

    @property
    def ready(self) -> bool:
        """Loaded, warmed and listening."""
        return self.phase == "ready"

    def not_ready(self) -> ApiError:
        """503, until about when it should be, by the last start."""
        left = self._took - (time.monotonic() - self._begun)
        return unavailable(f"The model is not ready ({self.phase}).", "not_ready", come_again(left))

    @property
    def slots(self) -> int:
        """Answers that can run at the same time."""
        return int(self.info.get("slots", 1))

    @property
    def active(self) -> int:
        """Answers that run or wait for a slot."""
        return len(self._jobs)

    def work(self) -> tuple[list[Work], list[Work]]:
        """Of the answers that run, and of those that wait."""
        jobs = [job.work for job in self._jobs.values()]
        return jobs[: self.slots], jobs[self.slots :]

    @property
    def takes_adapters(self) -> bool:
        """Whether there are adapters, or may be."""
        return self._options.wants_adapters

    def adapters_at_work(self) -> tuple[set[str], set[str]]:
        """Of the answers that run, and of those that wait."""
        names = [job.adapter for job in self._jobs.values()]
        return set(names[: self.slots]) - {""}, set(names[self.slots :]) - {""}

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...],
        ignore_eos: bool,
        stream: bool,
        grammar: Grammar | None = None,
        score_prompt: bool = False,
        into: Stream | None = None,
        adapter: str = "",
        continues: bool = False,
    ) -> Stream:
        """Hand a request to the engine; `into`: as one more choice of an answer. ApiError 503 when there is none.

        `adapter`: one of `adapters`, or "" for the base. `continues`: the answer goes on with the prompt's text.
        """
        if not self.ready:
            raise self.not_ready()
        answer = into or Stream(grammar.param if grammar else None)
        number = next(self._numbers)
        answer.numbers[number] = len(answer.numbers)
        self._useless.add(self.restarts)
        self._jobs[number] = _Job(answer, Work(len(prompt), max_tokens), adapter)
        self._send(
            {
                "op": "run",
                "id": number,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "sampling": sampling,  # orjson knows dataclasses
                "stop": stop,
                "ignore_eos": ignore_eos,
                "stream": stream,
                "grammar": None if grammar is None else (grammar.kind, grammar.text),
                "score_prompt": score_prompt,
                "adapter": adapter,
                "continues": continues,
            }
        )
        return answer

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Have the engine read an adapter and give it the name. ApiError 400 when it does not fit, 503.

        Cancelled, it is read all the same, and has its name when it is.
        """
        if not self.ready:
            raise self.not_ready()
        number = next(self._numbers)
        self._loading[number] = load = _Load(name, folder, asyncio.get_running_loop().create_future())
        self._send({"op": "load", "id": number, "name": name, "path": str(folder)})
        problem = await load.told
        if problem is not None:
            raise bad_request(f"The adapter cannot be used: {problem}.", "lora_path", "invalid_adapter")

    def unload_adapter(self, name: str) -> None:
        """Forget the name; answers that run or wait keep the adapter. ApiError 503."""
        if not self.ready:
            raise self.not_ready()
        del self.adapters[name]
        self._required.discard(name)
        self._send({"op": "unload", "name": name})

    def cancel(self, answer: Stream) -> None:
        """Stop generating; harmless when it is over."""
        for number in answer.numbers:
            if self._jobs.pop(number, None) is not None:
                self._send({"op": "cancel", "id": number})

    async def run(self) -> None:
        """Start the engine and start it again whenever it ends, until closed or given up (`failed` is set)."""
        in_a_row = 0
        while not self._closing:
            begin = time.monotonic()
            code: int | None = None
            self._unready += 1
            self._reason = ""
            try:
                code = await self._once()
            except OSError as error:
                self._reason = f"the engine process cannot be started: {error.strerror or error}"
            if self._closing:
                return
            self.problem = self._reason or f"the engine process ended with code {code}"
            in_a_row = 1 if time.monotonic() - begin > STEADY else in_a_row + 1
            log.error("Engine process ended code=%s phase=%s problem=%s", code, self.phase, self.problem)
            if len(self._useless) >= GIVE_UP:
                self.problem += f"; the last {GIVE_UP} that were asked made no step"
            if max(self._unready, len(self._useless)) >= GIVE_UP:
                self.phase = "failed"
                self.failed.set()
                return
            self.restarts += 1
            self.on_restart()
            self.phase = "restarting"
            await asyncio.sleep(BACKOFF[min(in_a_row, len(BACKOFF)) - 1])

    async def _once(self) -> int:
        """One life of the engine process; its exit code (negative: the signal that ended it). OSError: it has none."""
        self._begun = time.monotonic()
        process, ours = await _start_process()
        self.pid = process.pid
        self._unheard = 0
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: _Lines(self._take), sock=ours)
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's class does not derive from it
        # not as an argument: the names and folders of adapters may be more than one can hold
        options = asdict(self._options_now())
        self._send({"model": str(self._model), "log_level": self._log_level, "options": options})
        beat = asyncio.create_task(self._beat(process))
        try:
            return await process.wait()
        finally:
            beat.cancel()
            self.pid = None
            self._transport = None
            transport.close()
            if process.returncode is None:  # we are cancelled: the closed socket ends it, else the signal does
                with contextlib.suppress(ProcessLookupError, TimeoutError):
                    await asyncio.wait_for(process.wait(), 2)
                if process.returncode is None:
                    process.kill()
            self._begun = time.monotonic()
            again = come_again(self._took)
            lost, self._jobs = self._jobs, {}
            self.steps = {}
            for job in lost.values():
                told = unavailable("The engine ended in mid-request; send it again.", "engine_restarted", again)
                job.stream.put(told)
            unread, self._loading = self._loading, {}
            for load in unread.values():
                if not load.told.done():
                    told = unavailable("The engine ended; send it again.", "engine_restarted", again)
                    load.told.set_exception(told)

    def _options_now(self) -> EngineOptions:
        """Those of the start, with the adapters that came and went since."""
        folders = [(name, str(adapter.folder)) for name, adapter in self.adapters.items()]
        required = [one for one in folders if one[0] in self._required]
        loaded = None if self._options.loaded is None else [one for one in folders if one[0] not in self._required]
        return replace(self._options, adapters=required, loaded=loaded)

    async def close(self) -> None:
        """Let the engine process end."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    async def _beat(self, process: asyncio.subprocess.Process) -> None:
        """Ping, and end a process that leaves too many unanswered: their number, as time passes in a frozen pod too."""
        for number in itertools.count():
            await asyncio.sleep(BEAT)
            if self._unheard * BEAT > (patience := self._patience):
                break
            self._send({"op": "ping", "n": number})
            self._unheard += 1
        self.problem = self._reason = f"the engine process said nothing for {patience:g} seconds while {self.phase}"
        self.phase = "stuck"
        log.error("Killed the engine process problem=%s", self.problem)
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    @property
    def _patience(self) -> float:
        """Seconds that the process may be silent. How long a first load may take, the startup probe decides."""
        if self.ready:
            return self._step_timeout
        if not self.was_ready.is_set():
            return math.inf
        return max(RELOAD, SLOWER * float(self.info["load_seconds"]), SLOWER * float(self.info["warm_seconds"]))

    def _send(self, message: dict[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(orjson.dumps(message) + b"\n")

    def _take(self, message: dict[str, Any]) -> None:
        self._unheard = 0
        if events := message.get("ev"):
            for event in events:
                self._deliver(*event)
        elif "phase" in message:
            self.phase = message["phase"]
        elif "ready" in message:
            self.info, self.phase, self.problem, self._unready = message["ready"], "ready", "", 0
            self._took = time.monotonic() - self._begun
            self.adapters = {name: self.adapters[name] for name in message["adapters"]}
            self.was_ready.set()
        elif "loaded" in message:
            self._loaded(self._loading.pop(message["loaded"]), message["problem"])
        elif "pong" in message:
            if message["steps"]["count"] > self.steps.get("count", 0):
                self._useless.clear()
            self.steps = message["steps"]
        elif "fatal" in message:
            self._reason = message["fatal"]

    def _loaded(self, load: _Load, problem: str | None) -> None:
        if problem is None:
            self.adapters[load.name] = Adapter(load.folder, int(time.time()))
            self._required.discard(load.name)
        if not load.told.done():
            load.told.set_result(problem)
        else:  # cancelled meanwhile
            log.info("Read an adapter late name=%r folder=%s problem=%s", load.name, load.folder, problem or "none")

    def _deliver(
        self, number: int, text: str, tokens: int, finish: str | None, times: list[Any] | None, scores: Any
    ) -> None:
        if finish not in ("error", "refused", "crowded"):
            self._useless.clear()
        job = self._jobs.get(number)
        if job is None:  # cancelled while this was on its way
            return
        stream = job.stream
        choice = stream.numbers[number]
        if finish is None or times is None:
            stream.put(Delta(text, tokens, scores=scores, choice=choice))
            return
        del self._jobs[number]
        if finish == "error":
            stream.put(format_failed(text) if text else internal())
        elif finish == "refused":
            stream.put(bad_request(f"The grammar cannot be used: {text}", stream.grammar_param, "invalid_grammar"))
        elif finish == "crowded":
            stream.put(overloaded(f"{text} Try again in {UNCROWDED} seconds.", "grammars", UNCROWDED))
        else:
            started, first, last, gaps, cached = times
            stream.put(Delta(text, tokens, finish, started, first, last, tuple(gaps), cached, scores, choice))


async def _start_process() -> tuple[asyncio.subprocess.Process, socket.socket]:
    """A new engine process, and the socket to talk to it. OSError."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        try:
            # as its standard input: the number that it has here is too high for select beside many connections
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "slmops_server.worker", stdin=theirs.fileno()
            )
        except OSError:
            ours.close()
            raise
    return process, ours
