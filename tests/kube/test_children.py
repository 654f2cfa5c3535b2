"""What a ModelDeployment is made of comes back as soon as somebody takes it away, and not at the next resync."""

from tests.kube.api import Api, Object, wait_for
from tests.kube.conftest import Start
from tests.kube.serving import Nodes
from tests.kube.test_rollout_killed import CHAT, SLOW, model, phase, stable

from slmops.api import keys
from slmops.build.router import records_of
from slmops.build.serving import RESTARTED


def test_a_service_that_is_deleted_comes_back_at_once(api: Api, start: Start) -> None:
    start(SLMOPS_ROUTER_KEY="k" * 32).until_ready()
    api.create("ModelDeployment", "chat", spec={"model": model("a")})
    with Nodes(api):
        wait_for("it to serve", lambda: phase(api) == "Stable" and api.reason(*CHAT) == "Serving", seconds=120)
        for name in ("chat", f"chat-{stable(api)}"):
            old = api.need("Service", name)
            api.delete("Service", name)
            back = wait_for(f"Service {name}", lambda name=name: api.get("Service", name))
            assert back["metadata"]["uid"] != old["metadata"]["uid"]


def test_a_label_that_is_added_to_a_selector_goes_at_once_and_one_that_is_added_elsewhere_stays(
    api: Api, start: Start
) -> None:
    """With it the Service finds no router, and the budget protects nobody."""
    start(SLMOPS_ROUTER_KEY="k" * 32).until_ready()
    api.create("ModelDeployment", "chat", spec={"model": model("a"), "replicas": 2})
    with Nodes(api):
        wait_for("it to serve", lambda: phase(api) == "Stable" and api.reason(*CHAT) == "Serving", seconds=120)
        more = {"extra": "label"}
        selectors = {
            ("PodDisruptionBudget", "chat-servers"): {"matchLabels": more},  # seen by the pass that a Service wakes
            ("Service", "chat"): more,
            ("Service", f"chat-{stable(api)}"): more,
        }
        before = {key: api.need(*key)["spec"] for key in selectors}
        for key, selector in selectors.items():
            api.patch(*key, {"metadata": {"labels": more}, "spec": {"selector": selector}})
        for key, spec in before.items():
            wait_for(f"{key}", lambda key=key, spec=spec: api.need(*key)["spec"] == spec)
            assert api.need(*key)["metadata"]["labels"]["extra"] == "label"


def test_an_autoscaler_finds_the_pods_by_the_scale_subresource(api: Api, start: Start) -> None:
    start(SLMOPS_ROUTER_KEY="k" * 32).until_ready()
    api.create("ModelDeployment", "chat", spec={"model": model("a"), "rollout": SLOW})
    with Nodes(api):
        wait_for("it to serve", lambda: phase(api) == "Stable" and api.reason(*CHAT) == "Serving", seconds=120)
        old = stable(api)
        api.patch("ModelDeployment", "chat", {"spec": {"model": model("b")}})
        wait_for("the canary", lambda: api.status(*CHAT).get("weight") == 50, seconds=120)
        scale = api.ask("GET", api.path("ModelDeployment", "chat", "scale"))
        found = api.ask("GET", api.path("Pod"), labelSelector=scale["status"]["selector"])["items"]
        revisions = {old, api.status(*CHAT)["candidate"]["revision"]}
        assert {pod["metadata"]["labels"][keys.LABEL_REVISION] for pod in found} == revisions


def test_records_of_the_version_before_are_sealed_and_touch_nothing(api: Api, start: Start) -> None:
    key = "k" * 32
    start(SLMOPS_ROUTER_KEY=key).until_ready()
    owner = api.create("ModelDeployment", "chat", spec={"model": model("a")})

    def sealed() -> bool:
        return bool(records_of(owner, api.need("ConfigMap", "chat-router"), key))

    with Nodes(api):
        wait_for("it to serve", lambda: phase(api) == "Stable" and api.reason(*CHAT) == "Serving", seconds=120)
        name, record = f"chat-{stable(api)}", f"deployment-{stable(api)}"
        restarted(api, name, "2026-05-01T00:00:00Z")
        before = api.need("Deployment", name)
        for data in ({f"{record}.seal": None}, {f"{record}.json": '{"kind": "Deployment"}'}):
            assert sealed()
            assert not records_of(owner, api.patch("ConfigMap", "chat-router", {"data": data}), key)
            api.delete("Service", "chat")  # so that a pass looks
            wait_for("the seal", sealed)
        assert api.need("Deployment", name)["spec"] == before["spec"]
        again = restarted(api, name, "2026-05-02T00:00:00Z")
        old = api.need("Service", "chat")
        api.delete("Service", "chat")
        wait_for("a pass", lambda: (api.get("Service", "chat") or old)["metadata"]["uid"] != old["metadata"]["uid"])
        wait_for("its end", lambda: api.reason(*CHAT) == "Serving")
        assert api.need("Deployment", name)["spec"] == again["spec"]


def restarted(api: Api, name: str, time: str) -> Object:
    """The Deployment after `kubectl rollout restart`."""
    note = {"annotations": {RESTARTED: time}}
    return api.patch("Deployment", name, {"spec": {"template": {"metadata": note}}})


def test_records_that_are_lost_take_no_failing_pod_away(api: Api, start: Start) -> None:
    """Only a real API server adds its defaults to a Deployment, from which a lost record is made again."""
    key = "k" * 32
    start(SLMOPS_ROUTER_KEY=key).until_ready()
    limits = {"cpu": 2, "memory": "1024Mi"}
    owner = api.create("ModelDeployment", "chat", spec={"model": model("a"), "pod": {"resources": {"limits": limits}}})
    live = wait_for(
        "the Deployment",
        lambda: next((one for one in api.list("Deployment") if keys.LABEL_REVISION in one["metadata"]["labels"]), None),
    )
    name, template = live["metadata"]["name"], live["spec"]["template"]
    api.create("Pod", f"{name}-0", metadata={"labels": template["metadata"]["labels"]}, spec=template["spec"])
    nowhere = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 free"}
    api.patch("Pod", f"{name}-0", {"status": {"phase": "Pending", "conditions": [nowhere]}}, "status")
    wait_for("its reason", lambda: api.reason(*CHAT) == "Unschedulable")
    before = records_of(owner, api.need("ConfigMap", "chat-router"), key)
    (revision,) = before
    api.patch("ConfigMap", "chat-router", {"data": {f"deployment-{revision}.seal": None}})
    api.delete("Service", "chat")  # so that a pass looks
    wait_for("the record", lambda: records_of(owner, api.need("ConfigMap", "chat-router"), key) == before)
    assert api.need("Deployment", name)["metadata"]["uid"] == live["metadata"]["uid"]
