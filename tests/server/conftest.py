import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # test modules are imported by path, their helper needs one

import random_decoder
from server_harness import TINY, Server

from slmops_trainer import export_gguf


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as they found it."""
    running = Server(tmp_path_factory.mktemp("server") / "log", "--slots", "4", "--max-queue", "8")
    yield running
    running.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server of one's own."""
    made: list[Server] = []

    def starter(*args: str, **more: object) -> Server:
        made.append(Server(tmp_path / f"log{len(made)}", *args, **more))  # type: ignore[arg-type]
        return made[-1]

    yield starter
    for one in made:
        one.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many as the machine lets this process open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="session")
def tiny() -> Path:
    return TINY


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a small decoder as GGUF, by its family and the type of its weights."""
    top = tmp_path_factory.mktemp("gguf")

    def maker(family: str, kind: str) -> Path:
        out = top / f"{family}-{kind}"
        if not out.exists():
            export_gguf.export(random_decoder.write(top / family, family, TINY), out, kind)
        return out

    return maker
