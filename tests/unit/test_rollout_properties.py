"""Whatever users, pods, routers and Prometheus do, in any order, with the operator killed anywhere.

The invariants stand in rollout_world.World: they are checked at every decision and after every single action.
"""

import contextlib
from datetime import timedelta

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.unit.rollout_world import KilledError, RouterPod, World, analysis, revision, spec, steps

from slmops.api import keys
from slmops.api.deployment import RolloutStatus
from slmops.rollout.seen import Problem
from slmops.rollout.sizes import candidate_pods

NAMES = st.sampled_from(["aaa", "bbb", "ccc"])
PASSES = 2


class AnyOrder(RuleBasedStateMachine):
    """Chaos, then calm: in the calm every rollout must come to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.aborts = 2  # somebody_annotates has up to 2
        plan = steps(10, 50, pause=30)
        evidence = analysis(passes=PASSES, failure_limit=1, min_samples=5)
        self.world = World(spec(replicas=3, steps=plan, analysis=evidence, progress_deadline_seconds=120), routers=2)
        self.world.target = revision("aaa")
        self.last_stable = ""

    @rule(seconds=st.sampled_from([0, 1, 5, 11, 31, 61, 121, 4000]))
    def time_goes_by(self, seconds: int) -> None:
        self._later(seconds)

    def _later(self, seconds: int) -> None:
        self.world.now += timedelta(seconds=seconds)

    @rule()
    def the_operator_works(self) -> None:
        """And when it asks for no other pass, there is nothing that another one would do."""
        if self._asks_for_none():
            before = self._reached()
            self.world.run()
            assert self._reached() == before

    @rule()
    def the_operator_sleeps(self) -> None:
        """It asked for no other pass: nothing that comes without an event would change a thing."""
        if self._asks_for_none():
            before = self._reached()
            self._later(4000)
            self.world.unreached.clear()
            self.world.serve(1000)
            self.world.run()
            assert self._reached() == before

    def _asks_for_none(self) -> bool:
        """A pass wants no other one, nor comes one by what it made: a Deployment has pods, and they bring events."""
        before = dict(self.world.deployments)
        return self.world.run().requeue is None and self.world.deployments == before

    def _reached(self) -> tuple[dict[str, int], RolloutStatus]:
        return dict(self.world.deployments), self.world.status.rollout

    @rule(actions=st.integers(0, 7))
    def the_operator_is_killed(self, actions: int) -> None:
        with contextlib.suppress(KilledError):
            self.world.run(crash_after=actions)

    @rule(actions=st.sets(st.integers(0, 7), min_size=1))
    def some_writes_are_refused(self, actions: set[int]) -> None:
        self.world.run(refused=actions)

    @rule()
    def pods_get_ready(self) -> None:
        self.world.settle()

    @rule(name=NAMES, count=st.integers(0, 3))
    def pods_go(self, name: str, count: int) -> None:
        self.world.ready[name] = min(self.world.ready.get(name, 0), count)

    @rule(name=NAMES, reason=st.sampled_from(["CrashLoopBackOff", "Unschedulable"]))
    def a_revision_breaks(self, name: str, reason: str) -> None:
        self.world.broken[name] = Problem(reason, "So it says.")
        self.world.settle()

    @rule(name=NAMES)
    def routers_lose_a_revision(self, name: str) -> None:
        self.world.unreached.add(name)

    @rule()
    def all_are_mended(self) -> None:
        self.world.broken.clear(), self.world.unreached.clear()

    @rule(index=st.integers(0, 1), name=NAMES, count=st.integers(0, 400))
    def a_router_miscounts(self, index: int, name: str, count: int) -> None:
        assume(index < len(self.world.routers))
        self.world.routers[index].turns += count
        self.world.routers[index].chosen[name] = self.world.routers[index].chosen.get(name, 0) + count

    @rule(requests=st.sampled_from([10, 100, 1000]))
    def requests_come(self, requests: int) -> None:
        self.world.serve(requests)

    @rule(index=st.integers(0, 1), silent=st.booleans())
    def a_router_changes(self, index: int, silent: bool) -> None:
        assume(index < len(self.world.routers))
        self.world.routers[index].silent = silent

    @rule(index=st.integers(0, 1))
    def a_router_is_replaced(self, index: int) -> None:
        assume(index < len(self.world.routers))
        weights, epoch = self.world.config_map
        self.world.routers[index] = RouterPod(dict(weights), epoch)

    @rule(words=st.lists(st.sampled_from(["Pass", "Fail", "NoData", "Unreachable", "Inconclusive"]), max_size=4))
    def prometheus_will_say(self, words: list[str]) -> None:
        self.world.measured = words

    @rule(name=NAMES)
    def the_spec_asks_for(self, name: str) -> None:
        self.world.target = revision(name)

    @rule()
    def the_source_is_not_ready(self) -> None:
        self.world.target = None

    @rule(replicas=st.sampled_from([0, 1, 2, 7]))
    def the_spec_is_scaled(self, replicas: int) -> None:
        self.world.spec = self.world.spec.model_copy(update={"replicas": replicas})

    @rule(
        key=st.sampled_from([keys.ANNOTATION_ABORT, keys.ANNOTATION_PROMOTE, keys.ANNOTATION_RETRY]),
        value=st.sampled_from(["*", "aaa", "bbb", "bbb/2", "nobody"]),
    )
    def somebody_annotates(self, key: str, value: str) -> None:
        self.world.annotations[key] = value

    @rule(value=st.sampled_from(["*", "bbb"]))
    def somebody_pauses(self, value: str) -> None:
        self.world.annotations[keys.ANNOTATION_PAUSE] = value

    @rule()
    def the_pause_ends(self) -> None:
        self.world.annotations.pop(keys.ANNOTATION_PAUSE, None)

    @precondition(lambda self: self.world.candidate and self.world.phase in ("Preparing", "Step", "Promoting"))
    @rule(silent=st.booleans())
    def abort_works_at_once_from_anywhere(self, silent: bool) -> None:
        """No metric, no router, no living candidate is needed."""
        for router in self.world.routers:
            router.silent = silent
        name = self.world.candidate
        self.aborts += 1  # a value that was obeyed is not obeyed again
        self.world.target = revision(name)
        self.world.annotations[keys.ANNOTATION_ABORT] = f"{name}/{self.aborts}"
        self.world.run()
        assert self.world.phase in ("RollingBack", "RolledBack")
        assert self.world.config_map[0].get(name, 0) == 0

    @invariant()
    def nobody_is_promoted_without_evidence(self) -> None:
        """A new stable revision has passed in each step, unless it is the first one."""
        stable = self.world.stable
        if stable != self.last_stable:
            assert not self.last_stable or self.world.asked >= 2 * PASSES
            if self.last_stable:
                self.world.asked -= 2 * PASSES
            self.last_stable = stable

    @invariant()
    def a_failure_is_a_failure(self) -> None:
        roll = self.world.status.rollout
        assert roll.failures <= 2
        assert roll.failures < 2 or roll.phase in ("RollingBack", "RolledBack")

    def teardown(self) -> None:
        """Calm: everything works, nobody interferes; the rollout ends with the wanted revision, or rolled back."""
        world = self.world
        world.broken.clear(), world.annotations.clear(), world.unreached.clear()
        world.measured = []
        world.spec = world.spec.model_copy(update={"replicas": 3})
        for router in world.routers:
            router.silent = False
        world.target = world.target or revision("aaa")
        for _ in range(40):
            world.passes(2)
            world.serve(200)
            self._later(15)
        if world.phase == "RolledBack":
            assert world.candidate == world.target.revision
        else:
            assert (world.phase, world.stable) == ("Stable", world.target.revision), world.log[-3:]
        assert world.deployments == ({world.stable: 3} if world.stable else {})
        assert all(r.weights == ({world.stable: 100} if world.stable else {}) for r in world.routers)
        settled = world.status
        world.run()
        assert world.status == settled  # at rest, nothing is written


class AnyPlan(AnyOrder):
    """The plan is edited as well, and Deployments are deleted by hand."""

    PLANS = ([], steps(10, pause=30), steps(10, 50, pause=30), steps(0, 100, pause=30), steps(30, approval=True))

    @rule(number=st.integers(0, len(PLANS) - 1))
    def the_steps_are_edited(self, number: int) -> None:
        self.world.edit_rollout(steps=self.PLANS[number])

    @rule(passes=st.integers(0, 3), failures=st.integers(0, 1))
    def the_analysis_is_edited(self, passes: int, failures: int) -> None:
        evidence = analysis(passes=passes, failure_limit=failures, min_samples=5) if passes else None
        self.world.edit_rollout(analysis=evidence)

    @rule(deadline=st.sampled_from([10, 600]), delay=st.sampled_from([0, 3600]))
    def the_times_are_edited(self, deadline: int, delay: int) -> None:
        self.world.edit_rollout(progress_deadline_seconds=deadline, scale_down_delay_seconds=delay)

    @rule(name=NAMES)
    def a_deployment_is_deleted(self, name: str) -> None:
        self.world.delete_deployment(name)

    @invariant()
    def nobody_is_promoted_without_evidence(self) -> None:
        """How much that is, changes with the plan."""

    @invariant()
    def a_failure_is_a_failure(self) -> None:
        """How many are too many, too."""

    def teardown(self) -> None:
        self.world.edit_rollout(steps=self.PLANS[2], scale_down_delay_seconds=30)
        super().teardown()


for machine in (AnyOrder, AnyPlan):
    machine.TestCase.settings = settings(
        max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
    )
TestAnyOrder, TestAnyPlan = AnyOrder.TestCase, AnyPlan.TestCase


@given(replicas=st.integers(1, 1000), weight=st.integers(0, 100))
def test_a_share_gets_enough_pods_and_never_none(replicas: int, weight: int) -> None:
    pods = candidate_pods(replicas, weight)
    assert 1 <= pods <= replicas
    assert pods * 100 >= replicas * weight
    assert weight == 0 or (pods - 1) * 100 < replicas * weight or pods == 1


def _finish(world: World) -> None:
    for _ in range(12):
        world.passes(3)
        world.serve(300)
        world.after(31)


@settings(max_examples=60, deadline=None)
@given(crashes=st.lists(st.integers(0, 9), min_size=1, max_size=25))
def test_a_rollout_interrupted_anywhere_ends_as_one_that_was_not(crashes: list[int]) -> None:
    plain, torn = (World(spec(steps=steps(10, 50, pause=30), analysis=analysis()), routers=2) for _ in range(2))
    for world in (plain, torn):
        world.deploy("aaa")
        world.target = revision("bbb")
    for actions in crashes:
        with contextlib.suppress(KilledError):
            torn.settle()
            torn.run(crash_after=actions)
    _finish(plain), _finish(torn)
    assert torn.stable == plain.stable == "bbb"
    assert torn.deployments == plain.deployments
    assert [r.weights for r in torn.routers] == [r.weights for r in plain.routers]
