"""What the operator's own metrics say of rollouts."""

import re
from pathlib import Path

import pytest
from tests.unit.serving_world import ANALYSIS, KEY, Kubernetes, uri

from slmops.cluster.port import ClusterError, Key
from slmops.handlers.known import Known, note_of
from slmops.handlers.metrics import Metrics
from slmops.handlers.schedule import Schedule
from slmops.handlers.work import Work
from slmops.remote import prometheus

CANARY = {"steps": [{"weight": 50}], "analysis": {**ANALYSIS, "metrics": ANALYSIS["metrics"][:1]}}


def series(world: Kubernetes, counter: str, *labels: str) -> dict[tuple[str, ...], float]:
    """The counter's values by these labels; all are of the one object there is."""
    found = [s for family in world.metrics.registry.collect() for s in family.samples if s.name == f"{counter}_total"]
    assert all((s.labels["namespace"], s.labels["name"]) == ("ns", "chat") for s in found)
    return {tuple(s.labels[label] for label in labels): s.value for s in found}


def rolling() -> Kubernetes:
    world = Kubernetes(rollout=CANARY)
    world.passes()
    world.edit(model=uri("b"))
    world.passes()
    world.requests = 100
    return world


def outcomes(world: Kubernetes) -> dict[str, float]:
    return {outcome: value for (outcome,), value in series(world, "slmops_rollouts", "outcome").items() if value}


def verdicts(world: Kubernetes) -> dict[tuple[str, ...], float]:
    return series(world, "slmops_rollout_verdicts", "metric", "verdict")


def test_a_promotion_and_what_led_to_it():
    world = rolling()
    world.answers = [prometheus.Unreachable("down")]
    world.passes(seconds=10)
    world.passes(seconds=10)
    assert outcomes(world) == {"Started": 2, "Promoted": 2}
    assert verdicts(world) == {("errors", "Unreachable"): 1, ("errors", "Pass"): 1}


def test_a_rollback():
    world = rolling()
    world.answers = [prometheus.Value(1.0)]
    world.passes(seconds=10)
    assert outcomes(world) == {"Started": 2, "Promoted": 1, "RolledBack": 1}
    assert verdicts(world) == {("errors", "Fail"): 1}


def test_every_outcome_stands_at_0_from_the_first_pass():
    """A series that begins at 1 has no increase."""
    world = rolling()
    for _ in range(2):
        told = series(world, "slmops_rollouts", "outcome")
        assert (len(told), told[("RolledBack",)]) == (5, 0)
        world.metrics = Metrics()
        world.passes(1)


PAGE = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
ALERTS = re.findall(r"^\| `([a-z_:]+)(?:\{([^`]*)\})? > 0` \|", PAGE, re.MULTILINE)


def firing(world: Kubernetes) -> set[str]:
    """The alerts of the page that this world gives, by phase or else by name."""
    known = Known()
    known.concerned(note_of({"type": "ADDED", "object": world.obj}))
    world.metrics.observe(Work(lambda _key: None, Schedule(lambda: 0.0), workers=1), known)
    positive = [s for family in world.metrics.registry.collect() for s in family.samples if s.value > 0]
    found = set()
    for name, selector in ALERTS:
        labels = dict(re.findall(r'(\w+)="(\w+)"', selector))
        if any(s.name == name and labels.items() <= s.labels.items() for s in positive):
            found.add(labels.get("phase", name))
    return found


def late_at_first() -> Kubernetes:
    world = Kubernetes()
    world.passes(1)
    world.broken[world.status["candidate"]["revision"]] = {"phase": "Pending"}
    world.passes(seconds=601)
    return world


def silent_in_a_rollback() -> Kubernetes:
    world = rolling()
    world.deaf = set(world.agents)
    world.annotate(abort="*")
    world.passes(seconds=3600)
    return world


def without_figures() -> Kubernetes:
    world = rolling()
    world.answers = [prometheus.NoData("none")]
    world.passes(1, seconds=70)
    return world


def without_pods() -> Kubernetes:
    world = rolled_out()
    world.broken[world.status["stable"]["revision"]] = {"phase": "Pending"}
    world.passes()
    return world


def scaled_to_zero() -> Kubernetes:
    world = rolled_out()
    world.edit(replicas=0)
    world.passes()
    return world


def not_begun() -> Kubernetes:
    world = Kubernetes(model={"ref": {"kind": "QuantizedModel", "name": "q"}})
    world.passes()
    return world


def rolled_out() -> Kubernetes:
    world = Kubernetes()
    world.passes()
    return world


@pytest.mark.parametrize(
    ("there", "alerts"),
    [
        (late_at_first, {"Failed"}),
        (silent_in_a_rollback, {"RollingBack"}),
        (without_figures, {"Holding"}),
        (without_pods, {"slmops_deployments_unavailable"}),
        (scaled_to_zero, set()),
        (not_begun, set()),
        (rolled_out, set()),
        (rolling, set()),
    ],
)
def test_every_state_that_wants_somebody_has_an_alert_on_the_page(there, alerts):
    assert firing(there()) == alerts


def test_the_alert_of_the_page_sees_a_rollback_in_the_first_pass_of_an_operator():
    """Its counter begins at 1 then: what is alerted on must be there without a scrape before."""
    world = rolling()
    world.answers = [prometheus.Value(1.0)]
    world.metrics = Metrics()
    world.passes(1, seconds=10)
    assert outcomes(world) == {"RolledBack": 1}
    world.passes()
    assert firing(world) == {"RolledBack"}


def test_a_third_revision_and_the_way_home():
    world = rolling()
    world.edit(model=uri("c"))
    world.passes()
    world.edit(model=uri("a"))
    world.passes()
    assert outcomes(world) == {"Started": 3, "Promoted": 1, "Superseded": 1, "Reverted": 1}


def test_what_could_not_be_written_is_not_counted_twice():
    world = rolling()
    world.answers = [prometheus.Value(1.0)] * 2
    world.cluster.refuse["ModelDeployment"] = ClusterError(503, "Unavailable", "later")
    world.now = world.now.replace(minute=world.now.minute + 1)
    world.try_pass()
    world.passes()
    assert outcomes(world)["RolledBack"] == 1
    assert verdicts(world) == {("errors", "Fail"): 1}


def test_series_of_metrics_that_the_analysis_has_no_more_go():
    """Whoever may edit one deployment would fill the operator's memory with names; and so would build numbers."""
    world = rolling()
    for number in range(3):
        rule = {**ANALYSIS["metrics"][0], "name": f"build-{number}"}
        world.edit(rollout={"steps": [{"weight": 50}], "analysis": {**ANALYSIS, "metrics": [rule]}})
        for answer in (prometheus.NoData("none"), prometheus.Unreachable("down")):
            world.answers = [answer]
            world.passes(seconds=10)
        assert verdicts(world) == {(f"build-{number}", "NoData"): 1, (f"build-{number}", "Unreachable"): 1}
    world.edit(rollout=CANARY)
    world.answers = [prometheus.NoData("none")]
    world.passes(seconds=10)
    assert verdicts(world) == {("errors", "NoData"): 1}


def test_a_deployment_that_is_gone_leaves_no_series():
    world = rolling()
    world.metrics.on_gone(Key("FineTuneJob", "ns", "chat"))
    world.metrics.on_gone(Key("ModelDeployment", "else", "chat"))
    assert outcomes(world)
    world.metrics.on_gone(KEY)
    assert (series(world, "slmops_rollouts", "outcome"), verdicts(world)) == ({}, {})
