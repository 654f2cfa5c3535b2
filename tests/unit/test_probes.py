"""The operator's own ports: what they answer, and clients that hold connections."""

import asyncio
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from slmops import main as operator
from slmops.handlers import probes


def serving(pages: probes.Pages, ask: Callable[[int], None]) -> None:
    """Serve on a free port, and ask from another thread."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]

    async def main() -> None:
        runner = await probes.serve(pages, port)
        await asyncio.to_thread(ask, port)
        await runner.cleanup()

    asyncio.run(main())


def get(port: int, path: str) -> tuple[int, str]:
    answer = httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=5)
    return answer.status_code, answer.text


def test_probes_and_metrics_answer() -> None:
    def probed(port: int) -> None:
        assert [get(port, path) for path in ("/healthz", "/readyz")] == [(200, "ok\n"), (503, "the watches\n")]
        assert get(port, "/metrics")[0] == 404

    def scraped(port: int) -> None:
        status, text = get(port, "/metrics")
        assert (status, "made_total 1.0" in text) == (200, True)

    serving(probes.probes(lambda: "", lambda: "the watches"), probed)
    registry = CollectorRegistry()
    Counter("made", "Of nothing.", registry=registry).inc()
    serving(probes.metrics(registry), scraped)


@pytest.mark.parametrize("said", [b"", b"GET /heal", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_whoever_holds_connections_keeps_nobody_away(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without a place for a file more can ask neither the API server nor anybody else."""
    monkeypatch.setattr(probes, "CONNECTIONS", 8)

    def sockets() -> int:
        files = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(str(name).startswith("socket:") for name in files)

    def ask(port: int) -> None:
        held, before = [], sockets()
        for _ in range(200):
            one = socket.create_connection(("127.0.0.1", port), 5)
            one.send(said)
            held.append(one)
        assert get(port, "/healthz") == (200, "ok\n")
        assert sockets() <= before + len(held) + 8  # both ends are this process's
        for one in held:
            one.close()

    serving(probes.probes(lambda: "", lambda: ""), ask)


def test_what_no_probe_says_is_not_listened_to() -> None:
    def ask(port: int) -> None:
        for more in ({"x": "y" * 5000}, {f"x-{number}": "y" for number in range(40)}):
            answer = httpx.get(f"http://127.0.0.1:{port}/healthz", headers=more, trust_env=False, timeout=5)
            assert answer.status_code == 400

    serving(probes.probes(lambda: "", lambda: ""), ask)


def test_whoever_says_nothing_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "IDLE_SECONDS", 0.05)

    def ask(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), 5) as silent:
            assert silent.recv(1) == b""

    serving(probes.probes(lambda: "", lambda: ""), ask)


def test_the_operator_may_open_as_many_files_as_the_machine_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(operator.logs, "set_up", lambda: None)
    monkeypatch.setenv("SLMOPS_WORKERS", "0")  # it does not start
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
    try:
        assert operator.main() == 1
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
