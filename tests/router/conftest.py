import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # test modules are imported by path, their helper needs one

from router_world import Dns, ModelServer, Router, free_port

_hosts = itertools.count(2)


@pytest.fixture(scope="session", autouse=True)
def haproxy() -> None:
    """These tests run the real thing."""
    assert shutil.which("haproxy", path="/usr/sbin:/usr/bin"), "haproxy is missing: apt-get install haproxy"


@pytest.fixture
def dns() -> Iterator[Dns]:
    server = Dns()
    yield server
    server.close()


@pytest.fixture
def port() -> int:
    """The port that all model servers of a test share, as pods do."""
    return free_port()


@pytest.fixture
def pod(dns: Dns, port: int) -> Iterator[Callable[[str], ModelServer]]:
    """Start a pod of a revision: its own loopback address, in DNS."""
    made: list[ModelServer] = []

    def start(revision: str, **how: Any) -> ModelServer:
        server = ModelServer(revision, f"127.0.1.{next(_hosts) % 250 + 1}", port)
        for name, value in how.items():
            setattr(server, name, value)
        dns.records.setdefault(f"{revision}.test", []).append(server.host)
        made.append(server)
        return server

    yield start
    for server in made:
        server.kill()


@pytest.fixture
def router(tmp_path: Path, dns: Dns) -> Iterator[Callable[..., Router]]:
    """Start a router, with routes in its ConfigMap or without."""
    made: list[Router] = []

    def start(mounted: dict[str, Any] | None = None, **how: Any) -> Router:
        made.append(Router(tmp_path, dns, mounted, **how))
        return made[-1]

    yield start
    for one in made:
        one.end()
