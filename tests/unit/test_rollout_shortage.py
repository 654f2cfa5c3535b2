"""Too few pods: who stands in for the stable revision, who finds no room, and whose pods come slowly."""

import pytest
from tests.unit.rollout_world import analysis, serving, steps

from slmops.api import keys
from slmops.rollout.seen import Problem


def stand_in(**plan):
    """A candidate at 10 %, and a stable revision that has just lost all its pods."""
    world = serving(steps=steps(10, 50, pause=None), analysis=analysis(failure_limit=0, window_seconds=60, **plan))
    world.deploy("bbb")
    world.serve(3000)
    world.broken["aaa"] = Problem("ImagePullFailed", "its image is gone")
    world.passes()
    return world


def test_who_stands_in_for_the_stable_revision_is_not_taken_away_by_a_measurement():
    world = stand_in()
    world.measured = ["Fail"] * 13
    for _ in range(12):
        world.after(10)
    assert (world.phase, world.weight, world.status.rollout.failures) == ("Step", 10, 0)
    del world.broken["aaa"]
    world.after(10)  # the window still has what was too much for the pods of 10 %
    assert (world.phase, world.weight, world.status.rollout.failures) == ("Step", 10, 0)
    world.measured = ["Fail"] * 8
    for _ in range(8):
        world.after(10)
    assert (world.phase, world.stable) == ("RolledBack", "aaa")


def test_who_stands_in_for_the_stable_revision_may_still_earn_its_place():
    world = stand_in()
    for _ in range(5):
        world.serve(300)
        world.after(10)
    assert world.stable == "bbb"


def test_who_stands_in_for_the_stable_revision_may_be_aborted():
    world = stand_in()
    world.annotations[keys.ANNOTATION_ABORT] = "bbb"
    world.passes()
    assert (world.phase, world.stable) == ("RolledBack", "aaa")


def test_who_stands_in_for_the_stable_revision_waits_for_its_other_pods_without_a_deadline():
    world = stand_in()
    world.spec = world.spec.model_copy(update={"replicas": 10})
    world.edit_rollout(steps=steps(50), analysis=None)
    for _ in range(8):
        world.after(100, settle=False)
    assert (world.phase, world.weight) == ("Step", 10)
    assert "1 of 5 pods of revision bbb are ready" in world.hold
    world.ready["aaa"] = 10
    del world.broken["aaa"]
    world.passes(settle=False)
    world.after(599, settle=False)
    assert (world.phase, world.weight) == ("Step", 10)
    world.after(2, settle=False)
    assert (world.phase, world.stable) == ("RolledBack", "aaa")


def test_that_the_routers_reach_the_stable_revision_again_is_looked_for():
    """No event says so; until then nobody sees to the pods that the candidate lacks."""
    world = serving(replicas=10, steps=steps(10, 50, pause=600))
    world.deploy("bbb")
    world.unreached.add("aaa")
    world.edit_rollout(steps=steps(50, pause=600))
    decision = world.passes(settle=False)
    assert (world.weight, world.hold.split(":")[0]) == (10, "StableNotReady")
    assert decision.requeue is not None
    assert decision.requeue <= 10


def scaled_up(**how):
    """A candidate that had its one pod for half of the requests; by now it wants five, and the stable revision ten."""
    world = serving(replicas=2, steps=steps(50, pause=None, approval=True), **how)
    world.deploy("bbb")
    world.spec = world.spec.model_copy(update={"replicas": 10})
    world.broken["bbb"] = Problem("Unschedulable", "0/3 nodes are available")
    world.passes(2, settle=False)
    assert (world.deployments, world.ready) == ({"aaa": 10, "bbb": 5}, {"aaa": 2, "bbb": 1})
    return world


def test_a_candidate_that_is_scaled_keeps_its_share_where_there_is_no_room_for_the_stable_revision_either():
    world = scaled_up()
    for _ in range(8):
        decision = world.after(100, settle=False)
    assert (world.phase, world.weight, world.hold.split(":")[0]) == ("Step", 50, "Unschedulable")
    assert decision.requeue is not None  # what routers reach comes without an event
    world.ready["aaa"] = 3  # of which a half is two
    world.after(1, settle=False)
    world.after(599, settle=False)
    assert (world.phase, world.weight) == ("Step", 50)
    world.after(2, settle=False)
    assert (world.phase, world.stable) == ("RolledBack", "aaa")


@pytest.mark.parametrize(
    ("reason", "phase"),
    [
        ("Unschedulable", "Step"),
        ("SchedulingGated", "Step"),
        ("QuotaExceeded", "Step"),
        ("Evicted", "Step"),
        ("PodsForbidden", "RolledBack"),  # by a policy, which may be against its image alone
        ("", "RolledBack"),  # it starts, and has its time for it as everywhere
        ("CrashLoopBackOff", "RolledBack"),
        ("OutOfMemory", "RolledBack"),
        ("ImagePullFailed", "RolledBack"),
        ("DiskFull", "RolledBack"),
    ],
)
def test_a_candidate_whose_pods_break_is_given_up_though_the_stable_revision_lacks_pods_too(reason, phase):
    """A half of two pods is one: rounded up, the candidate has as large a part of its pods without the other."""
    world = serving(replicas=3, steps=steps(50, pause=None, approval=True))
    world.deploy("bbb")
    world.ready = {"aaa": 2, "bbb": 1}
    if reason:
        world.broken["bbb"] = Problem(reason, "so it says")
    for _ in range(3):
        world.after(301, settle=False)
    assert (world.phase, world.stable) == (phase, "aaa")
    if phase == "RolledBack":
        said = f"{reason or 'ProgressDeadlineExceeded'}: Not ready within 600 s: 1 of 2 pods"
        assert world.status.rollout.outcome.startswith(said)


def test_a_candidate_whose_pod_breaks_again_and_again_is_given_up_though_it_says_nothing_in_between():
    world = serving(replicas=3, steps=steps(50, pause=None, approval=True))
    world.deploy("bbb")
    world.ready = {"aaa": 2, "bbb": 1}
    for _ in range(3):
        world.broken["bbb"] = Problem("CrashLoopBackOff", "so it says")
        world.after(240, settle=False)
        del world.broken["bbb"]  # it runs, for a while
        world.after(240, settle=False)
    assert (world.phase, world.stable) == ("RolledBack", "aaa")


def test_no_deadline_passes_while_one_pod_after_the_other_comes():
    world = scaled_up()
    world.ready["aaa"] = 10
    for count in (1, 2, 3, 4, 5):
        world.ready["bbb"] = count
        world.after(400, settle=False)
    assert (world.phase, world.weight, world.hold.split(":")[0]) == ("Step", 50, "Approval")
    assert (world.status.rollout.waiting_since, world.status.rollout.waiting_pods) == (None, None)


@pytest.mark.parametrize(
    ("stable", "reason", "counts"), [(10, "Unschedulable", (1, 2, 1, 2)), (8, "CrashLoopBackOff", (3, 4, 3, 4))]
)
def test_pods_that_go_and_come_back_are_none_that_come(stable, reason, counts):
    world = scaled_up()
    world.broken["bbb"] = Problem(reason, "so it says")
    world.ready["aaa"] = stable
    for count in counts:
        assert world.phase == "Step"
        world.ready["bbb"] = count
        world.after(400, settle=False)
    assert (world.phase, world.stable) == ("RolledBack", "aaa")
    assert f"{counts[-1]} of 5 pods of revision bbb are ready: so it says" in world.status.rollout.outcome
