"""One decision in the making: the status as it changes, what is known of pods and routers, and the outcome."""

from datetime import datetime, timedelta

from slmops.api.deployment import ModelDeploymentSpec, ModelDeploymentStatus, Revision, Step, Verdict
from slmops.api.times import parse, stamp
from slmops.rollout.phases import (
    DRAINING,
    PREPARING,
    PROMOTING,
    READY_SECONDS,
    RETIRING_MAX,
    ROLLING_BACK,
    ROLLING_OUT,
    ROUTER_SECONDS,
    SILENT_SECONDS,
    STABLE,
    STEP,
)
from slmops.rollout.seen import NO_ROOM, Decision, Note, Pods, Problem, Router, Seen
from slmops.rollout.sizes import candidate_pods

RETIRING_TOLD = 16  # most entries of status.rollout.retiring and former; others are found again by their Deployments


class Work:
    """Starts as the status says; `decision` is what it has become."""

    def __init__(self, spec: ModelDeploymentSpec, status: ModelDeploymentStatus, seen: Seen, now: datetime) -> None:
        self.spec, self.seen, self.now = spec, seen, now
        self.stable, self.candidate = status.stable, status.candidate
        self.weight = (status.weight or 0) if status.candidate else 0
        self.roll = status.rollout
        self.retiring = dict(status.rollout.retiring)
        former = status.rollout.former
        self.former = list(status.rollout.retiring if former is None else former)  # None: by an older operator
        self.before = status.candidate
        self.remove: list[str] = []
        self.notes: list[Note] = []
        self.verdicts: tuple[Verdict, ...] = ()
        self.given_up = False
        self.wakes: list[float] = []

    # Words.

    def set(self, **changes: object) -> None:
        """Change fields of status.rollout."""
        self.roll = self.roll.model_copy(update=changes)

    def enter(self, phase: str) -> None:
        """Begin a phase, or the next step."""
        self.set(
            phase=phase, entered_at=stamp(self.now), waiting_since=None, waiting_pods=None, routed_at=None,
            measured_at=None, answered_at=None, approved=False, approved_weight=None, passes=0, hold="", state="",
        )  # fmt: skip

    def start_over(self, weight: int) -> None:
        """The running step has another weight now: what was earned, or approved, at the old one counts no more."""
        self.set(waiting_since=None, waiting_pods=None, routed_at=None, passes=0, measured_at=None, answered_at=None)
        if self.roll.approved_weight != weight:  # else the approval came with the new weight
            self.set(approved=False, approved_weight=None)

    def hold(self, reason: str, message: str) -> None:
        """Say why it does not go on."""
        self.set(hold=f"{reason}: {message}"[:512], state=self.roll.state or "Holding")

    def note(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Tell users."""
        self.notes.append(Note(reason, message, warning))

    def start(self, target: Revision) -> None:
        """Make `target` the candidate."""
        self.retiring.pop(target.revision, None)
        self.candidate, self.weight = target, 0
        self.set(step=0, passes=0, failures=0, failed_at=None, losses=0, samples=None, verdicts=[], outcome="")
        self.set(ignored={})  # each candidate is told anew
        self.enter(PREPARING)
        self.note("RolloutStarted", f"Revision {target.revision} of {target.model} is prepared.")

    def roll_back(self, why: Problem) -> None:
        """Give the candidate up: weight 0 now, its pods once the routers have obeyed."""
        assert self.candidate is not None
        if self.roll.routed_at is not None:
            self.set(samples=self.samples())
        self.weight, self.given_up = 0, True
        self.set(outcome=f"{why.reason}: {why.message}"[:512])
        self.enter(ROLLING_BACK)
        self.note("RollingBack", f"Revision {self.name}: {why.message}", warning=True)

    def promote(self) -> None:
        """Make the candidate the stable revision."""
        assert self.candidate is not None
        if self.stable is not None:
            self.former.append(self.stable.revision)
        self.stable, self.candidate, self.weight = self.candidate, None, 0

    # Facts.

    @property
    def steps(self) -> list[Step]:
        """The plan, as the spec has it now: editing it restarts nothing."""
        return self.spec.rollout.steps

    @property
    def name(self) -> str:
        """The candidate's revision."""
        return self.candidate.revision if self.candidate else ""

    @property
    def pods(self) -> Pods:
        """The candidate's."""
        return self.seen.pods.get(self.name) or Pods(0, 0, self.seen.refusal)

    def need(self, step: Step | None) -> int:
        """Pods of the candidate that a step needs."""
        return candidate_pods(self.spec.replicas, step.weight if step else 100)

    def samples(self) -> int:
        """Requests that the candidate answered at this weight of this step, the most that was ever told of them.

        A router that takes the place of another counts anew, a silent one tells nothing.
        """
        epoch = self.epoch()
        counted = sum(r.answered.get(self.name, 0) for r in self.seen.routers if r.epoch == epoch)
        return max(counted, self.roll.samples or 0) if self.roll.routed_at else counted

    def told(self) -> int:
        """What is told of them: the last number until they are a tenth more, so that requests alone hardly write."""
        new, old = self.samples(), self.roll.samples
        analysis = self.spec.rollout.analysis
        least = analysis.min_samples if analysis else 0
        if old is None or new >= old * 1.1 or (old < least) != (new < least):
            return new
        return old

    def left(self, since: str | None, seconds: float) -> float:
        """Seconds until `seconds` after that time; 0 or less where it is past."""
        if since is None:
            return 0.0
        return (parse(since) + timedelta(seconds=seconds) - self.now).total_seconds()

    def asleep(self) -> bool:
        """Whether there shall be no pods at all: then nothing moves, and nothing is a failure."""
        if self.spec.replicas > 0:
            return False
        self.weight = 0
        self.set(routed_at=None, waiting_since=None, waiting_pods=None, passes=0)
        self.hold("ScaledToZero", "spec.replicas is 0; the rollout goes on when there are pods.")
        return True

    def reached(self) -> int:
        """Pods of the candidate that are ready, also in the eyes of every router that answers."""
        return min([self.pods.ready, *self._reached_by_each(self.name)])

    def stands_in(self) -> bool:
        """Whether the candidate answers all requests, for the routers reach no pod of the stable revision."""
        if self.stable is None or self.weight == 0 or self.pods.ready == 0:
            return False
        name = self.stable.revision
        views = self._reached_by_each(name)
        return name not in self.seen.pods or self.seen.pods[name].ready == 0 or (views != [] and not any(views))

    def _reached_by_each(self, revision: str) -> list[int]:
        """Pods of a revision that each router which answers reaches."""
        return [router.ready.get(revision, 0) for router in self.seen.routers if router.weights is not None]

    def pods_ready(self, need: int) -> bool:
        """Wait for pods; roll back where the next one takes too long, but not who serves alone: that goes on trying."""
        reached, most = self.reached(), self.roll.waiting_pods
        if reached >= need:
            self.set(waiting_since=None, waiting_pods=None)
            return True
        limit = self.spec.rollout.progress_deadline_seconds
        self.set(state="Scaling")
        if self.roll.waiting_since is None or (most is not None and reached > most):  # not: fell over and is back
            self.set(waiting_since=stamp(self.now), waiting_pods=reached)
        problem = self.pods.problem
        if self.pods.ready >= need:
            self.wakes.append(READY_SECONDS)
            problem = Problem("NotReached", "the pods are ready, but the router does not reach them all yet.")
        said = f"{reached} of {need} pods of revision {self.name} are ready"
        if problem:
            self.hold(problem.reason, f"{said}: {problem.message}")
        stands_in = self.stands_in()
        if stands_in or self._as_short():
            self.set(waiting_since=None, waiting_pods=None)
            self.wakes.append(READY_SECONDS)
            if stands_in and not problem:
                self.hold("StableNotReady", f"{said}; it keeps its share, for no pod of the stable revision is ready.")
            return False
        left = self.left(self.roll.waiting_since, limit)
        if left > 0:
            self.wakes.append(left)
            return False
        reason = problem.reason if problem else "ProgressDeadlineExceeded"
        message = f"Not ready within {limit} s: {said}" + (f": {problem.message}" if problem else ".")
        if self.stable is None:
            self.hold("ProgressDeadlineExceeded", message)
        else:
            self.roll_back(Problem(reason, message))
        return False

    def _as_short(self) -> bool:
        """Whether a running step lacks no more of its pods than the stable revision does: there is no room for either.

        Its share would only be more for those few. Pods that break by themselves would not, so their time passes; so
        does that of pods which say nothing, as one that ends again and again does in between.
        """
        problem = self.pods.problem
        if self.stable is None or self.roll.routed_at is None or problem is None or problem.reason not in NO_ROOM:
            return False
        stable = self.seen.pods.get(self.stable.revision, Pods(0, 0)).ready
        return stable < self.spec.replicas and self.reached() >= max(1, candidate_pods(stable, self.weight))

    # Routers.

    def routed(self) -> bool:
        """Whether every router has these weights, since this epoch; says so where not."""
        if self.seen.routers and all(self._obeys(router) for router in self.seen.routers):
            return True
        self.set(state="Routing")
        self.await_routers()
        return False

    def await_routers(self) -> None:
        """Ask again soon; hold where that will not help by itself, unless something else holds already."""
        late = [router for router in self.seen.routers if not self._obeys(router)]
        cut_off = bool(late) and all(router.weights is None for router in late)
        self.wakes.append(SILENT_SECONDS if cut_off else ROUTER_SECONDS)
        if self.roll.hold:
            return
        silent = sum(router.weights is None for router in self.seen.routers)
        if not self.seen.routers:
            problem = self.seen.router_problem or Problem("RouterNotReady", "No router pod is ready.")
            self.hold(problem.reason, problem.message)
        elif silent:
            refusing = sum(router.refuses for router in self.seen.routers)
            said = f"{silent} of {len(self.seen.routers)} routers do not answer the operator"
            remedy = "it has to reach port 9091 of their pods (NetworkPolicies?)"
            if refusing:
                said = f"{refusing} of {len(self.seen.routers)} routers refuse the operator's token"
                remedy = "they started with another one; delete their pods, and the next ones have it"
            self.hold("RouterUnreachable", f"{said}: {remedy}.")

    def rid_of(self, revision: str) -> bool:
        """Whether every router was seen to send nothing to this revision."""
        views = [router.weights for router in self.seen.routers]
        return bool(views) and all(view is not None and view.get(revision, 0) == 0 for view in views)

    def _obeys(self, router: Router) -> bool:
        """Whether it has these weights and counts for this epoch; a revision that it does not know has weight 0."""
        have, wanted = router.weights, self.weights()
        if have is None or router.epoch != self.epoch():
            return False
        return all(have.get(name, 0) == wanted.get(name, 0) for name in {*have, *wanted})

    def weights(self) -> dict[str, int]:
        """Percent of the requests by revision."""
        active = self.candidate is not None and self.roll.phase in ROLLING_OUT
        leaving = sorted(r for r in self.retiring if r in self.seen.pods and r not in self.remove)
        weights = dict.fromkeys(leaving[:RETIRING_MAX], 0)  # a router sends nothing to those it does not know either
        if self.candidate is not None and (active or self.name in weights):
            weights[self.name] = self.weight if active else 0
        if self.stable is not None:
            weights[self.stable.revision] = 100 - (self.weight if active else 0)
        return {name: weight for name, weight in weights.items() if name not in self.remove}

    def epoch(self) -> str:
        """Name of the stretch over which requests are counted: one weight of one step."""
        if self.candidate is None or self.roll.phase not in ROLLING_OUT:
            return "stable"
        return f"{self.name}/{self.roll.phase}/{self.roll.step}/{self.weight}"

    # The end of a pass.

    def retire(self) -> None:
        """Remove what serves nobody any more: whatever has a Deployment and no role.

        What was stable stays for a while, as the way back. What was given up does not: its GPUs may be those that its
        successor waits for.
        """
        keep = {self.stable.revision} if self.stable else set()
        if self.candidate is not None and self.roll.phase in ROLLING_OUT:
            keep.add(self.name)
        given_up = {one.revision for one in (self.before, self.candidate) if one} - keep
        others = given_up | ({self.stable.revision} if self.stable else set())
        self.former = sorted(r for r in self.former if r in self.seen.pods and r not in others)
        for revision in self.seen.pods:
            if revision not in keep:  # be it a candidate that was given up and whose retry broke off
                self.retiring.setdefault(revision, "")
        for revision, when in list(self.retiring.items()):
            if revision not in self.seen.pods:
                del self.retiring[revision]
            elif not self.rid_of(revision):
                self.retiring[revision] = ""
                self.await_routers()
            else:
                since = self.retiring[revision] = when or stamp(self.now)
                delay = self.spec.rollout.scale_down_delay_seconds if revision in self.former else 0
                left = self.left(since, delay)
                if when and left <= 0:  # a pass that dies between its deletes and its status must not undo them
                    self.remove.append(revision)
                self.wakes.append(left if left > 0 else ROUTER_SECONDS)
        stay = sorted((when, r) for r, when in self.retiring.items() if when and r not in self.remove)
        self.remove += [revision for _, revision in stay[: max(0, len(stay) - RETIRING_MAX)]]
        self.set(
            retiring=dict(sorted(self.retiring.items())[:RETIRING_TOLD]),
            former=self.former[:RETIRING_TOLD],
        )
        if self.roll.phase == DRAINING and not self.retiring:
            self.enter(STABLE)

    def decision(self) -> Decision:
        """The outcome of this pass."""
        leaving = [r for r in self.retiring if r in self.seen.pods and r not in self.remove]
        replicas = {r: self.seen.pods[r].wanted if self.spec.replicas else 0 for r in leaving}
        if self.stable is not None:
            replicas[self.stable.revision] = self.spec.replicas
        if self.candidate is not None and self.roll.phase in ROLLING_OUT:
            replicas[self.name] = self._candidate_pods()
        if any(router.weights is None for router in self.seen.routers):
            self.wakes.append(SILENT_SECONDS)
        elif not all(self._obeys(router) for router in self.seen.routers):
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
            verdicts=self.verdicts,
            given_up=self.given_up,
            requeue=min(self.wakes, default=None),
        )

    def _candidate_pods(self) -> int:
        """Enough for the greatest weight so far; all of them where nobody else serves or before it takes over."""
        if self.stable is None or self.roll.phase == PROMOTING or not self.steps:
            return self.spec.replicas
        last = self.roll.step if self.roll.phase == STEP else 0
        need = max(self.need(step) for step in self.steps[: last + 1])
        if self.name in self.former:  # on its way back: pods that are warm are not let go to be started again
            return max(need, min(self.spec.replicas, self.pods.wanted))
        return need
