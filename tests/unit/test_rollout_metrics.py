"""What the operator's own metrics say of rollouts."""

import re
from pathlib import Path

from prometheus_client import generate_latest
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


def test_the_alert_of_the_page_sees_a_rollback_in_the_first_pass_of_an_operator():
    """Its counter begins at 1 then: what is alerted on must be there without a scrape before."""
    page = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    alerts = {f"{name}{{{labels}}}" for name, labels in re.findall(r"`([a-z_:]+)\{([^`]*)\}[^`]* > 0`", page)}
    assert len(alerts) == 3

    def firing(world: Kubernetes) -> set[str]:
        known = Known()
        known.concerned(note_of({"type": "ADDED", "object": world.obj}))
        world.metrics.observe(Work(lambda _key: None, Schedule(lambda: 0.0), workers=1), known)
        return {line.split()[0] for line in generate_latest(world.metrics.registry).decode().splitlines()} & alerts

    assert firing(rolling()) == set()
    world = rolling()
    world.answers = [prometheus.Value(1.0)]
    world.metrics = Metrics()
    world.passes(1, seconds=10)
    assert outcomes(world) == {"RolledBack": 1}
    world.passes()
    assert firing(world) == {'slmops_objects{kind="ModelDeployment",phase="RolledBack"}'}


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
