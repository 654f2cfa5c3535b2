"""A real API server for the session, a namespace for every test, the operator as a child process."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml
from tests.kube.api import Access, Api, wait_for
from tests.kube.proxy import Proxy

from localkube.pki import Authority

ROOT = Path(__file__).resolve().parents[2]
NAMES = itertools.count(1)


@pytest.fixture(scope="session")
def access(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    """The API server, with our CRDs served. It is stopped at the end; if this process is killed, by the next run."""
    folder = tmp_path_factory.mktemp("access")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "e2e")}

    def localkube(command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "localkube", command, "--owner", str(os.getpid())],
            env=env, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    try:
        found = Access.read(Path(localkube("apiserver")), folder)
        _install_crds(Api(found))
        yield found
    finally:
        localkube("apiserver-down")


def _install_crds(api: Api) -> None:
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        crd = yaml.safe_load(path.read_text())
        name = crd["metadata"]["name"]
        url = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
        api.ask("PATCH", url, crd, content="application/apply-patch+yaml", fieldManager="test", force="true")

        def established(url: str = url) -> bool:
            conditions = api.ask("GET", url)["status"].get("conditions") or []
            assert not [c for c in conditions if c["type"] == "NonStructuralSchema"], conditions
            return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

        wait_for(f"{name} to be established", established)

    def served() -> bool:
        try:
            for plural in ("distillationjobs", "finetunejobs", "quantizedmodels", "modeldeployments"):
                api.ask("GET", f"/apis/slmops.dev/v1alpha1/{plural}")
        except Exception:  # noqa: BLE001  # not yet, whatever it says
            return False
        return True

    wait_for("our kinds to be served", served)


@pytest.fixture
def api(access: Access) -> Iterator[Api]:
    """A client in a namespace of its own. No namespace controller runs: what is in it is deleted here."""
    name = f"t{next(NAMES)}"
    client = Api(access, name)
    client.ask("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield client
    for kind in ("DistillationJob", "FineTuneJob", "QuantizedModel", "ModelDeployment", "Job", "Pod"):
        client.ask("DELETE", client.path(kind), {"gracePeriodSeconds": 0})
    client.http.close()


@pytest.fixture
def proxy(access: Access) -> Iterator[Proxy]:
    """A proxy of its own."""
    found = Proxy(access).start()
    yield found
    found.close()


def free_ports(count: int) -> list[int]:
    """Ports that nobody has: all are held until the last is found, so that no two are the same."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Operator:
    """The operator as a process of its own."""

    def __init__(self, server: str, folder: Path, namespace: str = "", ca: Path | None = None, **settings: str) -> None:
        self.folder, self.log = folder, folder / f"operator-{next(NAMES)}.log"
        trusted = {"certificate-authority": str(ca)} if ca else {}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server, **trusted}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }  # fmt: skip
        kubeconfig = folder / f"kubeconfig-{next(NAMES)}"
        kubeconfig.write_text(yaml.safe_dump(config))
        self.probes, self.metrics = free_ports(2)
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "operator"),
            "KUBECONFIG": str(kubeconfig),
            "SLMOPS_STORE": "oci://store:5000",
            "SLMOPS_NAMESPACES": namespace,
            "SLMOPS_PROBE_PORT": str(self.probes),
            "SLMOPS_METRICS_PORT": str(self.metrics),
            **settings,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "slmops.main"], env=env, stdout=log, stderr=log, cwd=folder
            )

    def get(self, path: str, *, metrics: bool = False) -> httpx.Response | None:
        port = self.metrics if metrics else self.probes
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=5)
        except httpx.HTTPError:
            return None

    def until_ready(self, seconds: float = 30.0) -> "Operator":
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            answer = self.get("/readyz")
            return answer is not None and answer.status_code == 200

        wait_for("the operator to be ready", ready, seconds)
        return self

    def healthy(self) -> bool:
        answer = self.get("/healthz")
        return self.process.poll() is None and answer is not None and answer.status_code == 200

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def terminate(self) -> float:
        """Seconds from SIGTERM to the end; the exit status has to be 0."""
        began = time.monotonic()
        self.process.terminate()
        assert self.process.wait(15) == 0, self.log.read_text()[-3000:]
        return time.monotonic() - began


@pytest.fixture(scope="module")
def operator(access: Access, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator for the whole module and for all namespaces."""
    proxy = Proxy(access).start()
    found = Operator(proxy.url, tmp_path_factory.mktemp("operator")).until_ready()
    yield found
    found.kill()
    proxy.close()
    check_log(found)


Start = Callable[..., Operator]


@pytest.fixture
def start(access: Access, api: Api, proxy: Proxy, tmp_path: Path) -> Iterator[Start]:
    """Start operators, behind the proxy, for the test's namespace; none outlives the test. Bugs in logs fail it."""
    started: list[Operator] = []

    def begin(**settings: str) -> Operator:
        operator = Operator(proxy.url, tmp_path, api.namespace, **settings)
        started.append(operator)
        return operator

    yield begin
    for operator in started:
        if operator.process.poll() is None:
            operator.kill()
    for operator in started:
        check_log(operator)


def check_log(operator: Operator) -> None:
    """No bug came to light."""
    text = operator.log.read_text()
    assert "Traceback" not in text, text[-4000:]


LONG = "test_outage.py"  # its outages last while the other tests run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that wait for a long time to be over come last."""
    items.sort(key=lambda item: item.path.name == LONG)


@dataclass
class Outage:
    """An API server that is away, for one operator with one object whose Job it has made."""

    api: Api
    proxy: Proxy
    operator: Operator
    before: int  # requests when it began
    began: float = field(default_factory=time.monotonic)

    def last(self, seconds: float) -> None:
        """Wait until it has lasted so long."""
        wait_for("a long outage", lambda: self.seconds > seconds, seconds + 10)

    @property
    def seconds(self) -> float:
        """For how long it has lasted."""
        return time.monotonic() - self.began


@pytest.fixture(scope="session")
def outages(access: Access, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outage]]:
    """Three of them: one answers 503 to everything, one does not even take connections, one has a new CA."""
    cuts = {"ill": _ill, "away": Proxy.refuse, "renewed": _renew}
    found = {name: _outage(access, tmp_path_factory.mktemp(name), name, cut) for name, cut in cuts.items()}
    yield found
    for outage in found.values():
        outage.operator.kill()
        outage.proxy.close()
        check_log(outage.operator)


def _ill(proxy: Proxy) -> None:
    proxy.answer = 503
    proxy.error_in_watches(500)  # so that every watch has to be opened anew


def _renew(proxy: Proxy) -> None:
    """Another CA in the same file, as the kubelet does it in a pod, and a certificate of it."""
    assert proxy.authority is not None
    proxy.refuse()
    _certify(proxy.authority.folder)
    proxy.listen()


def _certify(folder: Path) -> Authority:
    authority = Authority.create(folder)
    authority.server("proxy", "proxy", ["IP:127.0.0.1"])
    return authority


def _outage(access: Access, folder: Path, name: str, cut: Callable[[Proxy], None]) -> Outage:
    authority = _certify(folder / "pki") if cut is _renew else None
    proxy, api = Proxy(access, authority).start(), Api(access, name)
    api.ask("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    operator = Operator(proxy.url, folder, name, authority.cert("ca") if authority else None).until_ready()
    spec = {"base": {"uri": "oci://r/base:1"}, "dataset": {"uri": "oci://r/data:1"}}
    api.create("FineTuneJob", "tune", spec=spec)
    wait_for("the Job", lambda: api.get("Job", "tune-finetune"))
    cut(proxy)
    return Outage(api, proxy, operator, len(proxy.requests))


@pytest.fixture(scope="session", autouse=True)
def outages_begin_early(request: pytest.FixtureRequest) -> None:
    """If their own tests are to run at all."""
    if any(item.path.name == LONG for item in request.session.items):
        request.getfixturevalue("outages")
