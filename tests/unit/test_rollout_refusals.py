"""Writes that are refused, one after the other: what serves is looked after, and weight is never left behind."""

from datetime import timedelta

import pytest
from tests.unit.rollout_world import KilledError
from tests.unit.serving_world import CANARY, KEY, Kubernetes, uri

from slmops.cluster.port import ClusterError, Key
from slmops.reconcile.state import Routes
from slmops.remote import prometheus

INVALID = ClusterError(422, "Invalid", "cpu: must be less than or equal to cpu limit")
QUOTA = ClusterError(403, "Forbidden", "exceeded quota: small")
HOOK = ClusterError(500, "InternalError", "failed calling webhook: no endpoints")
POLICY = ClusterError(400, "", 'admission webhook "x" denied the request: label team is missing')
LONG = ClusterError(403, "TooLong", "exceeded quota: " + ", ".join(60 * ["requests.cpu"]))
AWAY = ClusterError(0, "NoAnswer", "The API server does not answer.")


def rolling() -> Kubernetes:
    """Revision b has half of the requests and is measured."""
    world = Kubernetes(rollout=CANARY)
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    assert world.status["weight"] == 50
    return world


def weights(world: Kubernetes) -> dict[str, int]:
    routes = next(iter(world.agents.values()))
    return {r["revision"]: r["weight"] for r in routes["revisions"]}


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (INVALID, "Stalled", "Rejected"),
        (QUOTA, "Reconciling", "QuotaExceeded"),
        (POLICY, "Reconciling", "PolicyDenied"),
    ],
)
def test_a_third_revision_that_is_refused_leaves_no_weight_with_the_second(error, kind, reason):
    world = rolling()
    stable, second = world.status["stable"]["revision"], world.status["candidate"]["revision"]
    world.cluster.refusing_new["Deployment"] = error
    world.edit(model=uri("c"))
    world.passes()
    assert (weights(world)[stable], weights(world).get(second, 0)) == (100, 0)
    assert world.condition(kind)[:2] == ("True", reason)
    assert error.message in world.condition(kind)[2]
    assert world.status["observedGeneration"] == world.obj["metadata"]["generation"]
    assert world.status["rollout"]["phase"] == "Preparing"
    assert world.condition("Available")[0] == "True"
    world.passes(seconds=601)
    assert world.status["phase"] == "RolledBack"
    assert error.message in world.condition("Stalled")[2]
    assert second not in world.deployments()


@pytest.mark.parametrize("error", [QUOTA, HOOK, INVALID, LONG, POLICY], ids=lambda error: error.reason)
@pytest.mark.parametrize("which", ["refusing", "refusing_new"])
def test_a_first_revision_that_is_refused_for_long_still_says_why(error, which):
    world = Kubernetes()
    if which == "refusing_new":  # the router may be made
        world.passes(1)
        world.cluster.delete(Key("Deployment", "ns", f"chat-{world.status['candidate']['revision']}"))
    getattr(world.cluster, which)["Deployment"] = error
    world.passes()
    assert error.message in world.condition("Ready")[2]
    world.passes(seconds=601)
    late = world.status
    for seconds in (0, 60, 600):
        world.passes(seconds=seconds)
        assert world.condition("Stalled")[:2] == ("True", "ProgressDeadlineExceeded")
        for text in (error.message, "Not ready within 600 s", "Deployment chat-"):
            assert world.condition("Ready")[2].count(text) == 1
    assert world.status == late


def test_a_first_revision_that_is_late_tells_of_another_refusal_than_before():
    world = Kubernetes()
    world.cluster.refusing["Deployment"] = QUOTA
    world.passes()
    world.passes(seconds=601)
    world.cluster.refusing["Deployment"] = INVALID
    world.passes()
    said = world.condition("Ready")[2]
    assert (INVALID.message in said, QUOTA.message in said, said.count("Not ready within")) == (True, False, 1)
    world.cluster.refusing.clear()
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "Serving")


def test_a_revision_that_is_refused_is_made_as_soon_as_it_may_be():
    world = Kubernetes()
    world.passes()
    world.cluster.refusing["Deployment"] = QUOTA
    world.edit(model=uri("b"))
    assert world.passes() <= 5
    world.cluster.refusing.clear()
    world.passes()
    assert world.status["weight"] == 10


def test_the_stable_revision_is_scaled_whatever_is_wrong_with_the_new_one():
    for letter in "bcdef":  # children are applied in the order of their names: before and after the stable one
        world = Kubernetes()
        world.passes()
        stable = world.status["stable"]["revision"]
        world.cluster.refusing_new["Deployment"] = INVALID
        world.edit(model=uri(letter), replicas=5)
        world.passes()
        assert world.deployments() == {stable: 5}


@pytest.mark.parametrize("error", [INVALID, QUOTA, HOOK, AWAY], ids=lambda error: error.reason)
@pytest.mark.parametrize("kind", ["ConfigMap", "Secret", "Service", "Deployment", "PodDisruptionBudget"])
def test_rolling_back_takes_the_weight_away_whatever_else_is_refused(kind, error):
    world = rolling()
    second = world.status["candidate"]["revision"]
    world.cluster.tamper(kind)  # so that there is something to write
    world.cluster.refusing[kind] = error
    world.annotate(abort=second)
    for _ in range(3):
        world.try_pass()
    assert weights(world).get(second, 0) == 0
    world.cluster.refusing.clear()
    world.passes()
    assert world.status["phase"] == "RolledBack"


def failing() -> Kubernetes:
    """The next measurement fails revision b."""
    world = rolling()
    world.requests, world.answers = 100, [prometheus.Value(0.2)]
    world.now += timedelta(seconds=10)
    return world


@pytest.mark.parametrize("error", [INVALID, QUOTA, HOOK, AWAY], ids=lambda error: error.reason)
def test_rolling_back_takes_the_weight_away_though_no_status_can_be_written(error):
    world = failing()
    world.cluster.refusing["ModelDeployment"] = error
    world.try_pass()
    assert weights(world)[world.status["candidate"]["revision"]] == 0


def test_a_kill_between_the_routers_and_the_end_of_the_pass_gives_nothing_back(monkeypatch):
    world = failing()

    def push(routes: Routes) -> None:
        world.agents[routes.url] = routes.body
        raise KilledError

    monkeypatch.setattr(world, "push", push)
    with pytest.raises(KilledError):
        world.driver().run(KEY)
    monkeypatch.undo()
    for _ in range(3):
        world.try_pass()
        assert weights(world).get(world.status["candidate"]["revision"], 0) == 0
    assert world.status["phase"] == "RolledBack"
    assert "Metric errors" in world.condition("Stalled")[2]


def test_a_router_that_refuses_its_routes_keeps_no_other_from_them():
    world = rolling()
    second = world.status["candidate"]["revision"]
    assert len(world.agents) == 2
    for deaf in sorted(world.agents):
        world = rolling()
        world.deaf = {deaf}
        world.annotate(abort=second)
        world.passes()
        (other,) = set(world.agents) - {deaf}
        assert {r["revision"]: r["weight"] for r in world.agents[other]["revisions"]}[second] == 0
        assert world.status["rollout"]["phase"] == "RollingBack"
        assert "refuses" in world.condition("Reconciling")[2]
        world.deaf = set()
        world.passes()
        assert world.status["phase"] == "RolledBack"


SERVICE = Key("Service", "ns", "chat")


def test_it_is_not_ready_while_its_address_is_somebody_elses():
    """Who waits for Ready would send its requests there."""
    world = Kubernetes()
    foreign = {"kind": "Service", "metadata": {"name": "chat", "namespace": "ns"}, "spec": {"mine": True}}
    world.cluster.put(foreign)
    world.passes()
    assert world.condition("Ready")[:2] == ("False", "NameConflict")
    assert world.condition("Available")[:2] == ("False", "NotAnswering")  # else a distillation would ask there
    assert world.cluster.objects[SERVICE]["spec"] == {"mine": True}
    before = world.status
    world.passes(seconds=60)
    assert world.status == before
    world.cluster.delete(SERVICE)
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "Serving")
    assert world.condition("Available")[:2] == ("True", "Answering")


def test_it_is_not_ready_before_its_address_may_be_made_but_stays_so_while_that_may_not_be_changed():
    world = Kubernetes()
    world.cluster.refusing["Service"] = QUOTA
    world.passes()
    assert world.condition("Ready")[:2] == ("False", "QuotaExceeded")
    world.cluster.refusing.clear()
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "Serving")
    world.cluster.tamper("Service")
    world.cluster.refusing["Service"] = QUOTA
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "QuotaExceeded")
    assert world.condition("Reconciling")[0] == "True"


@pytest.mark.parametrize("role", ["servers", "routers"])
def test_a_foreign_budget_of_a_name_that_is_not_needed_hinders_nothing(role):
    world = Kubernetes(replicas=1)
    budget = Key("PodDisruptionBudget", "ns", f"chat-{role}")
    metadata = {"name": budget.name, "namespace": "ns"}
    world.cluster.put({"kind": budget.kind, "metadata": metadata, "spec": {"mine": True}})
    world.passes()
    assert world.condition("Ready")[:2] == ("True", "Serving")
    assert world.condition("Reconciling") == ("", "", "")
    assert world.cluster.objects[budget]["spec"] == {"mine": True}
    world.edit(replicas=2)
    world.passes()
    assert world.condition("Reconciling")[:2] == ("True", "NameConflict")
    assert world.cluster.objects[budget]["spec"] == {"mine": True}


def test_failures_are_counted_while_a_child_is_refused():
    world = rolling()
    world.cluster.tamper("PodDisruptionBudget")
    world.cluster.refusing["PodDisruptionBudget"] = QUOTA
    world.requests = 100
    world.passes(seconds=10)
    assert world.queries
    assert world.status["rollout"]["passes"] == 1 or world.status["rollout"]["phase"] == "Draining"


def test_a_status_that_cannot_be_written_costs_nothing():
    world = rolling()
    before = world.status
    world.cluster.refusing["ModelDeployment"] = AWAY
    world.annotate(abort="*")
    world.try_pass()
    assert world.status["rollout"] == before["rollout"]
    world.cluster.refusing.clear()
    world.passes()
    assert world.status["phase"] == "RolledBack"


@pytest.mark.parametrize("kind", ["Service", "Deployment"])
@pytest.mark.parametrize("error", [HOOK, AWAY], ids=lambda error: error.reason)
def test_nothing_of_an_old_revision_is_left_behind_when_its_removal_breaks_off(kind, error):
    world = Kubernetes(rollout={"steps": [], "scaleDownDelaySeconds": 60})
    world.passes()
    old = world.status["stable"]["revision"]
    world.edit(model=uri("b"))
    world.passes()
    world.now += timedelta(seconds=61)
    world.cluster.refusing[kind] = error
    for _ in range(3):
        world.try_pass()
    world.cluster.refusing.clear()
    for _ in range(3):
        world.try_pass()
    assert [key for key in world.cluster.objects if old in key.name] == []


def left(world: Kubernetes, revision: str) -> list[Key]:
    """What there is of a revision: objects, and its record."""
    records = world.cluster.objects[Key("ConfigMap", "ns", "chat-router")]["data"]
    assert not [name for name in records if revision in name]
    return [key for key in world.cluster.objects if revision in key.name]


def test_nothing_of_a_revision_is_left_behind_that_was_never_whole():
    """Its Deployment, by which a revision is known, could not be made before another one was wanted."""
    world = rolling()
    world.cluster.refusing_new["Deployment"] = QUOTA
    world.edit(model=uri("c"))
    world.try_pass()
    third = world.status["candidate"]["revision"]
    assert Key("Service", "ns", f"chat-{third}") in world.cluster.objects
    world.cluster.refusing_new.clear()
    world.edit(model=uri("a"))
    for _ in range(3):
        world.try_pass()
    assert left(world, third) == []


def test_nothing_is_left_behind_of_a_revision_whose_deployment_somebody_deleted():
    world = rolling()
    second = world.status["candidate"]["revision"]
    world.cluster.refusing["Service"] = QUOTA
    world.edit(model=uri("a"))
    world.try_pass()
    world.cluster.refusing.clear()
    world.cluster.delete(Key("Deployment", "ns", f"chat-{second}"))
    for _ in range(3):
        world.try_pass()
    assert left(world, second) == []
