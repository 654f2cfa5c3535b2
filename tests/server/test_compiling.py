"""Grammars: compiled beside the engine, kept, bounded, and harmless when they fail."""

import asyncio
import concurrent.futures
import json
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from server_harness import TINY, Server, wait_for

from slmops_server import compiling
from slmops_server.compiling import Compiler, CrowdedError
from slmops_server.engines.base import Sampling
from slmops_server.engines.choose import EngineOptions
from slmops_server.errors import ApiError
from slmops_server.guide import CACHED, CACHED_TEXT, BadGrammarError, Guides, MatcherGuide
from slmops_server.supervisor import Supervisor
from slmops_server.worker import Worker

Start = Callable[..., Server]
# about a second of work
FIELDS = {f"k{n}": {"type": "string", "pattern": f"a{{{n}}}b*"} for n in range(3000)}
LARGE = {"type": "object", "properties": FIELDS, "required": ["k1"]}
DEEP: dict[str, object] = {"type": "string"}
for _ in range(200):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
BAD = [
    ("json", DEEP),
    ("json", {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}),
    ("json", {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(8)]} for i in range(8)]}),
    ("regex", "(unclosed"),
    ("regex", "(?=ahead)"),
    ("grammar", "no grammar at all"),
    ("grammar", "start: a"),
    ("grammar", 'start: "' + "x" * 300_000 + '"'),
]


@pytest.mark.parametrize(("kind", "value"), BAD, ids=[f"{b[0]}-{str(b[1])[:25]}" for b in BAD])
def test_a_bad_grammar_is_a_400_and_the_engine_lives_on(server: Server, kind: str, value: object) -> None:
    restarts = server.metric("slmops_engine_restarts_total")
    answer = server.complete(structured_outputs={kind: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_grammar", f"structured_outputs.{kind}")
    assert error["message"]
    assert "Traceback" not in server.log.read_text()
    assert server.complete().status_code == 200
    assert server.metric("slmops_engine_restarts_total") == restarts


WORDS = [f"w{n}" for n in range(3000)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_fails_in_mid_answer_ends_that_answer_with_a_reason(server: Server, stream: bool) -> None:
    """After the "w" there are more ways to go on than the parser takes."""
    rules = "start: " + " | ".join(f'"{word}"' for word in WORDS)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(server.complete, max_tokens=300, ignore_eos=True)
        answer = server.complete(structured_outputs={"grammar": rules}, stream=stream)
        assert other.result().json()["usage"]["completion_tokens"] == 300
    told = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: ")) if stream else answer.json()
    assert answer.status_code == (200 if stream else 500)
    assert told["error"]["code"] == "format_failed"
    assert "items" in told["error"]["message"]
    assert "Traceback" not in server.log.read_text()


def test_thousands_of_choices_are_none_too_many(server: Server) -> None:
    answer = server.complete(structured_outputs={"choice": WORDS})
    assert answer.json()["choices"][0]["text"] in WORDS


def test_a_large_tool_schema_is_a_400_too(server: Server) -> None:
    words = {"type": "object", "properties": {"a": {"enum": [f"word {n}" for n in range(30_000)]}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": words}}
    answer = server.chat(tools=[tool], tool_choice="required")
    assert answer.status_code == 400


def test_running_streams_go_on_while_a_large_grammar_is_compiled(start: Start) -> None:
    server = start("--slots", "2")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        begin = time.monotonic()
        compiled = pool.submit(server.complete, structured_outputs={"json": LARGE})
        answered = 0
        gaps = [0.0]
        while not compiled.done():
            last = time.monotonic()
            for _ in client.completions.create(
                model="tiny", prompt=[40], max_tokens=200, stream=True, temperature=0, extra_body={"ignore_eos": True}
            ):
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
            answered += 1
        took = time.monotonic() - begin
        assert compiled.result().status_code == 200
        assert compiled.result().json()["choices"][0]["text"].startswith("{")
    assert took > 4 * max(gaps), (took, max(gaps))
    assert answered > 1
    begin = time.monotonic()
    assert server.complete(structured_outputs={"json": LARGE}).status_code == 200
    assert time.monotonic() - begin < took / 4  # kept


def test_a_client_that_leaves_while_its_grammar_is_compiled_is_forgotten(start: Start) -> None:
    server = start()
    with pytest.raises(openai.APITimeoutError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=0.2).completions.create(
            model="tiny", prompt="x", extra_body={"structured_outputs": {"json": LARGE}}
        )
    wait_for(lambda: server.idle, "nothing waits")
    assert server.complete().status_code == 200
    wait_for(rests(server.engine_pid or 0), "the engine waits for work without working")


def rests(pid: int) -> Callable[[], bool]:
    """Whether a process has used next to no CPU time for a second."""

    def used() -> float:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    since, before = time.monotonic(), used()

    def resting() -> bool:
        nonlocal since, before
        if (now := used()) > before + 0.1:
            since, before = time.monotonic(), now
        return time.monotonic() > since + 1

    return resting


# The pieces

ENDS = [2]


@pytest.fixture(scope="module")
def guides() -> Guides:
    return Guides(TINY / "tokenizer.json", 512, ENDS)


def wait(compiler: Compiler, count: int = 1) -> list[tuple[int, object]]:
    """What it tells; its bell may ring for nothing."""
    told: list[tuple[int, object]] = []
    end = time.monotonic() + 20
    while len(told) < count and (left := end - time.monotonic()) > 0:
        select.select([compiler.wake], [], [], left)
        told += compiler.done()
    return told


def test_it_tells_when_something_is_done(guides: Guides) -> None:
    compiler = Compiler(guides)
    compiler.start(7, "regex", "a+")
    [(number, guide)] = wait(compiler)
    assert number == 7
    assert isinstance(guide, MatcherGuide)
    assert guide.allowed().any()
    compiler.start(8, "regex", "(")
    [(number, error)] = wait(compiler)
    assert (number, type(error)) == (8, BadGrammarError)
    assert compiler.done() == []


class Slow:
    """Guides that take until they are let go, one grammar longer than others, and what was begun."""

    def __init__(self, longer: str = "") -> None:
        self.go, self.late, self._longer = threading.Event(), threading.Event(), longer
        self.made: list[str] = []

    def new(self, kind: str, text: str) -> MatcherGuide:
        self.made.append(text)
        (self.late if text == self._longer else self.go).wait(20)
        raise RuntimeError("let go")


def test_what_takes_too_long_is_refused_and_what_fails_is_told() -> None:
    now = 0.0
    slow = Slow()
    compiler = Compiler(slow, lambda: now)  # type: ignore[arg-type]
    compiler.start(1, "regex", "a")
    wait_for(lambda: slow.made, "a thread has taken it up")
    assert compiler.done() == []
    now = compiling.SECONDS + 1
    [(number, error)] = compiler.done()
    assert (number, type(error)) == (1, BadGrammarError)
    compiler.start(2, "regex", "b")
    compiler.start(3, "regex", "c")
    compiler.cancel(3)
    slow.go.set()
    [(number, error)] = wait(compiler)
    assert (number, type(error)) == (2, RuntimeError)


def test_a_grammar_that_found_no_thread_is_not_at_fault() -> None:
    now = 0.0
    slow = Slow()
    compiler = Compiler(slow, lambda: now)  # type: ignore[arg-type]
    for number in range(compiling.THREADS + 1):
        compiler.start(number, "regex", f"a{number}")
    wait_for(lambda: len(slow.made) == compiling.THREADS, "all threads are taken")
    now = compiling.SECONDS + 1
    told = dict(compiler.done())
    assert isinstance(told.pop(compiling.THREADS), CrowdedError)
    assert [type(error) for error in told.values()] == [BadGrammarError] * compiling.THREADS
    slow.go.set()


def test_a_grammar_that_found_no_thread_may_be_sent_again(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    front = Supervisor(TINY, EngineOptions(), "info", 60)
    front.phase = "ready"
    stream = front.submit([1], 4, Sampling(), (), ignore_eos=False, stream=False)
    [number] = stream.numbers
    channel = SimpleNamespace(send=front._take)
    worker = Worker(None, None, guides, channel)  # type: ignore[arg-type]  # neither is asked for anything
    worker._compiled[number] = {}
    monkeypatch.setattr(worker._compiler, "done", lambda: [(number, CrowdedError("Busy."))])
    worker._take_compiled()
    with pytest.raises(ApiError) as caught:
        asyncio.run(stream.get())
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "overloaded", 10)


def test_the_time_of_a_grammar_begins_when_a_thread_takes_it_up() -> None:
    now = 0.0
    slow = Slow("late")
    compiler = Compiler(slow, lambda: now)  # type: ignore[arg-type]
    for number, text in enumerate([*"abcdefgh"[: compiling.THREADS], "late"]):
        compiler.start(number, "regex", text)
    wait_for(lambda: len(slow.made) == compiling.THREADS, "all threads are taken")
    now = compiling.SECONDS - 1
    slow.go.set()
    wait_for(lambda: slow.made[-1] == "late", "one is taken up late")
    wait(compiler, compiling.THREADS)
    now = 2 * compiling.SECONDS - 2
    assert compiler.done() == []
    now = 2 * compiling.SECONDS
    [(number, error)] = compiler.done()
    assert (number, type(error)) == (compiling.THREADS, BadGrammarError)
    slow.late.set()


class Held(Slow):
    """Guides that are compiled when they are let go."""

    def __init__(self, guides: Guides) -> None:
        super().__init__()
        self._guides = guides

    def new(self, kind: str, text: str) -> MatcherGuide:
        self.made.append(text)
        self.go.wait(20)
        return self._guides.new(kind, text)


def test_what_many_wait_for_is_compiled_once(guides: Guides) -> None:
    held = Held(guides)
    compiler = Compiler(held)  # type: ignore[arg-type]  # the half of Guides that it needs
    for number in range(30):
        compiler.start(number, "regex", "ab|(ba)")
    compiler.start(30, "regex", "(")
    compiler.start(31, "regex", "(")
    compiler.cancel(7)
    compiler.cancel(30)
    held.go.set()
    told = dict(wait(compiler, 30))
    assert sorted(held.made) == ["(", "ab|(ba)"]
    assert sorted(told) == [number for number in range(32) if number not in (7, 30)]
    assert isinstance(told.pop(31), BadGrammarError)
    first, *others = told.values()
    assert isinstance(first, MatcherGuide)
    token = int(first.allowed().argmax())
    first.take(token)
    assert all(isinstance(other, MatcherGuide) and other.allowed()[token] for other in others)
    assert not first.allowed()[token]  # "aa" and "bb" are not in it: the others have a state of their own


def test_a_grammar_that_nobody_waits_for_any_more_is_compiled_for_the_next_one(guides: Guides) -> None:
    held = Held(guides)
    compiler = Compiler(held)  # type: ignore[arg-type]
    for number in range(3):  # of which two run, and cannot be ended
        compiler.start(number, "regex", f"c{number}")
    wait_for(lambda: len(held.made) == 2, "two are being compiled")
    for number in range(3):
        compiler.cancel(number)
    compiler.start(3, "regex", "c0")
    compiler.start(4, "regex", "c2")
    held.go.set()
    assert sorted(number for number, _ in wait(compiler, 2)) == [3, 4]
    assert sorted(held.made) == ["c0", "c1", "c2"]


def test_kept_guides_are_independent_and_few(guides: Guides) -> None:
    first = guides.new("json", json.dumps({"enum": ["ab"]}))
    again = guides.known("json", json.dumps({"enum": ["ab"]}))
    assert again is not None
    token = int(first.allowed().argmax())
    first.take(token)
    assert again.allowed()[token]
    for number in range(CACHED + 1):
        guides.new("regex", f"a{{{number + 1}}}")
    assert guides.known("json", json.dumps({"enum": ["ab"]})) is None
    assert guides.known("regex", "a{1}") is None
    assert guides.known("regex", f"a{{{CACHED}}}") is not None
    for number in range(5):  # long ones push out the short ones
        guides.new("regex", f"{number}" * (CACHED_TEXT // 5 + 1))
    assert guides.known("regex", f"a{{{CACHED}}}") is None
    assert guides.known("regex", "4" * (CACHED_TEXT // 5 + 1)) is not None
