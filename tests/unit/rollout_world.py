"""A world for the rollout's decisions: Deployments, pods, routers, a clock; each action of a pass can be the last."""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from slmops.api import keys
from slmops.api.deployment import (
    Analysis,
    AnalysisMetric,
    ModelDeploymentSpec,
    ModelDeploymentStatus,
    Revision,
    Rollout,
    ServedModel,
    Step,
    Verdict,
)
from slmops.rollout.machine import decide, measurement_due, measurement_window
from slmops.rollout.seen import Decision, Pods, Problem, Router, Seen
from slmops.rollout.sizes import candidate_pods
from slmops.rollout.verdicts import judge

START = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
ERRORS = AnalysisMetric(name="errors", builtin="errorRate", max=0.01)


def revision(name: str) -> Revision:
    return Revision(revision=name, model=f"oci://store/m:{name}", digest=f"sha256:{name}")


def spec(replicas: int = 2, **rollout: object) -> ModelDeploymentSpec:
    """Two steps, 10 and 50 percent, with a pause of 60 s each, unless the test says otherwise."""
    return ModelDeploymentSpec(model=ServedModel(uri="oci://store/m:1"), replicas=replicas, rollout=Rollout(**rollout))


def analysis(**more: object) -> Analysis:
    return Analysis(**{"metrics": [ERRORS], "interval_seconds": 10, "min_samples": 20, "passes": 2, **more})


def steps(*weights: int, pause: int | None = 60, approval: bool = False) -> list[Step]:
    return [Step(weight=w, pause_seconds=pause, approval=approval) for w in weights]


@dataclass
class RouterPod:
    weights: dict[str, int] = field(default_factory=dict)
    epoch: str = ""
    answered: dict[str, int] = field(default_factory=dict)
    turns: int = 0
    chosen: dict[str, int] = field(default_factory=dict)
    silent: bool = False


class KilledError(Exception):
    """The operator is gone in the middle of a pass."""


class World:
    """`run` makes passes; everything else is what users and the cluster do."""

    def __init__(self, wanted: ModelDeploymentSpec, routers: int = 1) -> None:
        self.spec, self.now = wanted, START
        self.status = ModelDeploymentStatus()
        self.target: Revision | None = None
        self.deployments: dict[str, int] = {}
        self.ready: dict[str, int] = {}
        self.broken: dict[str, Problem] = {}  # revisions whose pods never get ready
        self.deleted: set[str] = set()  # revisions whose Deployment somebody deleted, until it is there again
        self.unreached: set[str] = set()  # revisions whose pods the routers do not find
        self.routers = [RouterPod() for _ in range(routers)]
        self.config_map: tuple[dict[str, int], str] = ({}, "")
        self.annotations: dict[str, str] = {}
        self.measured: list[str] = []  # verdicts that will be given, then Pass for ever
        self.value: float | None = None  # measured instead, and judged
        self.requests: list[tuple[datetime, bool]] | None = None  # the candidate's, and which failed: their share is
        self.windows: list[int] = []  # seconds, of each measurement
        self.asked = 0
        self.events: list[str] = []
        self.log: list[str] = []

    # The cluster.

    def settle(self) -> None:
        """Pods become ready, unless their revision is broken."""
        self.ready = {r: 0 if r in self.broken else n for r, n in self.deployments.items()}

    def serve(self, requests: int) -> None:
        """So many requests arrive at each router, none of them part of a conversation."""
        for router in self.routers:
            for name, weight in router.weights.items():
                router.answered[name] = router.answered.get(name, 0) + requests * weight // 100
                router.chosen[name] = router.chosen.get(name, 0) + requests * weight // 100
            router.turns += requests

    def seen(self) -> Seen:
        pods = {
            r: Pods(n, self.ready.get(r, 0), self.broken.get(r), fell=r in self.broken)
            for r, n in self.deployments.items()
        }
        found = {r: 0 if r in self.unreached else n for r, n in self.ready.items()}
        views = tuple(
            Router() if r.silent else Router(dict(r.weights), r.epoch, found, dict(r.answered), dict(r.chosen), r.turns)
            for r in self.routers
        )
        seen = Seen(self.target, pods, views, annotations=dict(self.annotations))
        if measurement_due(self.spec, self.status, seen, self.now):
            self.asked += 1
            self.windows.append(measurement_window(self.spec, self.status, seen, self.now))
            verdict = self._measure()
            seen = Seen(self.target, pods, views, verdicts=(verdict,), annotations=dict(self.annotations))
        return seen

    def _measure(self) -> Verdict:
        if self.requests is not None and self.spec.rollout.analysis:
            since = self.now - timedelta(seconds=self.windows[-1])
            failed = [bad for moment, bad in self.requests if moment > since]
            share = sum(failed) / len(failed) if failed else float("nan")
            return judge(self.spec.rollout.analysis.metrics[0], share)
        if self.value is not None and self.spec.rollout.analysis:
            return judge(self.spec.rollout.analysis.metrics[0], self.value)
        word = self.measured.pop(0) if self.measured else "Pass"
        return Verdict(name="errors", verdict=word, message=word)  # type: ignore[arg-type]

    def edit_rollout(self, **fields: object) -> None:
        """A user edits the plan."""
        plan = self.spec.rollout.model_copy(update=fields)
        self.spec = self.spec.model_copy(update={"rollout": plan})

    def delete_deployment(self, name: str) -> None:
        """Somebody deletes it by hand, and its pods with it."""
        self._remove(name)
        self.deleted.add(name)

    # The operator.

    def run(self, crash_after: int | None = None, refused: Collection[int] = ()) -> Decision:
        """One pass, in the driver's order, which leaves the refused actions out. Raises KilledError after so many."""
        seen = self.seen()
        before = self.status
        decision = decide(self.spec, before, seen, self.now)
        self.check_decision(before, seen, decision)
        actions = [lambda: self._write(decision)] if decision.given_up else []
        actions.append(lambda: self._route_map(decision))
        actions += [lambda r=r, n=n: self._scale(r, n) for r, n in sorted(decision.replicas.items())]
        actions += [lambda p=p: self._push(p, decision) for p in self.routers if not p.silent]
        actions += [lambda r=r: self._remove(r) for r in decision.remove]
        actions.append(lambda: self._write(decision))
        for number, action in enumerate(actions):
            if crash_after is not None and number >= crash_after:
                raise KilledError
            if number not in refused or number == len(actions) - 1:  # where no status can be written, it was killed
                action()
            self.check_world()
        self.events += [note.reason for note in decision.notes]
        self.log.append(f"{self.phase} step={decision.rollout.step} weight={decision.weight} {decision.rollout.hold}")
        return decision

    def passes(self, count: int = 4, *, settle: bool = True) -> Decision:
        """Some passes at the same moment: what the operator's wake-ups do within a second or two."""
        for _ in range(count):
            if settle:
                self.settle()
            decision = self.run()
        return decision

    def after(self, seconds: float, *, settle: bool = True) -> Decision:
        """Time goes by, then passes."""
        self.now += timedelta(seconds=seconds)
        return self.passes(settle=settle)

    def deploy(self, name: str) -> Decision:
        """The spec asks for another revision."""
        self.target = revision(name)
        return self.passes()

    @property
    def phase(self) -> str:
        return self.status.rollout.phase

    @property
    def hold(self) -> str:
        return self.status.rollout.hold

    @property
    def stable(self) -> str:
        return self.status.stable.revision if self.status.stable else ""

    @property
    def candidate(self) -> str:
        return self.status.candidate.revision if self.status.candidate else ""

    @property
    def weight(self) -> int:
        return self.status.weight or 0

    def _route_map(self, decision: Decision) -> None:
        self.config_map = (dict(decision.weights), decision.epoch)

    def _scale(self, name: str, count: int) -> None:
        self.deployments[name] = count
        self.deleted.discard(name)
        self.ready[name] = min(self.ready.get(name, 0), count)

    def _push(self, router: RouterPod, decision: Decision) -> None:
        if router.epoch != decision.epoch:
            router.answered, router.chosen, router.turns = {}, {}, 0
        router.weights, router.epoch = dict(decision.weights), decision.epoch

    def _remove(self, name: str) -> None:
        self.deployments.pop(name, None)
        self.ready.pop(name, None)

    def _write(self, decision: Decision) -> None:
        self.status = self.status.model_copy(
            update={
                "stable": decision.stable,
                "candidate": decision.candidate,
                "weight": decision.weight if decision.candidate else None,
                "rollout": decision.rollout,
            }
        )
        ModelDeploymentStatus.model_validate(self.status.wire())  # it can be stored and read back

    # What must hold, whatever happens.

    def check_decision(self, before: ModelDeploymentStatus, seen: Seen, decision: Decision) -> None:
        assert sum(decision.weights.values()) in ((100,) if decision.stable else (0, 100))
        assert set(decision.weights) >= {r.revision for r in (decision.stable,) if r}
        assert not set(decision.remove) & set(decision.weights)
        assert not set(decision.remove) & set(decision.replicas)
        if decision.stable:
            assert decision.replicas[decision.stable.revision] == self.spec.replicas
        for name, weight in decision.weights.items():
            if weight and name != (decision.stable.revision if decision.stable else ""):
                self._may_have(name, weight, before, seen)
        for name in decision.remove:
            assert seen.routers
            assert all(r.weights is not None and r.weights.get(name, 0) == 0 for r in seen.routers)
        assert decision.rollout.waiting_since or decision.rollout.waiting_pods is None  # who waits for none tells none
        again = decide(self.spec, before, seen, self.now)
        assert again == decision  # the same facts, the same decision

    def _may_have(self, name: str, weight: int, before: ModelDeploymentStatus, seen: Seen) -> None:
        """Weight of a candidate rises only when enough pods are ready, and stays only while one is."""
        ready = seen.pods[name].ready if name in seen.pods else 0
        assert ready > 0 or before.stable is None
        had = (before.weight or 0) if before.candidate and before.candidate.revision == name else 0
        paused = self.annotations.get(keys.ANNOTATION_PAUSE) in ("*", name)
        assert weight <= had or not paused
        if weight > had and before.stable is not None:
            assert ready >= candidate_pods(self.spec.replicas, weight)
            for router in seen.routers:
                assert router.weights is None or router.ready.get(name, 0) >= candidate_pods(self.spec.replicas, weight)

    def check_world(self) -> None:
        """A router never sends requests to a revision that is not there."""
        for router in self.routers:
            for name, weight in router.weights.items():
                assert weight == 0 or name in self.deployments or name in self.deleted, (
                    name,
                    router.weights,
                    self.log[-5:],
                )


def serving(name: str = "aaa", **how: Any) -> World:
    """A world in which revision `name` serves."""
    world = World(spec(**how))
    world.deploy(name)
    assert (world.phase, world.stable, world.candidate) == ("Stable", name, "")
    world.events.clear()
    return world
