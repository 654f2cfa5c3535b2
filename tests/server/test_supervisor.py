"""The front's hold on the engine process when there is none to be had."""

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from slmops_server import supervisor
from slmops_server.engines.choose import EngineOptions
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
