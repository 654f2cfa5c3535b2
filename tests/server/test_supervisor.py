"""The front's hold on the engine process when there is none to be had, or one that hangs."""

import asyncio
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops_server import supervisor
from slmops_server.app import Routes
from slmops_server.engines.choose import EngineOptions
from slmops_server.errors import ApiError
from slmops_server.service import Service
from slmops_server.settings import parse
from slmops_server.supervisor import Supervisor


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


async def livez(service: Service) -> int:
    """What the probe is answered."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/livez", "headers": [], "state": {}}
    await Routes(service, api=False)(scope, receive, send)
    return int(sent[0]["status"])
