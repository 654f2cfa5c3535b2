"""What a step has to earn before the next one: requests, measurements, time, approval."""

import pytest
from tests.unit.rollout_world import ERRORS, analysis, revision, serving, steps

from slmops.api import keys
from slmops.api.deployment import AnalysisMetric
from slmops.rollout.seen import Problem


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


def test_one_bad_request_is_one_failure_however_many_windows_it_is_in():
    world = serving(steps=steps(10, pause=None), analysis=analysis(failure_limit=1, passes=2, window_seconds=60))
    world.deploy("bbb")
    world.serve(300)
    world.measured = ["Fail"] * 6
    for _ in range(6):
        world.after(10)
    assert (world.phase, world.status.rollout.failures, world.status.rollout.passes) == ("Step", 1, 0)
    world.after(10), world.after(10)
    assert world.stable == "bbb"  # the window is good again


def test_a_candidate_that_goes_on_failing_is_given_up_a_window_later():
    world = serving(steps=steps(10, pause=None), analysis=analysis(failure_limit=1, window_seconds=60))
    world.deploy("bbb")
    world.serve(300)
    world.measured = ["Fail"] * 7
    for _ in range(6):
        world.after(10)
    assert world.phase == "Step"
    world.after(10)
    assert (world.phase, world.stable) == ("RolledBack", "aaa")


def test_a_failure_of_the_next_step_is_another_one():
    """Its window does not reach back to the requests of the step before."""
    world = serving(steps=steps(10, 50, pause=None), analysis=analysis(failure_limit=1, passes=1, window_seconds=600))
    world.deploy("bbb")
    world.serve(300)
    world.measured = ["Fail", "Pass", "Fail"]
    world.after(10), world.after(10)
    assert (world.weight, world.status.rollout.failures) == (50, 1)
    world.serve(300)
    world.after(10)
    assert world.phase == "RolledBack"


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


def test_that_a_pause_is_over_is_told_once_and_only_where_it_is_over():
    """Flux takes away annotations that it does not know: who paused would learn it from the promotion."""
    world = serving(steps=steps(10, 50, pause=60))
    world.annotations[keys.ANNOTATION_PAUSE] = "*"
    world.deploy("bbb")
    world.after(3600)
    world.broken["bbb"] = Problem("CrashLoopBackOff", "It ends.")
    world.passes()
    assert (world.hold.split(":")[0], world.events) == ("CrashLoopBackOff", ["RolloutStarted"])  # still paused
    world.broken.clear()
    world.passes()
    world.annotations.clear()
    world.passes()
    assert world.events == ["RolloutStarted", "RolloutResumed", "StepRouted"]
    world.annotations[keys.ANNOTATION_PAUSE] = "bbb"
    world.after(3600)
    world.annotations.clear()
    world.deploy("ccc")  # what was paused is of no interest any more
    assert world.events.count("RolloutResumed") == 1


def test_pause_holds_as_long_as_it_stands_and_failures_still_roll_back():
    world = serving(steps=steps(10, pause=None), analysis=analysis(failure_limit=0))
    world.deploy("bbb")
    world.annotations[keys.ANNOTATION_PAUSE] = "bbb"
    world.serve(300)
    for _ in range(5):
        world.after(10)
    assert (world.weight, world.hold.split(":")[0]) == (10, "Paused")
    world.annotations.clear()
    world.passes()
    assert world.stable == "bbb"
    world.deploy("ccc")
    world.annotations[keys.ANNOTATION_PAUSE] = "*"
    world.serve(300)
    world.measured = ["Fail"]
    world.after(10)
    assert world.phase == "RolledBack"


def test_a_router_that_does_not_do_what_it_says_holds():
    world = serving(steps=steps(10, pause=10))
    world.deploy("bbb")
    world.routers[0].turns, world.routers[0].chosen = 400, {"bbb": 8}
    decision = world.after(11)
    assert decision.requeue is not None  # requests come without an event
    assert world.hold == "SplitMismatch: The routers gave 2 % of the requests to bbb, not 10 %."
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


def test_weight_zero_is_a_step_too_and_measures_nothing():
    world = serving(steps=steps(0, 50), analysis=analysis(passes=1))
    world.deploy("bbb")
    assert (world.weight, world.deployments["bbb"]) == (0, 1)
    world.after(61)
    assert world.weight == 50


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


@pytest.mark.parametrize("key", [keys.ANNOTATION_PAUSE, keys.ANNOTATION_ABORT, keys.ANNOTATION_PROMOTE])
@pytest.mark.parametrize("value", ["true", "", "aaa", "bbbb/now"])
def test_a_verb_that_names_no_candidate_is_told_once_in_each_rollout(key, value):
    world = serving(steps=steps(30, pause=600))
    world.deploy("bbb")
    world.annotations[key] = value
    notes = [note for _ in range(3) for note in world.run().notes]
    assert [(note.reason, note.warning) for note in notes] == [("VerbIgnored", True)]
    assert f"{key}={value} does nothing now: the candidate is revision bbb" in notes[0].message
    world.after(100)
    assert (world.weight, world.events.count("VerbIgnored")) == (30, 1)


def test_a_pause_that_stands_for_nothing_is_told_of_each_candidate_and_a_verb_that_was_obeyed_of_none():
    world = serving(steps=steps(30, pause=600))
    world.annotations[keys.ANNOTATION_PAUSE] = "true"
    world.deploy("bbb")
    assert world.events.count("VerbIgnored") == 1
    world.annotations[keys.ANNOTATION_ABORT] = "bbb"
    world.after(10)
    assert (world.phase, world.status.rollout.ignored) == ("RolledBack", {})
    world.deploy("ccc")
    assert world.events.count("VerbIgnored") == 2
    world.annotations = {keys.ANNOTATION_ABORT: "bbb", keys.ANNOTATION_PAUSE: "*"}
    world.after(10)
    assert (world.weight, world.events.count("VerbIgnored")) == (30, 2)


def test_a_verb_for_a_revision_that_is_still_to_come_is_told_and_obeyed_then():
    world = serving(steps=steps(30, pause=600))
    world.deploy("bbb")
    world.annotations[keys.ANNOTATION_ABORT] = "ccc"
    world.after(1)
    assert (world.phase, world.events.count("VerbIgnored")) == ("Step", 1)
    world.deploy("ccc")
    assert (world.phase, world.candidate, world.events.count("VerbIgnored")) == ("RolledBack", "ccc", 1)


def test_a_retry_of_another_revision_than_the_one_rolled_back_is_told():
    world = serving()
    world.deploy("bbb")
    world.annotations = {keys.ANNOTATION_ABORT: "bbb"}
    world.after(1)
    world.annotations = {keys.ANNOTATION_RETRY: "true"}
    world.after(1)
    assert (world.phase, world.events.count("VerbIgnored")) == ("RolledBack", 1)


def test_another_weight_for_the_running_step_starts_its_time_and_evidence_anew():
    world = serving(steps=steps(10, pause=60), analysis=analysis(passes=2))
    world.deploy("bbb")
    world.serve(300)
    world.after(30), world.after(29)
    assert world.status.rollout.passes == 2
    world.edit_rollout(steps=steps(90, pause=60))
    world.after(10)
    assert (world.weight, world.status.rollout.passes, world.stable) == (90, 0, "aaa")
    world.serve(300)
    world.after(59)
    assert world.stable == "aaa"
    world.after(10)
    assert world.stable == "bbb"


def test_a_step_put_before_the_running_one_is_not_taken_for_it():
    world = serving(steps=steps(10, 50, pause=60))
    world.deploy("bbb")
    world.after(61), world.after(50)
    assert (world.weight, world.status.rollout.step) == (50, 1)
    world.edit_rollout(steps=steps(5, 10, 50, pause=60))
    world.after(11)
    assert (world.weight, world.status.rollout.step) == (10, 1)
    world.after(61)
    assert (world.weight, world.stable) == (50, "aaa")


@pytest.mark.parametrize("left", [[50], [10], [5, 50]])
def test_a_plan_that_ends_below_the_running_step_skips_neither_its_last_step_nor_its_approval(left):
    world = serving(steps=steps(5, 10, 50, pause=600))
    world.deploy("bbb")
    world.after(601), world.after(601)
    assert (world.weight, world.status.rollout.step) == (50, 2)
    world.edit_rollout(steps=steps(*left, pause=600, approval=True))
    world.after(1)
    assert (world.weight, world.stable, world.status.rollout.step) == (left[-1], "aaa", len(left) - 1)
    world.after(601)
    assert (world.stable, world.hold.split(":")[0]) == ("aaa", "Approval")
    world.annotations[keys.ANNOTATION_PROMOTE] = "bbb"
    world.passes()
    assert world.stable == "bbb"


def test_a_plan_without_steps_is_the_fast_way_in_mid_rollout_too():
    world = serving(steps=steps(10, 50, pause=600))
    world.deploy("bbb")
    world.edit_rollout(steps=[])
    world.after(1)
    assert world.stable == "bbb"


def test_an_approval_is_for_the_weight_it_was_given_at():
    world = serving(steps=steps(10, pause=600, approval=True))
    world.deploy("bbb")
    world.annotations[keys.ANNOTATION_PAUSE] = "bbb"
    world.annotations[keys.ANNOTATION_PROMOTE] = "bbb"
    world.passes()
    assert world.status.rollout.approved
    world.edit_rollout(steps=steps(90, pause=600, approval=True))
    del world.annotations[keys.ANNOTATION_PAUSE]
    world.after(1)
    assert (world.weight, world.stable, world.status.rollout.approved) == (90, "aaa", False)


@pytest.mark.parametrize(
    ("before", "together", "stable"), [(False, True, "bbb"), (True, True, "bbb"), (True, False, "aaa")]
)
def test_another_weight_and_its_approval_may_come_together(before, together, stable):
    world = serving(steps=steps(10, pause=None, approval=True), analysis=analysis())
    world.deploy("bbb")
    if before:
        world.annotations[keys.ANNOTATION_PROMOTE] = "bbb/10"
        world.passes()
    world.edit_rollout(steps=steps(20, pause=None, approval=True))
    if together:
        world.annotations[keys.ANNOTATION_PROMOTE] = "bbb/20"
    world.passes()
    assert (world.weight, world.stable, world.events.count("StepApproved")) == (20, "aaa", before + together)
    for _ in range(3):  # the evidence is that of the new weight
        world.serve(300)
        world.after(10)
    assert world.stable == stable


@pytest.mark.parametrize("before", [[], steps(10, pause=60)], ids=["first", "later"])
@pytest.mark.parametrize(("edited", "stable"), [(50, "bbb"), (90, "aaa")])
def test_an_approval_of_a_step_that_waits_for_its_pods_is_for_that_weight_too(before, edited, stable):
    world = serving(replicas=4, steps=[*before, *steps(50, pause=None, approval=True)])
    world.target = revision("bbb")
    world.passes(settle=False)
    if before:
        world.passes()
        world.after(61, settle=False)
    assert (world.status.rollout.state, world.weight) == ("Scaling", 10 if before else 0)
    world.annotations[keys.ANNOTATION_PROMOTE] = "bbb"
    world.passes(settle=False)
    world.edit_rollout(steps=[*before, *steps(edited, pause=None, approval=True)])
    world.after(1)
    assert (world.stable, world.events.count("StepApproved")) == (stable, 1)
    if stable == "aaa":
        assert (world.weight, world.hold.split(":")[0]) == (edited, "Approval")


def test_stricter_bounds_are_not_passed_by_an_older_measurement():
    world = serving(steps=steps(10, pause=600), analysis=analysis(passes=1))
    world.value = 0.008
    world.deploy("bbb")
    world.serve(300)
    world.after(10)
    assert world.status.rollout.passes == 1
    metric = ERRORS.model_copy(update={"max": 0.001})
    world.edit_rollout(steps=steps(10, pause=10), analysis=analysis(passes=1, interval_seconds=100, metrics=[metric]))
    world.after(5)
    assert (world.stable, world.status.rollout.passes) == ("aaa", 0)
    world.value = 0.0
    world.after(100)
    assert world.stable == "bbb"


@pytest.mark.parametrize("phase", ["Step", "Promoting"])
def test_who_has_failed_more_often_than_is_allowed_by_now_is_given_up(phase):
    world = serving(steps=steps(50, pause=None), analysis=analysis(passes=1, window_seconds=10, failure_limit=5))
    world.deploy("bbb")
    world.serve(300)
    world.measured = ["Fail"] * 3
    for _ in range(3):
        world.after(20)
    assert (world.phase, world.status.rollout.failures) == ("Step", 3)
    if phase == "Promoting":
        world.unreached.add("bbb")
        world.edit_rollout(steps=[])
        world.passes()
    assert world.phase == phase
    world.edit_rollout(analysis=analysis(passes=1, failure_limit=2))
    world.after(20)
    assert (world.phase, world.stable) == ("RolledBack", "aaa")
    assert "3 measurements failed; failureLimit allows 2." in world.status.rollout.outcome


@pytest.mark.parametrize(
    ("approved", "edits"),
    [
        (True, [("right", 20)]),
        (False, [("right", 20)]),  # its pause still runs
        (True, [("right", 50)]),
        (True, [("wrong", 50), ("right", 20)]),
    ],
)
def test_another_query_is_not_passed_by_what_the_one_before_it_measured(approved, edits):
    asked = {name: AnalysisMetric(name="q", query=name, max=0.01) for name in ("wrong", "right")}
    world = serving(steps=steps(10, pause=60), analysis=analysis(metrics=[asked["wrong"]]))
    world.value = 0.0
    world.deploy("bbb")
    world.serve(300)
    for _ in range(4):
        world.after(10)
    assert world.status.rollout.passes == 4
    if approved:
        world.annotations[keys.ANNOTATION_PROMOTE] = "bbb"
    for query, least in edits:
        world.edit_rollout(analysis=analysis(metrics=[asked[query]], min_samples=least))
        world.passes()
    assert (world.phase, world.status.rollout.passes) == ("Step", 0)
    world.serve(300)
    world.after(10)
    assert (world.stable, world.status.rollout.passes) == ("aaa", 1)
    world.after(10)
    assert world.stable == "bbb"


def test_no_data_before_the_window_is_full_is_no_hold_yet():
    world = serving(steps=steps(10, pause=None), analysis=analysis(window_seconds=30, interval_seconds=10))
    world.deploy("bbb")
    world.serve(300)
    world.measured = ["NoData"] * 9
    world.after(10), world.after(10)
    assert (world.hold, world.status.rollout.state, world.asked) == ("", "Analyzing", 2)
    world.after(10)
    assert world.hold.startswith("NoData: ")


def test_a_candidate_is_measured_while_its_next_step_waits_for_pods_but_earns_nothing_then():
    world = serving(replicas=4, steps=steps(10, 100, pause=None), analysis=analysis(passes=2, failure_limit=0))
    world.deploy("bbb")
    world.serve(300)
    world.after(10), world.after(10, settle=False)
    assert (world.status.rollout.step, world.weight, world.status.rollout.state) == (1, 10, "Scaling")
    world.serve(300)
    world.after(10, settle=False), world.after(10, settle=False)
    assert (world.asked, world.status.rollout.passes) == (4, 0)
    world.measured = ["Fail"]
    world.after(10, settle=False)
    assert world.phase == "RolledBack"


def test_a_candidate_is_measured_while_it_waits_for_its_promotion():
    world = serving(replicas=4, steps=steps(10, pause=None), analysis=analysis(passes=1, failure_limit=0))
    world.deploy("bbb")
    world.serve(300)
    world.after(10, settle=False)
    assert (world.phase, world.weight) == ("Promoting", 10)
    world.serve(300)
    world.measured = ["Fail"]
    world.after(10, settle=False)
    assert (world.phase, world.stable) == ("RolledBack", "aaa")


def test_a_candidate_with_requests_is_measured_while_it_lacks_some_of_its_pods():
    world = serving(replicas=4, steps=steps(50, pause=600), analysis=analysis(failure_limit=0))
    world.deploy("bbb")
    world.serve(300)
    world.ready["bbb"] = 1
    decision = world.passes(1, settle=False)
    assert world.status.rollout.state == "Scaling"
    assert decision.requeue is not None
    assert decision.requeue <= 10
    world.measured = ["Fail"]
    world.after(10, settle=False)
    assert world.phase in ("RollingBack", "RolledBack")


@pytest.mark.parametrize("value", ["*", "bbb", "bbb/until-monday", " bbb "])
def test_a_share_never_rises_while_it_is_paused(value):
    world = serving(replicas=4, steps=steps(10, 50, pause=60))
    world.annotations[keys.ANNOTATION_PAUSE] = value
    world.deploy("bbb")
    world.after(3600)
    assert (world.phase, world.weight, world.hold.split(":")[0]) == ("Preparing", 0, "Paused")
    world.annotations.clear()
    world.passes()
    world.after(61, settle=False)
    assert (world.status.rollout.step, world.weight, world.status.rollout.state) == (1, 10, "Scaling")
    world.annotations[keys.ANNOTATION_PAUSE] = value
    world.after(3600)
    assert (world.weight, world.hold.split(":")[0]) == (10, "Paused")
    world.edit_rollout(steps=steps(5, 5, pause=60))
    world.passes()
    assert world.weight == 5  # down it may go
    world.annotations[keys.ANNOTATION_PAUSE] = "ccc"
    world.after(61)
    assert world.stable == "bbb"
