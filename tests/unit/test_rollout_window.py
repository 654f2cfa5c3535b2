"""How far back a measurement looks: to every request that was not measured yet, and to enough of them."""

from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta

import pytest
from tests.unit.rollout_world import ERRORS, START, RouterPod, World, analysis, revision, serving, spec, steps

from slmops.api.deployment import ModelDeploymentStatus, RolloutStatus, Verdict
from slmops.api.times import stamp
from slmops.reconcile.deployment_measure import measure
from slmops.remote.prometheus import Answer, NoData
from slmops.rollout.machine import decide, measurement_window
from slmops.rollout.seen import Router, Seen


def looks_back(seconds: float, samples: int, **status: object) -> int:
    """So long after the step began, with so many answers since, of which 20 are asked for; windowSeconds is 60."""
    said = ModelDeploymentStatus(candidate=revision("bbb"), weight=10, rollout=RolloutStatus(phase="Step", **status))
    seen = Seen(routers=(Router(epoch="bbb/Step/0/10", answered={"bbb": samples}),))
    how = spec(steps=steps(10), analysis=analysis(window_seconds=60, min_samples=20))
    return measurement_window(how, said, seen, START + timedelta(seconds=seconds))


@pytest.mark.parametrize(("seconds", "wanted"), [(0, 1), (7.9, 7), (59, 59), (60, 60)])
def test_a_query_never_looks_back_to_before_the_step(seconds, wanted):
    before = stamp(START - timedelta(hours=1))
    assert looks_back(seconds, 1000, entered_at=before, routed_at=stamp(START)) == wanted
    assert looks_back(seconds, 1000, entered_at=stamp(START)) == wanted
    assert looks_back(seconds, 1000, entered_at=before, routed_at=stamp(START), answered_at=before) == wanted


@pytest.mark.parametrize(
    ("seconds", "samples", "answered", "wanted"),
    [
        (1200, 1000, None, 1200),  # nothing was measured yet
        (1200, 1000, 900, 300),  # intervalSeconds are more than windowSeconds
        (1200, 1000, 1190, 60),
        (1200, 20, 1190, 1200),  # one request a minute
        (2400, 40, 2390, 1200),
        (1200, 0, 1190, 60),
    ],
)
def test_a_query_looks_back_to_the_last_answer_and_to_enough_requests(seconds, samples, answered, wanted):
    asked = stamp(START + timedelta(seconds=seconds - 10))  # be it in vain
    at = stamp(START + timedelta(seconds=answered)) if answered else None
    assert looks_back(seconds, samples, routed_at=stamp(START), measured_at=asked, answered_at=at) == wanted


def test_a_status_of_before_goes_on_from_its_last_measurement():
    asked, verdicts = stamp(START + timedelta(seconds=1190)), [Verdict(name="e", verdict="Pass", message="")]
    assert looks_back(1200, 1000, routed_at=stamp(START), measured_at=asked, verdicts=verdicts) == 60


@pytest.mark.parametrize(
    ("hours", "samples", "wanted"),
    [
        (0.5, 20, "[1800s])) >= 10)"),
        (6, 20, "[21600s])) >= 10)"),
        (12.5, 500, "[21600s])) >= 120)"),  # 40 an hour: of the last six hours it knows 240
        (12.6, 20, "[21600s])) >= 4)"),
        (500, 20, "[21600s])) >= 1)"),
    ],
)
def test_no_more_is_asked_of_prometheus_than_it_may_still_know(hours, samples, wanted):
    """It keeps six hours: of a candidate with fewer answers in these it never knew half of minSamples."""
    asked: list[str] = []

    def query(_url: str, promql: str, _time: object) -> Answer:
        asked.append(promql)
        return NoData("none")

    said = ModelDeploymentStatus(candidate=revision("bbb"), rollout=RolloutStatus(routed_at=stamp(START)))
    how = spec(steps=steps(10), analysis=analysis(min_samples=samples))
    obj = {"metadata": {"namespace": "ns", "name": "chat"}}
    (verdict,) = measure(obj, how, said, "http://p", START + timedelta(hours=hours), 60, query)
    assert asked[0].endswith(wanted)
    assert f"seen {wanted.strip(')').rpartition(' ')[2]} answers" in verdict.message


def quiet(failing: Collection[int], minutes: int, failure_limit: int, most: float) -> World:
    """The candidate gets one request a minute, of which these fail."""
    metric = ERRORS.model_copy(update={"max": most})
    how = analysis(metrics=[metric], failure_limit=failure_limit, passes=2)
    world = serving(steps=steps(10, pause=86400), analysis=how)
    world.deploy("bbb")
    world.requests = []
    for minute in range(minutes):
        for _ in range(6):
            world.after(10)
        world.serve(10)
        world.requests.append((world.now, minute in failing))
        world.passes()
    return world


def test_a_quiet_candidate_that_failed_before_it_was_measured_is_rolled_back():
    """Its last request is good: nothing else would be in a window of a minute."""
    assert quiet(range(18), 21, failure_limit=0, most=0.5).phase == "RolledBack"
    assert quiet(range(60), 60, failure_limit=1, most=0.5).phase == "RolledBack"


def test_one_bad_request_of_a_quiet_candidate_is_not_all_that_there_is():
    world = quiet([25], 50, failure_limit=0, most=0.1)
    assert (world.phase, world.status.rollout.failures) == ("Step", 0)
    assert world.status.rollout.passes > 100


def test_one_bad_request_of_a_quiet_candidate_is_one_failure():
    world = quiet([25], 60, failure_limit=1, most=0.01)
    assert (world.phase, world.status.rollout.failures) == ("Step", 1)
    assert world.status.rollout.passes > 10  # it is out of the window


def test_a_long_interval_leaves_nothing_out():
    world = serving(steps=steps(10, pause=3600), analysis=analysis(interval_seconds=300, failure_limit=1))
    world.deploy("bbb")
    world.requests = []
    world.serve(3000)
    for _ in range(2):
        world.after(100)
        world.requests.append((world.now, True))
        world.after(200)
    assert world.windows == [300, 300]
    assert world.phase == "RolledBack"  # two measurements, of different requests


@pytest.mark.parametrize("word", ["Unreachable", "Inconclusive", "NoData"])
def test_what_a_candidate_does_while_nobody_can_tell_is_measured_afterwards(word):
    world = serving(steps=steps(10, pause=86400), analysis=analysis(failure_limit=0))
    world.deploy("bbb")
    world.serve(1000)
    world.after(100)
    world.measured = [word] * 30
    for _ in range(30):
        world.after(10)
        world.serve(1000)
    assert world.status.rollout.failures == 0
    world.requests = [(world.now - timedelta(seconds=120), True), (world.now, False)]
    world.after(10)
    assert world.windows[-2:] == [300, 310]
    assert world.phase == "RolledBack"


@pytest.mark.parametrize(
    ("words", "counts"),
    [(("Pass", "NoData"), True), (("Unreachable", "Fail"), True), (("NoData", "Inconclusive"), False)],
)
def test_a_metric_that_never_has_an_answer_stretches_no_window(words, counts):
    """In a long one, the good requests of before would outweigh what another metric finds now."""
    world = serving(steps=steps(10, pause=86400), analysis=analysis(failure_limit=3))
    world.deploy("bbb")
    world.serve(1000)
    world.now += timedelta(seconds=11)
    verdicts = tuple(Verdict(name=str(number), verdict=word) for number, word in enumerate(words))
    decision = decide(world.spec, world.status, replace(world.seen(), verdicts=verdicts), world.now)
    assert decision.rollout.measured_at == stamp(world.now)
    assert decision.rollout.answered_at == (stamp(world.now) if counts else None)


def test_routers_that_are_replaced_do_not_hide_what_a_busy_candidate_does_now():
    """They count anew, but the step is as old as before: an hour's good requests would outweigh the last bad ones."""
    how = analysis(metrics=[ERRORS.model_copy(update={"max": 0.1})], failure_limit=1)
    world = serving(steps=steps(10, pause=86400), analysis=how)
    world.deploy("bbb")
    world.requests = []
    for _ in range(60):
        world.after(30)
        world.serve(1000)
        world.requests += [(world.now, False)] * 100
        world.after(30)
    world.routers[0] = RouterPod(*world.config_map)
    world.passes()
    assert world.status.rollout.samples is not None
    assert world.status.rollout.samples > 5000
    for _ in range(10):
        world.after(10)
        world.serve(200)
        world.requests += [(world.now, True)] * 20
        world.passes()
    assert max(world.windows) <= 70
    assert world.phase == "RolledBack"
