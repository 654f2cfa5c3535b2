"""The engine process: one thread that owns the model, drives the engine and turns tokens into text.

It talks to the front over one inherited socket, its standard input, a JSON object per line. In: once
{"model": path, "log_level": text, "options": {...}}, then {"op": "run"|"cancel"|"ping"|"load"|"unload", ...}. Out:
{"phase": ...}, {"ready": {...}, "adapters": [name, ...]}, {"fatal": text}, {"pong": n, "steps": {...}},
{"loaded": n, "problem": text or null}, {"ev": [[job, text, tokens, finish, times, scores], ...]};
`times` comes with `finish` only: when the job got its slot, its first and its last token in seconds of CLOCK_MONOTONIC
(one clock for all processes of a machine), the gaps between tokens in microseconds, and the prompt tokens that were
taken from the cache. `finish` is one of the engine's, or "refused": the grammar is at fault, text says why, or
"crowded": too many others are being compiled.
"""

import logging
import os
import select
import signal
import socket
import time
from bisect import bisect_left
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from slmops_server import model_folder
from slmops_server.compiling import Compiler, CrowdedError
from slmops_server.detok import DetokenizerFactory, StopScanner
from slmops_server.engines import choose as engines
from slmops_server.engines.adapters import BadAdapterError
from slmops_server.engines.base import STEP_SIZES, Engine, EngineRefusedError, Job, Sampling, Scores
from slmops_server.guide import BadGrammarError, Guides, MatcherGuide

log = logging.getLogger("slmops_server.engine")
WARM_UP = "Hello"
LISTEN_EVERY = 0.0005  # seconds
NO_TIMES = [0.0, 0.0, 0.0, [], 0]


class Channel:
    """Lines of JSON over the inherited socket; reading never blocks unless asked to."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._rest = sock, b""
        self._come: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        """Blocks only while the front does not read. OSError when it is gone."""
        self._sock.sendall(orjson.dumps(message) + b"\n")

    def receive(self, or_until: socket.socket | None) -> list[dict[str, Any]]:
        """Messages that have come; waits for one, or until the other socket is readable, if there is another.

        EOFError when the front is gone.
        """
        if or_until is not None and not self._come:
            select.select([self._sock, or_until], [], [])
        while select.select([self._sock], [], [], 0)[0]:
            self._read()
        come, self._come = self._come, []
        return come

    def first(self) -> dict[str, Any]:
        """The first message, waited for. EOFError when the front is gone."""
        while not self._come:
            self._read()
        return self._come.pop(0)

    def _read(self) -> None:
        data = self._sock.recv(1 << 16)
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._come.extend(orjson.loads(line) for line in lines)


class Answer:
    """The text side of one job."""

    __slots__ = (
        "cached",
        "count",
        "detok",
        "first",
        "gaps",
        "guide",
        "last",
        "least",
        "pending",
        "prompt",
        "scores",
        "scores_prompt",
        "started",
        "stop",
        "stream",
    )

    def __init__(self, factory: DetokenizerFactory, message: dict[str, Any], guide: MatcherGuide | None) -> None:
        """message: the job as the front asked for it."""
        self.detok = factory.new(message["prompt"] if message["continues"] else ())
        self.stop, self.stream, self.guide = StopScanner(message["stop"]), message["stream"], guide
        self.least = message["sampling"]["min_tokens"]  # stop strings that end before do not count
        self.prompt = len(message["prompt"])
        self.scores_prompt = message["score_prompt"]
        self.pending = ""
        self.scores: tuple[list[Any], list[Any]] = ([], [])  # of the prompt, of the answer; not yet sent
        self.cached = self.count = 0
        self.started = self.first = self.last = 0.0
        self.gaps: list[int] = []

    def told(self) -> tuple[list[Any], list[Any]] | None:
        """The scores not yet sent."""
        if not any(self.scores):
            return None
        told, self.scores = self.scores, ([], [])
        return told

    def tick(self, now: float) -> None:
        """Note the time of a token."""
        self.count += 1
        if self.first:
            self.gaps.append(int((now - self.last) * 1e6))
        else:
            self.first = now
        self.last = now


class Worker:
    """The loop of the engine process."""

    def __init__(self, engine: Engine, factory: DetokenizerFactory, guides: Guides, channel: Channel) -> None:
        self._engine, self._factory, self._channel = engine, factory, channel
        self._compiler = Compiler(guides)
        self._compiled: dict[int, dict[str, Any]] = {}  # messages whose grammar is being compiled
        self._loader = ThreadPoolExecutor(1, "adapter")  # one at a time: each counts the memory of those before it
        self._loading: dict[int, Future[None]] = {}
        self._answers: dict[int, Answer] = {}  # of the jobs that the engine has
        self._unstarted: dict[int, Answer] = {}  # those of them that wait for a slot, in order of arrival
        self._steps, self._step_seconds, self._step_tokens = 0, 0.0, 0
        self._sizes, self._sized = [0] * (len(STEP_SIZES) + 1), 0  # steps by their tokens, and all of these

    def run(self) -> None:
        """Until the front is gone."""
        listened = 0.0
        while True:
            busy = self._engine.busy
            # a tiny model's step is shorter than a system call is cheap: look for mail once in a while only
            if not busy or time.monotonic() - listened > LISTEN_EVERY:
                for message in self._channel.receive(None if busy else self._compiler.wake):
                    self._take(message)
                self._take_compiled()  # whatever waits: only this silences the bell that ends the wait
                self._tell_loaded()
                listened = time.monotonic()
            if self._engine.busy:
                self.step()

    def _take(self, message: dict[str, Any]) -> None:
        match message["op"]:
            case "run":
                self._start(message)
            case "cancel":
                number = message["id"]
                self._engine.cancel(number)
                self._answers.pop(number, None)
                self._unstarted.pop(number, None)
                if self._compiled.pop(number, None):
                    self._compiler.cancel(number)
            case "load":
                self._load(message)
            case "unload":
                self._engine.adapters.unload(message["name"])
            case "ping":
                self._channel.send({"pong": message["n"], "steps": self.steps()})

    def _load(self, message: dict[str, Any]) -> None:
        """Beside the loop: the volume may be slow."""
        load = self._loader.submit(self._engine.adapters.load, message["name"], Path(message["path"]))
        self._loading[message["id"]] = load
        load.add_done_callback(self._compiler.ring)

    def _tell_loaded(self) -> None:
        for number in [number for number, load in self._loading.items() if load.done()]:
            problem = None
            try:
                self._loading.pop(number).result()
            except BadAdapterError as error:
                problem = str(error)
            self._channel.send({"loaded": number, "problem": problem})

    def steps(self) -> dict[str, float]:
        """What the front cannot know: steps so far, their seconds and tokens, what was guessed; tokens in the cache."""
        drafted = self._engine.drafted
        started = [answer for number, answer in self._answers.items() if number not in self._unstarted]
        return {
            "count": self._steps,
            "seconds": self._step_seconds,
            "tokens": self._step_tokens,
            "sized": self._sized,
            **{f"size_{number}": count for number, count in enumerate(self._sizes)},
            "held": sum(answer.prompt + answer.count for answer in started),
            "drafts": drafted.calls,
            "draft_tokens": drafted.tokens,
            "accepted_tokens": drafted.accepted,
        }

    def _start(self, message: dict[str, Any]) -> None:
        number, grammar = message["id"], message["grammar"]
        message["adapter"] = self._engine.adapters.get(message["adapter"])  # now: the name may go while it waits
        guide = None if grammar is None else self._compiler.known(*grammar)
        if grammar is None or guide is not None:
            self._submit(message, guide)
        else:
            self._compiled[number] = message
            self._compiler.start(number, *grammar)

    def _take_compiled(self) -> None:
        for number, outcome in self._compiler.done():
            message = self._compiled.pop(number)
            if isinstance(outcome, MatcherGuide):
                self._submit(message, outcome)
                continue
            finish = "error"
            if isinstance(outcome, BadGrammarError):
                finish = "refused"
            elif isinstance(outcome, CrowdedError):
                finish = "crowded"
            else:
                log.error("Failed to compile a grammar error=%r", outcome)
            reason = str(outcome) or type(outcome).__name__
            self._channel.send({"ev": [[number, reason, 0, finish, NO_TIMES, None]]})

    def _submit(self, message: dict[str, Any], guide: MatcherGuide | None) -> None:
        number = message["id"]
        self._answers[number] = self._unstarted[number] = Answer(self._factory, message, guide)
        self._engine.submit(
            Job(
                id=number,
                prompt=message["prompt"],
                max_tokens=message["max_tokens"],
                sampling=Sampling(**message["sampling"]),
                ignore_eos=message["ignore_eos"],
                guide=guide,
                score_prompt=message["score_prompt"],
                adapter=message["adapter"],
            )
        )

    def _score(self, token: int, scores: Scores) -> list[Any]:
        top = [[self._piece(one), logprob] for one, logprob in scores.top]
        return [self._piece(token), scores.logprob, top]

    def _piece(self, token: int) -> str:
        return self._factory.piece(token).decode("latin-1")

    def step(self) -> None:
        """One engine step; what streams is sent at once, the rest when it is whole."""
        begin = time.monotonic()
        tokens = self._engine.step()
        now = time.monotonic()
        self._steps += 1
        self._step_seconds += now - begin
        self._step_tokens += len(tokens)
        if self._unstarted:
            self._note_started(begin, sum(token.finish is not None for token in tokens))
        size = len(tokens)  # with the prompts that ended in this step
        events: list[list[Any]] = []
        for token in tokens:
            answer = self._answers.get(token.job)
            if answer is None:  # a stop string ended it with the token before
                continue
            answer.tick(now)
            answer.cached += token.cached
            size += answer.prompt - answer.cached if answer.count == 1 else 0
            if token.prompt_scores:
                answer.scores[0].extend(self._score(*one) for one in token.prompt_scores)
            finish, text = token.finish, ""
            # who has the prompt scored counts on one more, and knows no end tokens (lm-evaluation-harness)
            if token.scores is not None and (finish != "stop" or answer.scores_prompt):
                answer.scores[1].append(self._score(token.token, token.scores))
            if finish not in ("stop", "error"):
                text, stopped = answer.stop.feed(answer.detok.feed(token.token), answer.count > answer.least)
                if stopped:
                    finish = "stop"
                    self._engine.cancel(token.job)
            if finish == "error":
                reason = answer.guide.problem if answer.guide else ""
                events.append([token.job, reason, answer.count, finish, NO_TIMES, None])
                del self._answers[token.job]
            elif finish:
                text += answer.stop.flush()
                times = [answer.started, answer.first, answer.last, answer.gaps, answer.cached]
                events.append([token.job, answer.pending + text, answer.count, finish, times, answer.told()])
                del self._answers[token.job]
            elif not answer.stream:
                answer.pending += text
            elif text or answer.count == 1:
                events.append([token.job, text, answer.count, None, None, answer.told()])
        if tokens:
            self._sizes[bisect_left(STEP_SIZES, size)] += 1
            self._sized += size
        if events:
            self._channel.send({"ev": events})

    def _note_started(self, begin: float, ended: int) -> None:
        """Jobs get slots in order of arrival: what neither runs nor `ended` in this step still waits."""
        waiting = len(self._answers) - ended - self._engine.running
        for number in list(islice(self._unstarted, max(0, len(self._unstarted) - waiting))):
            self._unstarted.pop(number).started = begin


def start(path: Path, options: engines.EngineOptions, channel: Channel) -> Worker:
    """Load and warm the model; the front hears of each phase."""
    begin = time.monotonic()
    channel.send({"phase": "loading"})
    folder = model_folder.read(path)
    tokenizer = model_folder.read_tokenizer(path)
    factory = DetokenizerFactory(tokenizer)
    engine = engines.load(folder, options)
    loaded = time.monotonic()
    channel.send({"phase": "warming"})
    guides = Guides(path / "tokenizer.json", folder.vocab_size, folder.eos_ids)
    guides.warm()
    engines.warm(engine, tokenizer.encode(WARM_UP).ids or [0])
    info = {**asdict(engine.info), "load_seconds": loaded - begin, "warm_seconds": time.monotonic() - loaded}
    log.info("Loaded the model: %s", orjson.dumps(info).decode())
    channel.send({"ready": info, "adapters": engine.adapters.names})
    return Worker(engine, factory, guides, channel)


def main() -> int:
    """The front starts this process and nobody else."""
    channel = Channel(socket.socket(fileno=0))
    try:
        setup = channel.first()
    except (EOFError, ConnectionResetError):
        return 0
    logging.basicConfig(level=setup["log_level"].upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):  # the front decides when to end, by closing the socket
        signal.signal(number, signal.SIG_IGN)
    try:
        worker = start(Path(setup["model"]), engines.EngineOptions(**setup["options"]), channel)
    except (model_folder.BadModelFolderError, EngineRefusedError, engines.DoesNotFitError) as error:
        channel.send({"fatal": str(error)})
        return 1
    except (BrokenPipeError, ConnectionResetError):  # the front has ended meanwhile
        return 0
    except Exception as error:
        log.exception("Failed to load the model")
        channel.send({"fatal": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        return 1
    try:
        worker.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception:
        log.exception("Failed in an engine step")
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # skips the teardown of native thread pools, which may hang
