"""The state machine of a rollout. One pure function: (spec, status, what is seen, now) -> the wanted state.

    Stable --new revision--> Preparing --ready--> Step 0 .. n --earned--> Promoting --routed--> Draining --> Stable
    Preparing | Step | Promoting --fail, abort, deadline--> RollingBack --weight 0 seen--> RolledBack
    Preparing | Step | Promoting --third revision--> Preparing      --spec back to stable--> Draining --> Stable
    RolledBack --retry, new revision--> Preparing                   --spec back to stable--> Stable

Rules that hold in every state:
- Deployments are per revision, so promotion moves weights and roles, never pods.
- The stable revision keeps all its pods until the routers were seen to send everything to its successor.
- Weight goes up only to pods that are ready and that every router reaches; it goes to 0 before pods go.
- Unknown is not bad: missing metrics, a silent Prometheus or router hold. Only a Fail spends the budget.
- Rolling back needs nothing but the decision: no metric, no router that answers, no candidate that lives.
- Times in status are absolute and facts are read anew, so a pass may be repeated or lost at any point.
"""

from datetime import datetime, timedelta

from slmops.api.deployment import ModelDeploymentSpec, ModelDeploymentStatus, Revision, RolloutStatus, Step
from slmops.api.times import parse, stamp
from slmops.rollout import sizes
from slmops.rollout.seen import Decision, Note, Pods, Problem, Seen
from slmops.rollout.verbs import Verb, obey
from slmops.rollout.verdicts import all_pass, first_failed, first_unknown, too_few

STABLE, PREPARING, STEP, PROMOTING, DRAINING = "Stable", "Preparing", "Step", "Promoting", "Draining"
ROLLING_BACK, ROLLED_BACK = "RollingBack", "RolledBack"
ROLLING_OUT = (PREPARING, STEP, PROMOTING)

ROUTER_SECONDS = 1.0  # until a router is asked again whether it has the weights
READY_SECONDS = 2.0  # until the routers are asked again whether they reach new pods; pods themselves wake us
SAMPLES_SECONDS = 2.0  # until the routers are asked again for the number of requests

SPLIT_TURNS = 100  # requests from which the observed split is compared
SPLIT_POINTS = 5.0  # percent points by which it may be off


def decide(spec: ModelDeploymentSpec, status: ModelDeploymentStatus, seen: Seen, now: datetime) -> Decision:
    """Decide. Pure."""
    one = _Pass(spec, status, seen, now)
    one.take_target()
    one.obey()
    one.advance()
    one.retire()
    return one.decision()


def measurement_due(spec: ModelDeploymentSpec, status: ModelDeploymentStatus, seen: Seen, now: datetime) -> bool:
    """Whether this pass should measure: in a step that is routed, has enough samples, and after each interval."""
    return _Pass(spec, status, seen, now).due()


class _Pass:
    """One decision in the making."""

    def __init__(
        self, spec: ModelDeploymentSpec, status: ModelDeploymentStatus, seen: Seen, now: datetime
    ) -> None:
        self.spec, self.seen, self.now = spec, seen, now
        self.stable, self.candidate = status.stable, status.candidate
        self.weight = (status.weight or 0) if status.candidate else 0
        self.roll = status.rollout
        self.retiring = dict(status.rollout.retiring)
        self.notes: list[Note] = []
        self.wakes: list[float] = []
        self.remove: list[str] = []

    # What the spec asks for.

    def take_target(self) -> None:
        """Start, replace or call off a rollout when the spec asks for another revision than before."""
        target = self.seen.target
        current = self.candidate or self.stable
        if target is None or (current and target.revision == current.revision):
            return
        old = self.candidate
        if old is not None:
            self._leave(old)
        if self.stable is not None and target.revision == self.stable.revision:
            self.candidate, self.weight = None, 0
            if self.roll.phase != ROLLED_BACK:
                self._note("RolloutReverted", "The spec asks for the stable revision again: it gets all requests.")
                self._set(outcome="Reverted: the spec went back to the stable revision.")
            self._enter(DRAINING)
            return
        if old is not None and self.roll.phase in ROLLING_OUT:
            self._note("RolloutSuperseded", f"Revision {target.revision} takes the place of {old.revision}.")
        self._start(target)

    def _start(self, target: Revision) -> None:
        self.retiring.pop(target.revision, None)
        self.candidate, self.weight = target, 0
        self._set(step=0, passes=0, failures=0, samples=None, verdicts=[], outcome="")
        self._enter(PREPARING)
        self._note("RolloutStarted", f"Revision {target.revision} of {target.model} is prepared.")

    def _leave(self, old: Revision) -> None:
        """Let a candidate go: weight 0 now, its pods once the routers have obeyed."""
        self.retiring.setdefault(old.revision, "")

    def obey(self) -> None:
        """Carry out verbs given by annotation, each once."""
        handled, verbs = obey(self.seen.annotations, self.roll, self.stable, self.candidate)
        self._set(handled=handled)
        for verb in verbs:
            match verb:
                case Verb.ABORT:
                    self._roll_back(Problem("Aborted", "Aborted by annotation."))
                case Verb.RETRY:
                    assert self.candidate is not None
                    self._start(self.candidate)
                case Verb.PROMOTE:
                    self._set(approved=True)
                    self._note("StepApproved", f"Step {self.roll.step + 1} was approved by annotation.")

    # The phases.

    def advance(self) -> None:
        """Run the phases until one has to wait."""
        while True:
            before = (self.roll.phase, self.roll.step)
            self._set(hold="", state="")
            match self.roll.phase:
                case "Preparing":
                    self._preparing()
                case "Step":
                    self._step()
                case "Promoting":
                    self._promoting()
                case "RollingBack":
                    self._rolling_back()
                case "Draining":
                    self._draining()
            if (self.roll.phase, self.roll.step) == before:
                return

    def _preparing(self) -> None:
        if self.spec.replicas == 0:
            self._hold("ScaledToZero", "spec.replicas is 0; the rollout goes on when there are pods.")
            self._set(deadline_at=None)
            return
        # The first revision has nobody to protect: it serves as soon as one pod does.
        if self._pods_ready(1 if self.stable is None else self._need(self._steps[0] if self._steps else None)):
            self._set(step=0)
            self._enter(STEP if self.stable and self._steps else PROMOTING)

    def _step(self) -> None:
        if self.roll.step >= len(self._steps):  # the last one is done, or the plan has become shorter
            self._enter(PROMOTING)
            return
        step = self._steps[self.roll.step]
        if self._judged() or self._lost():
            return
        if not self._pods_ready(self._need(step)):
            return
        self.weight = step.weight
        if not self._routed():
            return
        if self.roll.routed_at is None:
            self._set(routed_at=stamp(self.now))
            self._note("StepRouted", f"Revision {self._name} gets {step.weight} % of the requests.")
        self._set(samples=self._samples())
        if self._earned(step):
            self._set(step=self.roll.step + 1)
            self._enter(STEP)

    def _promoting(self) -> None:
        if self._lost():
            return
        if not self._pods_ready(1 if self.stable is None else self.spec.replicas) or self._paused():
            return
        self.weight = 100
        if not self._routed():
            return
        old, new = self.stable, self.candidate
        assert new is not None
        self.stable, self.candidate, self.weight = new, None, 0
        if old is not None:
            self._leave(old)
        self._set(outcome=f"Promoted: {new.revision} at {stamp(self.now)}.", samples=None)
        self._enter(DRAINING)
        self._note("RolloutPromoted", f"Revision {new.revision} gets all requests.")

    def _rolling_back(self) -> None:
        self.weight = 0
        assert self.candidate is not None
        self._leave(self.candidate)
        if self._rid_of(self.candidate.revision):
            self._enter(ROLLED_BACK)
        else:
            self._await_routers("RollingBack")

    def _draining(self) -> None:
        if not self.retiring:
            self._enter(STABLE)

    # What a step waits for.

    def _earned(self, step: Step) -> bool:
        """Whether the candidate may go on to the next step; says what it waits for where not."""
        analysis = self.spec.rollout.analysis if step.weight else None
        pause = step.pause_seconds
        least = pause if pause is not None else (analysis.interval_seconds if analysis else 0)
        left = 0.0 if self.roll.approved else self._left(self.roll.routed_at, least)
        if analysis:
            self.wakes.append(min(SAMPLES_SECONDS, max(self._left_to_measure(), 0.1)))
        if self._paused() or self._split_is_off(step):
            return False
        if left > 0:
            self.wakes.append(left)
            self._set(state="Pausing" if pause else "Analyzing")
            return False
        if analysis and not self._enough(analysis.min_samples, analysis.passes):
            return False
        if step.approval and not self.roll.approved:
            self._hold("Approval", f"Waits for the annotation slmops.dev/promote={self._name}.")
            return False
        return True

    def _enough(self, min_samples: int, passes: int) -> bool:
        if self._samples() < min_samples:
            assert self.spec.rollout.analysis is not None
            short = too_few(self.spec.rollout.analysis.metrics, self._samples(), min_samples)
            self._set(verdicts=list(short))
            self._hold("TooFewSamples", f"Revision {self._name}: {short[0].message}.")
            return False
        unknown = first_unknown(self.roll.verdicts)
        if self.roll.passes < passes:
            self._set(state="Analyzing")
            if unknown is not None:
                self._hold(unknown.verdict, f"Metric {unknown.name}: {unknown.message}")
            return False
        return True

    def due(self) -> bool:
        """See measurement_due."""
        analysis = self.spec.rollout.analysis
        if self.roll.phase != STEP or analysis is None or self.roll.step >= len(self._steps):
            return False
        if self.roll.routed_at is None or self._steps[self.roll.step].weight == 0:
            return False
        return self._left_to_measure() <= 0 and self._samples() >= analysis.min_samples

    def _judged(self) -> bool:
        """Account for what was measured; True where that ends the rollout."""
        analysis = self.spec.rollout.analysis
        verdicts = self.seen.verdicts
        if not verdicts or analysis is None or not self.due():
            return False
        failed = first_failed(verdicts)
        self._set(
            measured_at=stamp(self.now),
            verdicts=list(verdicts),
            passes=self.roll.passes + 1 if all_pass(verdicts) else 0,
            failures=self.roll.failures + (failed is not None),
        )
        if failed is None:
            return False
        self._note("AnalysisFailed", f"Revision {self._name}, metric {failed.name}: {failed.message}.", warning=True)
        if self.roll.failures <= analysis.failure_limit:
            return False
        self._roll_back(Problem("AnalysisFailed", f"Metric {failed.name}: {failed.message}."))
        return True

    def _left_to_measure(self) -> float:
        analysis = self.spec.rollout.analysis
        since = max((t for t in (self.roll.measured_at, self.roll.routed_at) if t), default=None)
        return self._left(since, analysis.interval_seconds) if analysis else 0.0

    def _split_is_off(self, step: Step) -> bool:
        """Compare what the routers did with what they were told, by the requests that are free of a conversation."""
        turns = sum(router.turns for router in self.seen.routers)
        chosen = sum(router.chosen.get(self._name, 0) for router in self.seen.routers)
        if turns < SPLIT_TURNS or abs(chosen / turns * 100 - step.weight) <= SPLIT_POINTS:
            return False
        self._hold(
            "SplitMismatch", f"The routers gave {chosen} of {turns} requests to {self._name}, not {step.weight} %."
        )
        return True

    def _paused(self) -> bool:
        if self.seen.annotations.get(Verb.PAUSE) not in ("*", self._name):
            return False
        self._hold("Paused", "Paused by annotation; remove slmops.dev/pause to go on.")
        return True

    # Pods and routers.

    @property
    def _steps(self) -> list[Step]:
        return self.spec.rollout.steps

    @property
    def _name(self) -> str:
        return self.candidate.revision if self.candidate else ""

    @property
    def _pods(self) -> Pods:
        return self.seen.pods.get(self._name) or Pods(0, 0)

    def _need(self, step: Step | None) -> int:
        return sizes.candidate_pods(self.spec.replicas, step.weight if step else 100)

    def _reached(self) -> int:
        """Pods of the candidate that are ready, also in the eyes of every router that answers."""
        views = [router.ready.get(self._name, 0) for router in self.seen.routers if router.weights is not None]
        return min([self._pods.ready, *views])

    def _pods_ready(self, need: int) -> bool:
        """Wait for pods; roll back where they take too long, except for the first revision, which goes on trying."""
        if self._reached() >= need:
            self._set(deadline_at=None)
            return True
        self._set(state="Scaling")
        self.wakes.append(READY_SECONDS if self._pods.ready >= need else 15.0)
        if self.roll.deadline_at is None:
            self._set(deadline_at=self._in(self.spec.rollout.progress_deadline_seconds))
        problem = self._pods.problem
        said = f"{self._reached()} of {need} pods of revision {self._name} are ready"
        if self._pods.ready >= need:
            problem = Problem("NotReached", "The pods are ready, but the router does not reach them all")
        if problem:
            self._hold(problem.reason, f"{said}: {problem.message}")
        left = self._left(self.roll.deadline_at, 0)
        if left > 0:
            self.wakes.append(left)
            return False
        limit = self.spec.rollout.progress_deadline_seconds
        why = Problem(
            problem.reason if problem else "ProgressDeadlineExceeded",
            f"Not ready within {limit} s: {said}" + (f": {problem.message}" if problem else "."),
        )
        if self.stable is None:
            self._hold("ProgressDeadlineExceeded", why.message)
        else:
            self._roll_back(why)
        return False

    def _lost(self) -> bool:
        """Take the weight back from a candidate whose last pod is gone; True where it had any."""
        if self.weight == 0 or self._pods.ready > 0 or self.stable is None:
            return False
        self.weight = 0
        self._set(routed_at=None, passes=0, state="Scaling")
        self._hold("CandidateNotReady", f"No pod of revision {self._name} is ready: it gets no requests.")
        self._note("CandidateNotReady", self.roll.hold, warning=True)
        self.wakes.append(ROUTER_SECONDS)
        return True

    def _routed(self) -> bool:
        """Whether every router has these weights, since this epoch; says so where not."""
        wanted, epoch = self.weights(), self.epoch()
        if self.seen.routers and all(
            router.epoch == epoch and _same(router.weights, wanted) for router in self.seen.routers
        ):
            return True
        self._set(state="Routing")
        self._await_routers("Routing")
        return False

    def _await_routers(self, state: str) -> None:
        self._set(state=state)
        self.wakes.append(ROUTER_SECONDS)
        silent = sum(router.weights is None for router in self.seen.routers)
        if not self.seen.routers:
            problem = self.seen.router_problem or Problem("RouterNotReady", "No router pod is ready.")
            self._hold(problem.reason, problem.message)
        elif silent:
            self._hold("RouterUnreachable", f"{silent} of {len(self.seen.routers)} routers do not answer the operator.")

    def _rid_of(self, revision: str) -> bool:
        """Whether every router was seen to send nothing to this revision."""
        views = [router.weights for router in self.seen.routers]
        return bool(views) and all(view is not None and view.get(revision, 0) == 0 for view in views)

    def _samples(self) -> int:
        epoch = self.epoch()
        return sum(r.answered.get(self._name, 0) for r in self.seen.routers if r.epoch == epoch)

    def retire(self) -> None:
        """Let go of what serves nobody any more: once no router sends it requests, and after the delay."""
        keep = {r.revision for r in (self.stable, self.candidate) if r}
        for revision in self.seen.pods:
            if revision not in keep:
                self.retiring.setdefault(revision, "")
        for revision, when in list(self.retiring.items()):
            if revision not in self.seen.pods:
                del self.retiring[revision]
            elif not self._rid_of(revision):
                self.retiring[revision] = ""
                self.wakes.append(ROUTER_SECONDS)
            elif not when:
                delay = self.spec.rollout.scale_down_delay_seconds
                self.retiring[revision] = self._in(delay)
                self.wakes.append(max(delay, 0.1))
            elif (left := self._left(when, 0)) > 0:
                self.wakes.append(left)
            else:
                self.remove.append(revision)
                self.wakes.append(ROUTER_SECONDS)
        self._set(retiring=self.retiring)

    # The result.

    def weights(self) -> dict[str, int]:
        """Percent of the requests by revision."""
        active = self.candidate is not None and self.roll.phase in ROLLING_OUT
        weights = dict.fromkeys((r for r in self.retiring if r not in self.remove and r in self.seen.pods), 0)
        if self.candidate is not None and (active or self._name in self.retiring):
            weights[self._name] = self.weight
        if self.stable is not None:
            weights[self.stable.revision] = 100 - (self.weight if active else 0)
        return {name: weight for name, weight in weights.items() if name not in self.remove}

    def epoch(self) -> str:
        """Name of the stretch over which requests are counted: one weight of one step."""
        if self.candidate is None or self.roll.phase not in ROLLING_OUT:
            return "stable"
        return f"{self._name}/{self.roll.phase}/{self.roll.step}/{self.weight}"

    def decision(self) -> Decision:
        """The outcome of this pass."""
        kept = {r: p.wanted for r, p in self.seen.pods.items() if r in self.retiring and r not in self.remove}
        replicas = {r: 0 if self.spec.replicas == 0 else n for r, n in kept.items()}
        if self.stable is not None:
            replicas[self.stable.revision] = self.spec.replicas
        if self.candidate is not None and self.roll.phase in ROLLING_OUT:
            replicas[self._name] = self._candidate_pods()
        if not self.seen.routers or any(r.weights is None for r in self.seen.routers):
            self.wakes.append(5.0)
        elif any(not _same(r.weights, self.weights()) or r.epoch != self.epoch() for r in self.seen.routers):
            self.wakes.append(ROUTER_SECONDS)
        return Decision(
            stable=self.stable,
            candidate=self.candidate,
            weight=self.weight,
            rollout=self.roll,
            replicas=replicas,
            weights=self.weights(),
            epoch=self.epoch(),
            remove=tuple(self.remove),
            notes=tuple(self.notes),
            requeue=min(self.wakes, default=None),
        )

    def _candidate_pods(self) -> int:
        if self.stable is None or self.roll.phase == PROMOTING or not self._steps:
            return self.spec.replicas
        last = self.roll.step if self.roll.phase == STEP else 0
        return max(self._need(step) for step in self._steps[: last + 1])

    def _roll_back(self, why: Problem) -> None:
        assert self.candidate is not None
        self.weight = 0
        self._leave(self.candidate)
        self._set(outcome=f"{why.reason}: {why.message}"[:512])
        self._enter(ROLLING_BACK)
        self._note("RollingBack", f"Revision {self._name}: {why.message}", warning=True)

    def _enter(self, phase: str) -> None:
        self._set(
            phase=phase, entered_at=stamp(self.now), deadline_at=None, routed_at=None, measured_at=None,
            approved=False, passes=0, hold="", state="",
        )

    def _hold(self, reason: str, message: str) -> None:
        self._set(hold=f"{reason}: {message}"[:512], state=self.roll.state or "Holding")

    def _note(self, reason: str, message: str, *, warning: bool = False) -> None:
        self.notes.append(Note(reason, message, warning))

    def _set(self, **changes: object) -> None:
        self.roll = self.roll.model_copy(update=changes)

    def _in(self, seconds: float) -> str:
        return stamp(self.now + timedelta(seconds=seconds))

    def _left(self, since: str | None, seconds: float) -> float:
        """Seconds until `seconds` after that time; 0 or less where it is past."""
        if since is None:
            return 0.0
        return (parse(since) + timedelta(seconds=seconds) - self.now).total_seconds()


def _same(have: object, wanted: dict[str, int]) -> bool:
    """Whether a router's weights are these; a revision that it does not know counts as 0."""
    if not isinstance(have, dict):
        return False
    return all(have.get(name, 0) == wanted.get(name, 0) for name in {*have, *wanted})


__all__ = ["RolloutStatus", "decide", "measurement_due"]
