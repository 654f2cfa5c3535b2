"""The ways back: a failure, an abort, a revert, another revision in between, and trying again."""

import contextlib
from datetime import timedelta

import pytest
from tests.unit.rollout_world import KilledError, RouterPod, World, analysis, revision, serving, spec, steps

from slmops.api import keys
from slmops.rollout.seen import Problem
from slmops_router.routes import REVISIONS_MAX


def test_one_failure_more_than_tolerated_rolls_back_weight_first_pods_later():
    world = serving(steps=steps(50, pause=600), analysis=analysis(failure_limit=1))
    world.deploy("bbb")
    world.serve(300)
    world.measured = ["Fail", "Pass", "Fail"]
    world.after(10), world.after(10)
    assert (world.phase, world.status.rollout.failures) == ("Step", 1)
    world.now += timedelta(seconds=60)
    world.run()
    assert (world.phase, world.routers[0].weights) == ("RollingBack", {"aaa": 100, "bbb": 0})
    world.run()
    assert (world.phase, world.candidate, world.stable) == ("RolledBack", "bbb", "aaa")
    assert "bbb" in world.deployments
    assert world.status.rollout.outcome.startswith("AnalysisFailed: Metric errors")
    world.after(1)
    assert world.deployments == {"aaa": 2}
    world.after(86400)
    assert (world.phase, world.deployments) == ("RolledBack", {"aaa": 2})


@pytest.mark.parametrize("actions", range(1, 8))
def test_what_a_measurement_took_away_is_not_given_back_by_a_kill(actions):
    world = serving(steps=steps(50, pause=600), analysis=analysis(failure_limit=0))
    world.routers.append(RouterPod(*world.config_map))
    world.deploy("bbb")
    world.serve(300)
    world.measured = ["Fail"]
    world.now += timedelta(seconds=10)
    with contextlib.suppress(KilledError):
        world.run(crash_after=actions)
    for _ in range(3):
        world.run()
        assert [router.weights.get("bbb", 0) for router in world.routers] == [0, 0]
    assert (world.phase, world.status.rollout.outcome[:14]) == ("RolledBack", "AnalysisFailed")


@pytest.mark.parametrize("value", ["*", "aaa", "bbb"])
def test_an_abort_that_is_older_than_the_object_takes_nothing_down(value):
    """A restored or copied object has the annotations of before, and no status."""
    world = World(spec(steps=steps(30, pause=600)))
    world.annotations[keys.ANNOTATION_ABORT] = value
    world.passes()  # its source is not there yet
    world.deploy("aaa")
    assert (world.phase, world.stable, "VerbIgnored" in world.events) == ("Stable", "aaa", False)
    world.deploy("bbb")
    assert (world.phase, world.weight) == ("Step", 30)
    world.annotations[keys.ANNOTATION_ABORT] = "*/again"
    world.after(1)
    assert (world.phase, world.stable) == ("RolledBack", "aaa")


@pytest.mark.parametrize(
    ("ready", "reached", "weights"),
    [
        (True, True, {"aaa": 100, "bbb": 0}),
        (True, False, {"aaa": 100, "bbb": 0}),  # by the router that answers, which has just started
        (False, False, {"aaa": 0, "bbb": 0}),
    ],
)
def test_a_first_revision_that_serves_goes_on_while_the_next_is_prepared(ready, reached, weights):
    """One router is not seen to obey, so it is not promoted yet."""
    world = World(spec(), routers=2)
    world.routers[1].silent = True
    world.deploy("aaa")
    assert (world.phase, world.weight, world.stable) == ("Promoting", 100, "")
    world.settle()
    world.ready["aaa"] *= ready
    world.unreached |= set() if reached else {"aaa"}
    world.target = revision("bbb")
    assert world.run().weights == weights
    assert (world.stable, world.candidate) == ("aaa" if ready else "", "bbb")


def test_rolling_back_does_not_wait_for_a_silent_router_but_pods_do():
    world = serving(scale_down_delay_seconds=0)
    world.deploy("bbb")
    world.routers[0].silent = True
    world.annotations[keys.ANNOTATION_ABORT] = "bbb"
    world.after(1)
    assert world.phase == "RollingBack"
    assert world.config_map[0] == {"aaa": 100, "bbb": 0}
    assert "RouterUnreachable" in world.hold
    world.after(3600)
    assert world.deployments["bbb"] == 1  # it may still get requests
    world.routers[0].silent = False
    world.passes()
    assert world.phase == "RolledBack"
    world.after(1)
    assert world.deployments == {"aaa": 2}


def test_a_candidate_that_never_gets_ready_is_rolled_back_with_its_pods_own_words():
    world = serving(progress_deadline_seconds=300)
    world.broken["bbb"] = Problem("SourceNotFound", "There is nothing at oci://store/m:bbb.")
    world.deploy("bbb")
    assert "There is nothing at oci://store/m:bbb." in world.hold
    world.after(299)
    assert world.phase == "Preparing"
    world.after(2)
    assert world.phase == "RolledBack"
    assert world.status.rollout.outcome.startswith("SourceNotFound: Not ready within 300 s: 0 of 1 pods")


def test_a_candidate_that_loses_its_last_pod_loses_its_requests_until_it_is_back():
    world = serving(steps=steps(50, pause=600))
    world.deploy("bbb")
    assert world.weight == 50
    world.broken["bbb"] = Problem("CrashLoopBackOff", "It ends with exit code 1.")
    world.passes()
    assert world.routers[0].weights == {"aaa": 100, "bbb": 0}
    world.broken.clear()
    world.passes()
    assert world.weight == 50
    world.broken["bbb"] = Problem("CrashLoopBackOff", "It ends with exit code 1.")
    world.after(1), world.after(601)
    assert world.phase == "RolledBack"
    assert "CrashLoopBackOff" in world.status.rollout.outcome


def test_a_third_revision_takes_the_second_ones_place_and_the_way_back_stays_the_first():
    world = serving(steps=steps(30, pause=600))
    world.deploy("bbb")
    assert world.weight == 30
    world.target = serving("ccc").target
    world.settle()
    world.run()
    assert world.routers[0].weights["bbb"] == 0
    assert (world.candidate, world.weight, world.phase) == ("ccc", 0, "Preparing")
    world.passes()
    assert (world.stable, world.candidate, world.weight) == ("aaa", "ccc", 30)
    world.after(31)
    assert set(world.deployments) == {"aaa", "ccc"}
    world.annotations[keys.ANNOTATION_ABORT] = "ccc"
    world.passes()
    assert (world.stable, world.phase, world.routers[0].weights["aaa"]) == ("aaa", "RolledBack", 100)


def test_the_spec_back_at_stable_ends_the_rollout_at_once_and_is_no_failure():
    world = serving(steps=steps(30, pause=600))
    world.deploy("bbb")
    world.target = revision("aaa")
    world.run()
    assert (world.stable, world.candidate, world.phase) == ("aaa", "", "Draining")
    assert world.routers[0].weights == {"aaa": 100, "bbb": 0}
    world.after(1)
    assert (world.phase, world.deployments) == ("Stable", {"aaa": 2})


def test_back_and_forth_keeps_the_pods_that_still_run():
    world = serving(steps=steps(30, pause=600))
    world.deploy("bbb"), world.deploy("aaa"), world.deploy("bbb")
    assert (world.candidate, world.weight) == ("bbb", 30)
    world.after(3600)
    assert world.stable == "bbb"


def test_a_rolled_back_revision_is_tried_again_when_asked_and_once_only():
    world = serving(steps=steps(30, pause=60))
    world.deploy("bbb")
    world.annotations[keys.ANNOTATION_ABORT] = "bbb"
    world.passes()
    assert world.phase == "RolledBack"
    world.annotations[keys.ANNOTATION_RETRY] = "bbb"
    world.passes()
    assert (world.phase, world.weight) == ("Step", 30)  # the abort of before is not obeyed again
    world.annotations[keys.ANNOTATION_ABORT] = "bbb/again"
    world.after(1)
    assert world.phase == "RolledBack"
    world.after(3600)
    assert world.phase == "RolledBack"


def test_a_new_revision_after_a_rollback_starts_over():
    world = serving(steps=steps(30, pause=60))
    world.deploy("bbb")
    world.annotations[keys.ANNOTATION_ABORT] = "*"
    world.passes()
    world.deploy("ccc")
    assert (world.phase, world.candidate, world.weight) == ("Step", "ccc", 30)
    world.deploy("aaa")
    world.after(31)
    assert (world.phase, world.candidate) == ("Stable", "")


@pytest.mark.parametrize("plan", [steps(10, pause=600), []])
def test_many_revisions_in_a_short_time_are_never_more_than_a_router_takes(plan):
    world = serving(steps=plan, scale_down_delay_seconds=604800)
    for number in range(12):
        world.deploy(f"r{number}")
        assert len(world.routers[0].weights) <= REVISIONS_MAX
    assert (world.stable, world.candidate, world.weight) == (("aaa", "r11", 10) if plan else ("r11", "", 0))
    assert len(world.deployments) <= REVISIONS_MAX


def test_many_revisions_while_no_router_answers_can_still_be_told_and_stored():
    world = serving(steps=steps(10, pause=600))
    world.routers[0].silent = True
    for number in range(20):
        world.deploy(f"r{number}")
        assert len(world.config_map[0]) <= REVISIONS_MAX
    world.routers[0].silent = False
    world.passes(), world.after(31), world.after(1)
    assert set(world.deployments) == {"aaa", "r19"}
    assert world.routers[0].weights == {"aaa": 90, "r19": 10}


def test_a_candidate_that_keeps_falling_over_is_given_up():
    world = serving(steps=steps(50, pause=120), progress_deadline_seconds=300)
    world.deploy("bbb")
    for _ in range(20):  # 30 s up, 60 s down
        world.after(30)
        world.broken["bbb"] = Problem("CrashLoopBackOff", "It ends with exit code 1.")
        world.passes()
        world.after(60)
        world.broken.clear()
        world.passes()
    assert (world.phase, world.stable) == ("RolledBack", "aaa")
    assert "CrashLoopBackOff" in world.status.rollout.outcome


def test_a_candidate_that_fell_over_once_is_not_held_to_that_for_ever():
    world = serving(steps=steps(50, pause=3600), progress_deadline_seconds=300)
    world.deploy("bbb")
    for _ in range(3):
        world.broken["bbb"] = Problem("CrashLoopBackOff", "It ends with exit code 1.")
        world.passes()
        world.broken.clear()
        world.after(1000)
    assert (world.phase, world.weight, world.status.rollout.losses) == ("Step", 50, 3)


def test_a_candidate_whose_nodes_are_drained_is_not_held_to_that_at_all():
    world = serving(steps=steps(50, pause=3600))
    world.deploy("bbb")
    for _ in range(10):
        world.ready["bbb"] = 0
        world.passes(1, settle=False)
        assert world.routers[0].weights == {"aaa": 100, "bbb": 0}
        world.passes()
    assert (world.phase, world.weight, world.status.rollout.losses) == ("Step", 50, 0)


def test_a_retry_that_broke_off_and_was_taken_back_leaves_no_pods():
    world = serving()
    world.deploy("bbb")
    world.annotations[keys.ANNOTATION_ABORT] = "bbb"
    world.passes()
    world.after(31)
    assert (world.phase, world.deployments) == ("RolledBack", {"aaa": 2})
    world.annotations = {keys.ANNOTATION_RETRY: "bbb"}
    with pytest.raises(KilledError):
        world.run(crash_after=3)
    assert world.deployments == {"aaa": 2, "bbb": 1}
    world.annotations.clear()
    world.passes()
    world.after(31)
    assert (world.phase, world.deployments) == ("RolledBack", {"aaa": 2})


def test_a_retry_that_is_asked_for_during_the_rollback_is_carried_out_when_it_ends():
    """In that very pass: none need follow it."""
    world = serving()
    world.deploy("bbb")
    world.routers[0].silent = True
    world.annotations[keys.ANNOTATION_ABORT] = "bbb"
    world.after(1)
    assert world.phase == "RollingBack"
    world.annotations[keys.ANNOTATION_RETRY] = "bbb"
    world.after(1)
    assert world.phase == "RollingBack"
    world.routers[0] = RouterPod(*world.config_map)
    world.run()
    assert (world.phase, world.candidate) == ("Step", "bbb")  # its pods are still there


def test_what_was_given_up_goes_at_once_and_what_was_stable_stays_for_the_delay():
    """A rolled-back candidate holds the GPU that its successor waits for."""
    world = serving(steps=steps(50, pause=60), scale_down_delay_seconds=3600)
    world.deploy("bbb")
    world.annotations[keys.ANNOTATION_ABORT] = "bbb"
    world.after(2)
    assert (world.phase, world.deployments) == ("RolledBack", {"aaa": 2})
    world.deploy("ccc"), world.deploy("ddd")  # superseded
    assert set(world.deployments) == {"aaa", "ddd"}
    world.after(61)
    assert world.stable == "ddd"
    world.after(3590)
    assert set(world.deployments) == {"aaa", "ddd"}
    world.deploy("eee"), world.deploy("ddd")  # reverted
    assert set(world.deployments) == {"aaa", "ddd"}
    world.after(10)
    assert (world.phase, world.deployments, world.status.rollout.former) == ("Stable", {"ddd": 2}, [])


def test_what_was_stable_under_an_older_operator_keeps_its_delay():
    """That one did not write down which revisions had been stable."""
    world = serving(steps=[], scale_down_delay_seconds=3600)
    world.deploy("bbb")
    older = world.status.rollout.model_copy(update={"former": None})
    assert set(older.retiring) == {"aaa"}
    world.status = world.status.model_copy(update={"rollout": older})
    world.after(10)
    assert set(world.deployments) == {"aaa", "bbb"}
    world.after(3600)
    assert world.deployments == {"bbb": 2}


def test_the_way_back_to_the_old_revision_keeps_its_warm_pods_until_it_is_given_up():
    world = serving(replicas=10, steps=steps(10, 50, pause=60), scale_down_delay_seconds=3600)
    world.deploy("bbb")
    assert world.deployments["bbb"] == 1
    world.after(61), world.after(61)
    assert world.stable == "bbb"
    world.deploy("aaa")
    assert (world.phase, world.weight, world.deployments) == ("Step", 10, {"aaa": 10, "bbb": 10})
    world.spec = world.spec.model_copy(update={"replicas": 8})
    world.passes()
    assert world.deployments == {"aaa": 8, "bbb": 8}
    world.annotations[keys.ANNOTATION_ABORT] = "aaa"
    world.after(2)
    assert world.deployments == {"bbb": 8}


def test_a_candidate_that_was_never_stable_follows_the_scale_down_too():
    world = serving(replicas=10, steps=steps(50, pause=600))
    world.deploy("bbb")
    world.spec = world.spec.model_copy(update={"replicas": 4})
    world.passes()
    assert world.deployments == {"aaa": 4, "bbb": 2}


def test_an_approval_that_an_abort_overtakes_is_done_with_in_the_same_pass():
    world = serving(steps=steps(30, pause=60, approval=True))
    world.broken["bbb"] = Problem("SourceNotFound", "There is nothing at oci://store/m:bbb.")
    world.deploy("bbb")
    world.annotations |= {keys.ANNOTATION_PROMOTE: "bbb", keys.ANNOTATION_ABORT: "bbb"}
    world.run()
    assert world.phase in ("RollingBack", "RolledBack")
    assert world.status.rollout.handled == {keys.ANNOTATION_PROMOTE: "bbb", keys.ANNOTATION_ABORT: "bbb"}


def test_nothing_goes_before_the_status_says_why():
    world = serving(steps=[], scale_down_delay_seconds=0)
    world.target = revision("bbb")
    while "RolloutPromoted" not in world.events:
        world.settle()
        world.run()
    assert world.deployments == {"aaa": 2, "bbb": 2}  # killed before its status, this pass would have to bring aaa back
    world.passes()
    assert (world.phase, world.deployments) == ("Stable", {"bbb": 2})
