"""The front's hold on the engine process when there is none to be had, or one that hangs."""

import asyncio
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops_server import adapter_verbs, supervisor
from slmops_server.app import Routes
from slmops_server.engines.base import Sampling
from slmops_server.engines.choose import EngineOptions
from slmops_server.errors import ApiError
from slmops_server.service import Service
from slmops_server.settings import parse
from slmops_server.supervisor import Supervisor

LORA = Path(__file__).parent / "data" / "tiny-lora"


def no_process(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The machine has no more processes, for so many attempts."""
    real, left = asyncio.create_subprocess_exec, times

    async def start(*args: Any, **more: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await real(*args, **more)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(supervisor, "BACKOFF", (0.0,))


def test_an_engine_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    no_process(monkeypatch, 2)

    async def main() -> None:
        kept = Supervisor(tiny, EngineOptions(threads=1, slots=1), "info", 60)
        running = asyncio.create_task(kept.run())
        await asyncio.wait_for(kept.was_ready.wait(), 60)
        assert (kept.restarts, kept.phase, kept.problem) == (2, "ready", "")
        await kept.close()
        await running

    asyncio.run(main())


def test_in_the_end_it_says_why_there_is_none(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    no_process(monkeypatch, supervisor.GIVE_UP)
    kept = Supervisor(tiny, EngineOptions(threads=1, slots=1), "info", 60)
    asyncio.run(kept.run())
    assert kept.failed.is_set()
    assert (kept.phase, kept.restarts) == ("failed", supervisor.GIVE_UP - 1)
    assert kept.problem == "the engine process cannot be started: Resource temporarily unavailable"


def test_why_one_engine_ended_is_not_told_of_the_next(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """The first cannot be started, the others end without a word."""
    real = asyncio.create_subprocess_exec

    async def wordless(*_: Any, **more: Any) -> Any:
        return await real(sys.executable, "-c", "raise SystemExit(3)", **more)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", wordless)
    no_process(monkeypatch, 1)
    kept = Supervisor(tiny, EngineOptions(threads=1, slots=1), "info", 60)
    asyncio.run(kept.run())
    assert kept.failed.is_set()
    assert kept.problem == "the engine process ended with code 3"


def test_an_engine_starts_with_more_adapters_than_a_command_line_holds(tiny: Path, tmp_path: Path) -> None:
    """None of them can be loaded here: that it tells so, it has read."""
    adapters = [(f"{number} " + "x" * 200, str(tmp_path / "none")) for number in range(10_000)]

    async def main() -> str:
        kept = Supervisor(tiny, EngineOptions(threads=1, slots=1, adapters=adapters), "info", 60)
        ended = asyncio.Event()
        kept.on_restart = ended.set
        running = asyncio.create_task(kept.run())
        await asyncio.wait_for(ended.wait(), 60)
        problem = kept.problem
        await kept.close()
        await running
        return problem

    assert "takes no adapters" in asyncio.run(main())


def test_clients_are_told_when_the_engine_should_be_ready_again(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """By how long the last start took: 20 seconds."""
    clock = 100.0
    lives: list[tuple[socket.socket, asyncio.Event]] = []

    async def start() -> tuple[Any, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        lives.append((theirs, ended := asyncio.Event()))

        async def wait() -> int:
            await ended.wait()
            return 1

        return SimpleNamespace(pid=1, returncode=1, wait=wait), ours

    monkeypatch.setattr(supervisor, "_start_process", start)
    monkeypatch.setattr(supervisor, "BACKOFF", (0.0,))
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock, time=time.time))

    async def main() -> None:
        nonlocal clock
        kept = Supervisor(tiny, EngineOptions(threads=1, slots=1), "info", 60)
        running = asyncio.create_task(kept.run())
        await holds(lambda: len(lives) == 1)
        assert kept.not_ready().retry_after == 1  # nothing is known yet
        clock += 20
        lives[0][0].sendall(b'{"ready": {"load_seconds": 1, "warm_seconds": 1}, "adapters": []}\n')
        await holds(lambda: kept.ready)
        answer = kept.submit([40], 1, Sampling(), (), ignore_eos=False, stream=False)
        clock += 1000
        lives[0][1].set()
        with pytest.raises(ApiError) as caught:
            await answer.get()
        assert (caught.value.code, caught.value.retry_after) == ("engine_restarted", 20)
        await holds(lambda: len(lives) == 2)
        clock += 5
        assert kept.not_ready().retry_after == 15
        clock += 100  # later than ever
        assert kept.not_ready().retry_after == 1
        await kept.close()
        lives[1][1].set()
        await running
        for theirs, _ in lives:
            theirs.close()

    asyncio.run(main())


async def holds(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the world has no event for it
            await asyncio.sleep(0.01)


def test_an_engine_that_hangs_when_it_is_loaded_again_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF", (0.0,))
    monkeypatch.setattr(supervisor, "BEAT", 0.05)

    async def main() -> None:
        kept = Supervisor(tiny, EngineOptions(threads=1, slots=1), "info", 60)
        running = asyncio.create_task(kept.run())
        await asyncio.wait_for(kept.was_ready.wait(), 60)
        first = kept.pid
        assert first
        os.kill(first, signal.SIGKILL)
        await holds(lambda: kept.pid not in (None, first))
        second = kept.pid
        assert second
        os.kill(second, signal.SIGSTOP)
        with monkeypatch.context() as hasty:  # else five minutes
            hasty.setattr(supervisor, "RELOAD", 0.2)
            hasty.setattr(supervisor, "SLOWER", 0)
            await holds(lambda: kept.pid != second)
        assert "said nothing for 0.2 seconds" in kept.problem
        await holds(lambda: kept.ready)
        assert kept.restarts == 2
        await kept.close()
        await running

    asyncio.run(main())


def test_the_container_is_not_alive_when_a_stuck_engine_cannot_be_ended(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    """One that waits in the kernel for a disk that is gone, say."""
    monkeypatch.setattr(supervisor, "BACKOFF", (0.0,))
    monkeypatch.setattr(supervisor, "BEAT", 0.05)
    monkeypatch.setattr(asyncio.subprocess.Process, "kill", lambda _process: None)

    async def main() -> None:
        service = Service(parse(["--model", str(tiny), "--threads", "1", "--slots", "1", "--step-timeout", "0.5"], {}))
        kept = service.supervisor
        running = asyncio.create_task(kept.run())
        await asyncio.wait_for(kept.was_ready.wait(), 60)
        assert await livez(service) == 200
        assert kept.pid
        os.kill(kept.pid, signal.SIGSTOP)
        await holds(lambda: kept.phase == "stuck")
        assert await livez(service) == 503
        assert not service.ready
        with pytest.raises(ApiError, match="not ready"):
            service.admit()
        os.kill(kept.pid, signal.SIGKILL)
        await holds(lambda: service.ready)
        assert await livez(service) == 200
        await kept.close()
        await running

    asyncio.run(main())


@pytest.mark.parametrize("answers", [False, True])
def test_an_engine_that_dies_at_every_request_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, answers: bool
) -> None:
    """One that answers others between is spared: it is the request that kills it."""
    monkeypatch.setattr(supervisor, "BACKOFF", (0.0,))
    monkeypatch.setattr(supervisor, "GIVE_UP", 2)

    async def main() -> None:
        service = Service(parse(["--model", str(tiny), "--threads", "1", "--slots", "1"], {}))
        kept = service.supervisor
        running = asyncio.create_task(kept.run())

        async def dies(at_a_request: bool) -> None:
            await holds(lambda: kept.ready)
            pid, before = kept.pid, kept.restarts
            assert pid
            os.kill(pid, signal.SIGSTOP)
            answer = kept.submit([40], 1, Sampling(), (), ignore_eos=False, stream=False) if at_a_request else None
            os.kill(pid, signal.SIGKILL)
            if answer:
                with pytest.raises(ApiError, match="ended in mid-request"):
                    await answer.get()
            else:
                await holds(lambda: kept.restarts > before)

        await dies(at_a_request=True)
        await dies(at_a_request=False)
        await dies(at_a_request=False)
        await holds(lambda: kept.ready)
        if answers:
            await kept.submit([40], 1, Sampling(), (), ignore_eos=False, stream=False).get()
        await dies(at_a_request=True)
        if answers:
            await holds(lambda: kept.ready)
            assert await livez(service) == 200
            await kept.close()
        await asyncio.wait_for(running, 20)
        if not answers:
            assert kept.failed.is_set()
            assert await livez(service) == 503
            assert kept.problem == "the engine process ended with code -9; the last 2 that were asked made no step"

    asyncio.run(main())


async def livez(service: Service) -> int:
    """What the probe is answered."""
    status, _ = await asked(Routes(service, api=False, metrics=True), "GET", "/livez")
    return status


async def asked(routes: Routes, method: str, path: str, **fields: object) -> tuple[int, bytes]:
    """Status and body of the answer to these fields."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(fields).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    await routes({"type": "http", "method": method, "path": path, "headers": [], "state": {}}, receive, send)
    return int(sent[0]["status"]), sent[1]["body"]


def test_an_adapter_that_is_not_read_in_time_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a volume that hangs: where its folder is looked at, and where the engine reads it."""
    hangs, come = threading.Event(), threading.Event()
    arguments = ["--model", str(LORA / "fp32"), "--threads", "1", "--slots", "1", "--adapter-root", str(LORA)]

    async def main() -> None:
        service = Service(parse(arguments, {}))
        kept, routes = service.supervisor, Routes(service, api=True, metrics=False)
        running = asyncio.create_task(kept.run())
        await asyncio.wait_for(kept.was_ready.wait(), 60)
        assert kept.pid

        async def load(name: str, folder: str) -> tuple[int, bytes]:
            return await asked(routes, "POST", "/v1/load_lora_adapter", lora_name=name, lora_path=folder)

        async def unload(name: str) -> int:
            return (await asked(routes, "POST", "/v1/unload_lora_adapter", lora_name=name))[0]

        assert (await load("old", "few"))[0] == 200
        with monkeypatch.context() as hasty:  # else five minutes
            hasty.setattr(adapter_verbs, "READ", 1.0)
            with hasty.context() as hanging:
                hanging.setattr(adapter_verbs, "below", lambda *_: (hangs.set(), come.wait(60)))
                begin = time.monotonic()
                tries = [asyncio.create_task(load("few", "few")) for _ in range(3)]
                await holds(hangs.is_set)
                assert await unload("old") == 200
                assert not any(one.done() for one in tries)
                told = await asyncio.gather(*tries)
                assert time.monotonic() - begin < 2.5  # not one after the other
            for status, body in told:
                assert (status, json.loads(body)["error"]["code"]) == (503, "adapter_timeout")
            assert (await load("few", "few"))[0] == 503  # it waits behind the one that hangs
            come.set()
            os.kill(kept.pid, signal.SIGSTOP)
            status, body = await load("all", "all")
            assert (status, json.loads(body)["error"]["code"]) == (503, "adapter_timeout")
        assert not kept.adapters
        os.kill(kept.pid, signal.SIGCONT)
        assert (await load("few", "few"))[0] == 200
        assert list(kept.adapters) == ["all", "few"]  # the one that was late is there as well
        assert await unload("all") == 200
        assert kept.restarts == 0
        await kept.close()
        await running

    asyncio.run(main())
