"""The installed chart on the local node, a namespace for each test, and tiny models to work with."""

from collections.abc import Iterator

import pytest

from kit import chart
from kit.kubectl import Kubectl
from kit.objects import HUB, LATE
from kit.seeding import seed


@pytest.fixture(scope="session")
def images() -> dict[str, str]:
    """References of the images built here."""
    return chart.local_images()


@pytest.fixture(scope="session")
def installed(images: dict[str, str]) -> Kubectl:
    """The chart, installed; kubectl in its namespace."""
    kube = Kubectl(chart.NAMESPACE)
    chart.install(kube, f"store.plainHttp={{{LATE}}}", f"hfEndpoint={HUB}", images=images)
    return kube


@pytest.fixture(scope="session")
def seeded(installed: Kubectl) -> str:
    """The root of the tiny artifacts: <root>/base:tiny and <root>/data:tiny."""
    return seed(installed)


@pytest.fixture
def space(request: pytest.FixtureRequest, installed: Kubectl) -> Iterator[Kubectl]:
    """kubectl in an empty namespace under Pod Security restricted, removed afterwards unless the test failed."""
    name = "e2e-" + request.node.name.removeprefix("test_").replace("_", "-")[:40].rstrip("-")
    kube = installed.within(name)
    kube.delete("namespace", name)
    kube.apply(chart.namespace(name))
    before = request.session.testsfailed
    yield kube
    if request.session.testsfailed == before:
        kube.delete("namespace", name, wait=False)
