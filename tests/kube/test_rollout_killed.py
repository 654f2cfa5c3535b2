"""A ModelDeployment whose operator is killed right after every single write, against one that is left in peace."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.kube.api import Api, Object, wait_for
from tests.kube.conftest import Operator, Start
from tests.kube.proxy import Proxy
from tests.kube.serving import Nodes

from slmops.api import keys

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
CHILDREN = ("Deployment", "Service", "ConfigMap", "Secret", "PodDisruptionBudget")
QUICK = {"steps": [{"weight": 50, "pauseSeconds": 1}], "scaleDownDelaySeconds": 0}
SLOW = {"steps": [{"weight": 50, "pauseSeconds": 600}], "scaleDownDelaySeconds": 0}


def model(letter: str) -> Object:
    return {"uri": f"oci://store:5000/m@sha256:{letter * 64}"}


class Mortal:
    """The operator; where `dies`, each one is killed right after its first write, and another one takes over."""

    def __init__(self, start: Start, proxy: Proxy, *, dies: bool) -> None:
        self._start, self._proxy, self._dies, self.lives = start, proxy, dies, 0
        self._operator: Operator | None = None
        proxy.after_write = self._after_write
        self.look_after()

    def look_after(self) -> None:
        if self._operator is None or self._operator.process.poll() is not None:
            self.lives += 1
            self._operator = self._start(SLMOPS_ROUTER_KEY="k" * 32)

    def _after_write(self, number: int) -> bool:
        if self._dies and self._operator and not self._proxy.writes[-1].endswith("/events"):
            self._operator.kill()
        return False

    def until(self, what: str, probe: Callable[[], Any]) -> None:
        def look() -> Any:
            self.look_after()
            return probe()

        wait_for(what, look, 300)

    def end(self) -> None:
        self._proxy.after_write = lambda number: False
        if self._operator and self._operator.process.poll() is None:
            self._operator.kill()


def story(api: Api, operator: Mortal, nodes: Nodes) -> Object:
    """A first revision, a second one that is promoted, a third one that is called off; how things stand at the end."""
    api.create("ModelDeployment", "chat", spec={"model": model("a"), "rollout": QUICK})
    operator.until("the first revision", lambda: phase(api) == "Stable" and api.reason(*CHAT) == "Serving")
    first = stable(api)
    api.patch(*CHAT, {"spec": {"model": model("b")}})
    operator.until("the second revision", lambda: stable(api) not in ("", first) and phase(api) == "Stable")
    api.patch(*CHAT, {"spec": {"model": model("c"), "rollout": SLOW}})
    # Not the weight alone: called off before the routers obeyed, it would end without a count of its answers.
    operator.until("the third revision's requests", lambda: (api.status(*CHAT).get("rollout") or {}).get("routedAt"))
    third = api.status(*CHAT)["candidate"]["revision"]
    api.patch(*CHAT, {"metadata": {"annotations": {keys.ANNOTATION_ABORT: third}}})
    operator.until("the rollback", lambda: phase(api) == "RolledBack" and not api.get("Deployment", f"chat-{third}"))
    routes = [{stable(api): 100}]
    operator.until("rest", lambda: nodes.weights() == routes and not api.status(*CHAT)["rollout"]["retiring"])
    status = {name: value for name, value in api.status(*CHAT).items() if name != "selector"}  # which has the uid
    return {"status": timeless(status), "children": children(api), "weights": nodes.weights()}


CHAT = ("ModelDeployment", "chat")


def phase(api: Api) -> str:
    return str((api.status(*CHAT).get("rollout") or {}).get("phase"))


def stable(api: Api) -> str:
    return str((api.status(*CHAT).get("stable") or {}).get("revision", ""))


def timeless(value: Any) -> Any:
    text = {key: timeless(inner) for key, inner in value.items()} if isinstance(value, dict) else value
    if isinstance(text, list):
        return [timeless(inner) for inner in text]
    return TIME.sub("TIME", text) if isinstance(text, str) else text


def children(api: Api) -> list[Any]:
    """What is left in the namespace: kind, name, and the part that was asked for."""
    return [
        (kind, found["metadata"]["name"], found["spec"].get("replicas") if kind == "Deployment" else None)
        for kind in CHILDREN
        for found in api.list(kind)
    ]


@pytest.fixture
def nodes(api: Api) -> Iterator[Nodes]:
    with Nodes(api) as found:
        yield found


def clear(api: Api) -> None:
    for kind in ("ModelDeployment", *CHILDREN):
        for found in api.list(kind):
            api.delete(kind, found["metadata"]["name"])


@pytest.mark.slow
def test_killed_right_after_every_write_it_ends_as_if_nothing_had_happened(
    api: Api, start: Start, proxy: Proxy, nodes: Nodes
) -> None:
    left_alone = Mortal(start, proxy, dies=False)
    undisturbed = story(api, left_alone, nodes)
    left_alone.end()
    writes = [write for write in proxy.writes if not write.endswith("/events")]
    clear(api)
    wait_for("no pod is left", lambda: not api.list("Pod"))
    killed = Mortal(start, proxy, dies=True)
    state = story(api, killed, nodes)
    killed.end()
    assert killed.lives > len(writes) / 2, writes
    assert state == undisturbed
