"""Rollouts told from beginning to end: the way up, and what users and the cluster do meanwhile."""

from datetime import timedelta

import pytest
from tests.unit.rollout_world import World, analysis, revision, serving, spec, steps

from slmops.rollout.seen import Problem


def test_the_first_revision_gets_everything_as_soon_as_it_is_ready():
    world = World(spec(analysis=analysis()))
    world.deploy("aaa")
    assert (world.phase, world.stable, world.weight) == ("Stable", "aaa", 0)
    assert world.deployments == {"aaa": 2}
    assert world.routers[0].weights == {"aaa": 100}
    assert world.asked == 0


def test_the_first_revision_serves_with_its_first_pod():
    world = World(spec(replicas=3))
    world.deploy("aaa")
    world = World(spec(replicas=3))
    world.target = serving().target
    world.run()
    assert world.routers[0].weights == {"aaa": 0}
    world.ready["aaa"] = 1
    world.passes(3, settle=False)
    assert world.stable == "aaa"


def test_a_canary_goes_up_step_by_step_and_takes_over_without_new_pods():
    world = serving(replicas=4, steps=steps(10, 50))
    world.deploy("bbb")
    assert (world.phase, world.weight, world.deployments) == ("Step", 10, {"aaa": 4, "bbb": 1})
    world.after(59)
    assert world.weight == 10
    world.after(2)
    assert (world.weight, world.deployments) == (50, {"aaa": 4, "bbb": 2})
    world.after(61)
    assert (world.stable, world.candidate, world.phase) == ("bbb", "", "Draining")
    assert world.deployments == {"aaa": 4, "bbb": 4}
    assert world.routers[0].weights == {"aaa": 0, "bbb": 100}
    world.after(31)
    assert (world.phase, world.deployments) == ("Stable", {"bbb": 4})
    assert world.routers[0].weights == {"bbb": 100}
    assert world.events == [
        "RolloutStarted", "StepRouted", "StepRouted", "RolloutPromoted",
    ]  # fmt: skip


def test_no_steps_is_blue_green():
    world = serving(steps=[])
    world.deploy("bbb")
    assert world.deployments == {"aaa": 2, "bbb": 2}
    assert (world.stable, world.routers[0].weights) == ("bbb", {"aaa": 0, "bbb": 100})


def test_the_next_weight_waits_until_its_pods_are_ready_and_keeps_the_last_one():
    world = serving(replicas=4, steps=steps(10, 100))
    world.deploy("bbb")
    world.after(61, settle=False)
    assert (world.status.rollout.step, world.weight, world.deployments["bbb"]) == (1, 10, 4)
    assert world.status.rollout.state == "Scaling"
    world.passes()
    assert world.weight == 100


def test_a_step_must_be_seen_at_every_router_before_its_time_counts():
    world = serving()
    world.routers.append(type(world.routers[0])(silent=True))
    world.deploy("bbb")
    assert world.status.rollout.state == "Routing"
    assert "RouterUnreachable: 1 of 2" in world.hold
    world.after(3600)
    assert world.status.rollout.step == 0
    world.routers[1].silent = False
    world.passes()
    assert world.status.rollout.routed_at is not None
    world.after(61)
    assert world.status.rollout.step == 1


def test_old_pods_that_stay_because_a_router_is_silent_say_so():
    world = serving(steps=[])
    world.routers.append(type(world.routers[0])(*world.config_map))
    world.deploy("bbb")
    assert (world.phase, world.stable) == ("Draining", "bbb")
    world.routers[1].silent = True
    world.after(100)
    assert world.hold.startswith("RouterUnreachable: 1 of 2 routers")
    assert set(world.deployments) == {"aaa", "bbb"}
    world.routers[1].silent = False
    world.passes()
    assert (world.phase, world.hold) == ("Draining", "")
    world.after(31)
    assert (world.phase, world.deployments) == ("Stable", {"bbb": 2})


def test_what_a_candidate_waits_for_is_said_before_what_old_pods_wait_for():
    world = serving(steps=[])
    world.deploy("bbb")
    world.broken["ccc"] = Problem("SourceNotFound", "There is nothing there.")
    world.routers[0].silent = True
    world.deploy("ccc")
    assert (world.phase, world.hold.split(":")[0]) == ("Preparing", "SourceNotFound")


def test_pods_that_no_router_reaches_get_no_requests():
    world = serving(progress_deadline_seconds=300)
    world.unreached = {"bbb"}
    world.deploy("bbb")
    assert (world.phase, world.hold.split(":")[0]) == ("Preparing", "NotReached")
    world.after(301)
    assert world.phase == "RolledBack"
    assert "the router does not reach them" in world.status.rollout.outcome


@pytest.mark.parametrize("wrong", [{"weights": {"aaa": 100, "bbb": 0}}, {"epoch": "another"}])
def test_a_router_that_forgot_holds_the_step_until_it_has_it_again(wrong):
    world = serving(steps=steps(10, pause=10))
    world.deploy("bbb")
    world.now += timedelta(seconds=11)
    for name, value in wrong.items():
        setattr(world.routers[0], name, value)
    world.run()
    assert (world.stable, world.status.rollout.state) == ("aaa", "Routing")
    world.passes()
    assert world.stable == "bbb"


def test_nobody_is_promoted_before_every_router_sends_everything():
    world = serving(steps=[])
    world.routers.append(type(world.routers[0])(silent=True))
    world.deploy("bbb")
    world.after(3600)
    assert (world.stable, world.phase, world.deployments["aaa"]) == ("aaa", "Promoting", 2)
    world.routers[1].silent = False
    world.passes()
    assert world.stable == "bbb"


def test_a_first_revision_that_never_gets_ready_goes_on_trying_and_mends_itself():
    world = World(spec(progress_deadline_seconds=300))
    world.broken["aaa"] = Problem("SourceUnavailable", "The registry does not answer.")
    world.deploy("aaa")
    world.after(3600)
    assert world.phase == "Preparing"
    assert world.hold.startswith("ProgressDeadlineExceeded: ")
    assert "The registry does not answer." in world.hold
    world.broken.clear()
    world.after(60)
    assert (world.phase, world.stable) == ("Stable", "aaa")


def test_an_operator_that_was_away_past_the_deadline_looks_before_it_judges():
    world = serving(progress_deadline_seconds=300)
    world.target = serving("bbb").target
    world.run()
    world.after(3600)  # pods became ready meanwhile
    assert world.phase == "Step"


def test_without_a_ready_router_nothing_moves_forward():
    world = serving(steps=steps(10))
    world.routers.clear()
    world.deploy("bbb")
    world.after(3600)
    assert (world.stable, world.status.rollout.step) == ("aaa", 0)
    assert world.hold == "RouterNotReady: No router pod is ready."


def test_scaling_in_the_middle_scales_both_and_keeps_the_weight():
    world = serving(replicas=2, steps=steps(50, pause=600))
    world.deploy("bbb")
    world.spec = world.spec.model_copy(update={"replicas": 10})
    world.passes(1)
    assert world.deployments == {"aaa": 10, "bbb": 5}
    world.passes(2, settle=False)
    assert world.weight == 50
    world.after(601)
    assert (world.stable, world.deployments["bbb"]) == ("bbb", 10)


def test_scaled_to_zero_nothing_runs_nothing_fails_and_the_rollout_goes_on_later():
    world = serving(steps=steps(50, pause=60), progress_deadline_seconds=30)
    world.deploy("bbb")
    world.spec = world.spec.model_copy(update={"replicas": 0})
    world.passes()
    assert world.deployments == {"aaa": 0, "bbb": 0}
    world.after(86400)
    assert world.hold.startswith("ScaledToZero")
    world.spec = world.spec.model_copy(update={"replicas": 2})
    world.passes()
    assert (world.phase, world.weight) == ("Step", 50)
    world.after(61)
    assert world.stable == "bbb"


def test_a_first_revision_with_no_replicas_waits_without_a_deadline():
    world = World(spec(replicas=0, progress_deadline_seconds=10))
    world.deploy("aaa")
    world.after(86400)
    assert (world.phase, world.stable) == ("Preparing", "")
    world.spec = world.spec.model_copy(update={"replicas": 1})
    world.passes()
    assert world.stable == "aaa"


def test_a_source_that_is_not_ready_leaves_stable_and_candidate_alone():
    world = serving(steps=steps(50, pause=60))
    world.target = None
    world.after(3600)
    assert (world.phase, world.stable) == ("Stable", "aaa")
    world.deploy("bbb")
    world.target = None
    world.after(61)
    assert world.stable == "bbb"


def test_editing_the_plan_restarts_nothing():
    world = serving(steps=steps(10, 50, pause=600))
    world.deploy("bbb")
    world.after(300)
    world.edit_rollout(steps=steps(10, pause=400))
    world.after(90)
    assert (world.stable, world.weight) == ("aaa", 10)
    world.after(20)
    assert world.stable == "bbb"


def test_a_deployment_that_nobody_knows_any_more_goes():
    world = serving()
    world.deployments["old"] = 2
    world.passes()
    world.after(31)
    assert world.deployments == {"aaa": 2}


def test_more_time_for_pods_counts_while_they_are_waited_for():
    world = serving(progress_deadline_seconds=60)
    world.broken["bbb"] = Problem("ImagePullFailed", "It is still pulled.")
    world.deploy("bbb")
    world.after(50)
    world.edit_rollout(progress_deadline_seconds=300)
    world.after(200)
    assert world.phase == "Preparing"
    world.edit_rollout(progress_deadline_seconds=100)
    world.passes()
    assert world.phase == "RolledBack"


def test_an_old_revision_goes_by_the_delay_of_the_moment():
    world = serving(steps=[], scale_down_delay_seconds=604800)
    world.deploy("bbb")
    world.after(100)
    assert world.deployments == {"aaa": 2, "bbb": 2}
    world.edit_rollout(scale_down_delay_seconds=99)
    world.passes()
    assert (world.phase, world.deployments) == ("Stable", {"bbb": 2})


def test_what_an_older_operator_did_not_write_down_of_a_revision_is_filled_in():
    """Who asks the stable revision needs its name and its keys, and reads them there."""
    world = serving(steps=steps(10, pause=600))
    told = {"served_name": "chat", "api_keys_secret": "keys"}
    world.target = stable = revision("aaa").model_copy(update=told)
    world.passes()
    assert world.status.stable == stable
    world.deploy("bbb")
    world.target = candidate = revision("bbb").model_copy(update=told)
    world.passes()
    assert (world.status.stable, world.status.candidate) == (stable, candidate)
    assert world.events == ["RolloutStarted", "StepRouted"]
