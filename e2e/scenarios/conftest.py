"""The installed chart on the local node, a namespace for each test, and tiny models to work with."""

from collections.abc import Iterator

import pytest

from kit import chart, earlier
from kit.alone import BusyError
from kit.kubectl import CURRENT, Kubectl, KubectlError
from kit.objects import HUB, LATE
from kit.seeding import seed


@pytest.fixture(scope="session", autouse=True)
def _beside_nothing() -> Iterator[None]:
    """The local node's own: no demo, nothing of earlier runs. A cluster of the user's keeps its namespaces."""
    if CURRENT:
        yield
        return
    try:
        with earlier.beside_nothing():
            yield
    except (BusyError, KubectlError, OSError) as problem:
        pytest.exit(f"The scenarios did not start. {problem}", returncode=1)


@pytest.fixture(scope="session")
def installed() -> Iterator[Kubectl]:
    """The chart, installed; kubectl in its namespace. With CLUSTER=current the images are those of the file VALUES."""
    kube = Kubectl(chart.NAMESPACE)
    own = None if CURRENT else chart.local_images()
    with chart.lent(kube, f"store.plainHttp={{{LATE}}}", f"hfEndpoint={HUB}", images=own):
        yield kube


@pytest.fixture(scope="session")
def images(installed: Kubectl) -> dict[str, str]:
    """References of the operator's, trainer's, server's and router's images."""
    return chart.running_images(installed)


@pytest.fixture(scope="session")
def seeded(installed: Kubectl, images: dict[str, str]) -> str:
    """The root of the tiny artifacts: <root>/base:tiny and <root>/data:tiny."""
    return seed(installed, images["trainer"])


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
