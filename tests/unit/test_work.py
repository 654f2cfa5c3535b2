"""The workers: passes in threads, failures kept apart, an end in good order."""

import asyncio
import math
import threading
from collections.abc import Callable

import pytest

from slmops.cluster.port import ClusterError, Key
from slmops.handlers.schedule import Schedule
from slmops.handlers.work import PASS_SECONDS, STALL_SECONDS, Work

A, B = Key("FineTuneJob", "ns", "a"), Key("FineTuneJob", "ns", "b")


def make(run: Callable[[Key], float | None], workers: int = 2) -> tuple[Work, list[tuple[Key, bool]]]:
    passes: list[tuple[Key, bool]] = []
    work = Work(
        run, Schedule[Key](lambda: 0.0), workers=workers, on_pass=lambda key, _, failed: passes.append((key, failed))
    )
    return work, passes


async def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110  # it happens in another thread
            await asyncio.sleep(0.005)


async def served(work: Work, true: Callable[[], bool]) -> None:
    stop = asyncio.Event()
    serving = asyncio.create_task(work.serve(stop))
    await until(true)
    stop.set()
    await asyncio.wait_for(serving, 5)
    assert await work.finish(5)


def test_a_bug_in_one_object_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    def run(key: Key) -> float | None:
        if key == A:
            raise ZeroDivisionError("a bug")
        return None

    async def main() -> None:
        work, passes = make(run)
        work.poke(A)
        work.poke(B)
        await served(work, lambda: (A, True) in passes and (B, False) in passes)

    asyncio.run(main())
    assert [record.message for record in caplog.records] == ["Could not finish pass: bug"]
    assert caplog.records[0].exc_info


def test_a_silent_api_server_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    def run(_key: Key) -> float | None:
        raise ClusterError(503, "ServiceUnavailable", "starting")

    async def main() -> None:
        work, passes = make(run)
        work.poke(A)
        await served(work, lambda: (A, True) in passes)

    asyncio.run(main())
    assert caplog.records[0].exc_info is None


def test_never_two_passes_of_one_object_and_never_more_than_there_are_workers() -> None:
    lock, now_running, most, total = threading.Lock(), set[Key](), 0, 0

    def run(key: Key) -> float | None:
        nonlocal most, total
        with lock:
            assert key not in now_running
            now_running.add(key)
            most = max(most, len(now_running))
        threading.Event().wait(0.01)
        with lock:
            now_running.discard(key)
            total += 1
        return 0.0 if total < 60 else None

    async def main() -> None:
        work, passes = make(run, workers=3)
        for number in range(8):
            work.poke(Key("FineTuneJob", "ns", str(number)))
        await served(work, lambda: total >= 60)
        assert not any(failed for _, failed in passes)

    asyncio.run(main())
    assert most == 3


def test_stopping_waits_for_the_pass_in_progress_and_starts_none() -> None:
    began, go_on = threading.Event(), threading.Event()
    ended: list[Key] = []

    def run(key: Key) -> float | None:
        began.set()
        assert go_on.wait(5)
        ended.append(key)
        return 0.0

    async def main() -> None:
        work, _ = make(run, workers=1)
        stop = asyncio.Event()
        serving = asyncio.create_task(work.serve(stop))
        work.poke(A)
        work.poke(B)
        await until(began.is_set)
        stop.set()
        await asyncio.wait_for(serving, 5)
        assert not await work.finish(0.05)
        go_on.set()
        await until(lambda: ended == [A])
        await asyncio.sleep(0)
        assert ended == [A]

    asyncio.run(main())


def test_one_pass_that_hangs_is_an_illness_though_others_end() -> None:
    now = 0.0
    began, hung = threading.Event(), threading.Event()

    def run(key: Key) -> float | None:
        if key == A:
            began.set()
            hung.wait(5)
        return None

    async def main() -> None:
        nonlocal now
        ended: list[Key] = []
        work = Work(
            run, Schedule[Key](lambda: 0.0), workers=2, clock=lambda: now, on_pass=lambda key, *_: ended.append(key)
        )
        stop = asyncio.Event()
        serving = asyncio.create_task(work.serve(stop))
        work.poke(A)
        now += 1
        work.poke(A)
        await until(began.is_set)
        now += PASS_SECONDS - 1
        work.poke(B)
        now += 0.5
        work.poke(B)
        await until(lambda: B in ended)
        assert not work.stalled()  # long is not yet too long
        now += 1
        assert work.stalled()
        hung.set()
        await until(lambda: A in ended)
        assert not work.stalled()
        stop.set()
        await asyncio.wait_for(serving, 5)

    asyncio.run(main())


def test_an_object_that_is_not_there_any_more_is_told_when_its_pass_is_over() -> None:
    told: list[tuple[str, Key]] = []

    async def main() -> None:
        work = Work(
            lambda _key: math.inf,
            Schedule[Key](lambda: 0.0),
            workers=1,
            on_pass=lambda key, _seconds, _failed: told.append(("pass", key)),
            on_gone=lambda key: told.append(("gone", key)),
        )
        work.poke(A)
        await served(work, lambda: len(told) == 2)

    asyncio.run(main())
    assert told == [("pass", A), ("gone", A)]


def test_it_is_ill_when_work_waits_and_no_pass_ends() -> None:
    now = 0.0
    began, hung = threading.Event(), threading.Event()

    def run(_key: Key) -> float | None:
        began.set()
        hung.wait(5)
        return None

    async def main() -> None:
        nonlocal now
        work = Work(run, Schedule[Key](lambda: 0.0), workers=1, clock=lambda: now)
        stop = asyncio.Event()
        serving = asyncio.create_task(work.serve(stop))
        now = STALL_SECONDS * 10
        assert not work.stalled()  # nothing to do is no illness
        work.poke(A)
        now += 1
        work.poke(A)
        await until(began.is_set)
        work.poke(B)
        now += STALL_SECONDS + 1
        assert work.stalled()
        hung.set()
        await until(lambda: not work.stalled())
        stop.set()
        work.poke(A)
        await asyncio.wait_for(serving, 5)

    asyncio.run(main())
