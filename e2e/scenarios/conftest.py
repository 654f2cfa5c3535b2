"""The installed chart on the local node, a namespace for each test, and tiny models to work with."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from kit import chart, earlier
from kit.alone import BusyError
from kit.kubectl import CURRENT, Kubectl, KubectlError
from kit.objects import HUB, LATE, STORE
from kit.seeding import seed


def pytest_sessionstart(session: pytest.Session) -> None:
    """The local node's own: no demo, nothing of earlier runs. A cluster of the user's keeps its namespaces."""
    if CURRENT and session.config.getoption("numprocesses", None):  # some take the chart away from under the others
        pytest.exit("CLUSTER=current: one after the other, without -n.", returncode=1)
    if CURRENT or "workerinput" in vars(session.config):  # a worker's process is inside its starter's session
        return
    held = ExitStack()
    session.config.add_cleanup(held.close)
    try:
        held.enter_context(earlier.beside_nothing())
    except (BusyError, KubectlError, OSError) as problem:
        pytest.exit(f"The scenarios did not start. {problem}", returncode=1)


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str], AbstractContextManager[bool]]:
    """For a block that one of the workers side by side is to do, and none to do without: whether it is this one's."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # the workers'

    @contextmanager
    def turn(name: str) -> Iterator[bool]:
        with (folder / f"{name}.done").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield not file.seek(0, os.SEEK_END)
            file.write("done")

    return turn


@pytest.fixture(scope="session")
def installed(first: Callable[[str], AbstractContextManager[bool]]) -> Iterator[Kubectl]:
    """The chart, installed; kubectl in its namespace. With CLUSTER=current the images are those of the file VALUES."""
    kube = Kubectl(chart.NAMESPACE)
    own = None if CURRENT else chart.local_images()
    with ExitStack() as held:
        with first("installed") as needed:
            if needed:
                held.enter_context(chart.lent(kube, f"store.plainHttp={{{LATE}}}", f"hfEndpoint={HUB}", images=own))
        yield kube


@pytest.fixture(scope="session")
def images(installed: Kubectl) -> dict[str, str]:
    """References of the operator's, trainer's, server's and router's images."""
    return chart.running_images(installed)


@pytest.fixture(scope="session")
def seeded(installed: Kubectl, images: dict[str, str], first: Callable[[str], AbstractContextManager[bool]]) -> str:
    """The root of the tiny artifacts: <root>/base:tiny and <root>/data:tiny."""
    with first("seeded") as needed:
        if needed:
            seed(installed, images["trainer"])
    return STORE


@pytest.fixture
def gpu_node(installed: Kubectl) -> str:
    """The local node, whose status may be given a GPU."""
    if CURRENT:
        pytest.skip("CLUSTER=current: its nodes are left alone")
    return str(installed.list("nodes")[0]["metadata"]["name"])


@pytest.fixture
def space(request: pytest.FixtureRequest, installed: Kubectl) -> Iterator[Kubectl]:
    """kubectl in an empty namespace under Pod Security restricted, removed afterwards unless the test failed."""
    name = "e2e-" + request.node.name.removeprefix("test_").replace("_", "-")[:40].rstrip("-")
    kube = installed.within(name)
    chart.fresh_namespace(kube)
    before = request.session.testsfailed
    yield kube
    if request.session.testsfailed == before:
        kube.delete("namespace", name, wait=False)
