"""Rollouts told from beginning to end."""

from datetime import timedelta

import pytest
from tests.unit.rollout_world import World, analysis, spec, steps

from slmops.api import keys
from slmops.rollout.seen import Problem


def serving(name="aaa", **how):
    """A world in which revision `name` serves."""
    world = World(spec(**how))
    world.deploy(name)
    assert (world.phase, world.stable, world.candidate) == ("Stable", name, "")
    world.events.clear()
    return world


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


def test_two_steps_of_one_weight_each_need_their_own_requests():
    world = serving(steps=steps(10, 10, pause=None), analysis=analysis(passes=1))
    world.deploy("bbb")
    world.serve(300)
    world.after(10)
    assert (world.status.rollout.step, world.stable) == (1, "aaa")
    world.after(60)
    assert "TooFewSamples" in world.hold
    world.serve(300)
    world.after(10)
    assert world.stable == "bbb"


def test_good_measurements_in_a_row_earn_the_next_step():
    world = serving(steps=steps(10, pause=None), analysis=analysis(passes=3))
    world.deploy("bbb")
    world.serve(300)
    for _ in range(3):
        assert world.stable == "aaa"
        world.after(10)
    assert world.asked == 3
    assert world.stable == "bbb"


def test_too_few_requests_hold_for_ever_and_nothing_is_measured():
    world = serving(steps=steps(10, pause=None), analysis=analysis(min_samples=20))
    world.deploy("bbb")
    world.serve(190)
    world.after(86400)
    assert (world.stable, world.asked) == ("aaa", 0)
    assert "TooFewSamples" in world.hold
    assert "19 of 20" in world.hold
    assert world.status.rollout.verdicts[0].verdict == "TooFewSamples"


@pytest.mark.parametrize("word", ["NoData", "Unreachable", "Inconclusive"])
def test_what_is_not_known_holds_and_spends_nothing(word):
    world = serving(steps=steps(10, pause=None), analysis=analysis(failure_limit=0))
    world.deploy("bbb")
    world.serve(300)
    world.measured = [word] * 50
    for _ in range(50):
        world.after(10)
    assert (world.phase, world.weight, world.status.rollout.failures) == ("Step", 10, 0)
    assert world.hold.startswith(f"{word}: ")
    world.after(10), world.after(10)
    assert world.stable == "bbb"


def test_an_unknown_between_two_passes_starts_the_row_again():
    world = serving(steps=steps(10, pause=None), analysis=analysis(passes=2))
    world.deploy("bbb")
    world.serve(300)
    world.measured = ["Pass", "Unreachable", "Pass"]
    for _ in range(3):
        world.after(10)
    assert world.stable == "aaa"
    world.after(10)
    assert world.stable == "bbb"


def test_one_failure_more_than_tolerated_rolls_back_weight_first_pods_later():
    world = serving(steps=steps(50, pause=600), analysis=analysis(failure_limit=1))
    world.deploy("bbb")
    world.serve(300)
    world.measured = ["Fail", "Pass", "Fail"]
    world.after(10), world.after(10)
    assert (world.phase, world.status.rollout.failures) == ("Step", 1)
    world.after(10)
    assert (world.phase, world.candidate, world.stable) == ("RolledBack", "bbb", "aaa")
    assert world.routers[0].weights == {"aaa": 100, "bbb": 0}
    assert "bbb" in world.deployments
    assert world.status.rollout.outcome.startswith("AnalysisFailed: Metric errors")
    world.after(31)
    assert world.deployments == {"aaa": 2}
    world.after(86400)
    assert (world.phase, world.deployments) == ("RolledBack", {"aaa": 2})


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
    world.deploy("aaa")
    assert (world.stable, world.candidate, world.phase) == ("aaa", "", "Draining")
    assert world.routers[0].weights == {"aaa": 100, "bbb": 0}
    world.after(31)
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


def test_verbs_for_others_do_nothing_and_a_star_without_a_candidate_hits_no_later_rollout():
    world = serving(steps=steps(30, pause=60, approval=True))
    world.annotations = {keys.ANNOTATION_ABORT: "*", keys.ANNOTATION_PROMOTE: "*", keys.ANNOTATION_RETRY: "aaa"}
    world.passes()
    assert set(world.status.rollout.handled) == set(world.annotations)
    world.deploy("bbb")
    world.after(120)
    assert (world.phase, world.weight) == ("Step", 30)
    assert world.hold.startswith("Approval: ")
    world.annotations = {keys.ANNOTATION_ABORT: "zzz"}
    world.passes()
    assert world.phase == "Step"
    assert world.status.rollout.handled == {}


def test_approval_is_given_per_step():
    world = serving(steps=steps(10, 50, pause=None, approval=True))
    world.deploy("bbb")
    assert "slmops.dev/promote=bbb" in world.hold
    world.annotations[keys.ANNOTATION_PROMOTE] = "bbb"
    world.passes()
    assert world.weight == 50
    assert world.hold.startswith("Approval: ")
    world.after(3600)
    assert world.weight == 50
    world.annotations[keys.ANNOTATION_PROMOTE] = "bbb/2"
    world.passes()
    assert world.stable == "bbb"


def test_promote_skips_a_pause_but_no_evidence():
    world = serving(steps=steps(10, pause=3600), analysis=analysis(passes=1))
    world.deploy("bbb")
    world.annotations[keys.ANNOTATION_PROMOTE] = "bbb"
    world.passes()
    assert "TooFewSamples" in world.hold
    world.serve(300)
    world.after(10)
    assert world.stable == "bbb"


def test_pause_holds_as_long_as_it_stands_and_failures_still_roll_back():
    world = serving(steps=steps(10, pause=None), analysis=analysis(failure_limit=0))
    world.annotations[keys.ANNOTATION_PAUSE] = "bbb"
    world.deploy("bbb")
    world.serve(300)
    for _ in range(5):
        world.after(10)
    assert (world.weight, world.hold.split(":")[0]) == (10, "Paused")
    world.annotations.clear()
    world.passes()
    assert world.stable == "bbb"
    world.annotations[keys.ANNOTATION_PAUSE] = "*"
    world.deploy("ccc")
    world.serve(300)
    world.measured = ["Fail"]
    world.after(10)
    assert world.phase == "RolledBack"


def test_a_router_that_does_not_do_what_it_says_holds():
    world = serving(steps=steps(10, pause=10))
    world.deploy("bbb")
    world.routers[0].turns, world.routers[0].chosen = 400, {"bbb": 8}
    world.after(11)
    assert world.hold == "SplitMismatch: The routers gave 8 of 400 requests to bbb, not 10 %."
    world.routers[0].chosen = {"bbb": 41}
    world.passes()
    assert world.stable == "bbb"


def test_a_restarted_router_starts_counting_anew_and_loses_no_step():
    world = serving(steps=steps(10, pause=None), analysis=analysis(passes=1))
    world.deploy("bbb")
    world.serve(150)
    world.routers = [type(world.routers[0])(dict(world.config_map[0]), world.config_map[1])]
    world.after(10)
    assert (world.weight, world.asked) == (10, 0)
    world.serve(300)
    world.after(10)
    assert world.stable == "bbb"


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
    shorter = world.spec.rollout.model_copy(update={"steps": steps(10, pause=400)})
    world.spec = world.spec.model_copy(update={"rollout": shorter})
    world.after(90)
    assert (world.stable, world.weight) == ("aaa", 10)
    world.after(20)
    assert world.stable == "bbb"


def test_weight_zero_is_a_step_too_and_measures_nothing():
    world = serving(steps=steps(0, 50), analysis=analysis(passes=1))
    world.deploy("bbb")
    assert (world.weight, world.deployments["bbb"]) == (0, 1)
    world.after(61)
    assert world.weight == 50


def test_a_deployment_that_nobody_knows_any_more_goes():
    world = serving()
    world.deployments["old"] = 2
    world.passes()
    world.after(31)
    assert world.deployments == {"aaa": 2}
