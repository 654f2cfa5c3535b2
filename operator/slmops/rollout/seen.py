"""What the state machine sees, and what it decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from slmops.api.deployment import Revision, RolloutStatus, Verdict

# What scheduler, quota and nodes do to pods that are as good as any.
NO_ROOM = ("Unschedulable", "SchedulingGated", "QuotaExceeded", "Evicted", "NodeRefused", "NodeFailed")


@dataclass(frozen=True)
class Problem:
    """Why something is not as it should be: a word for machines, a sentence for people."""

    reason: str
    message: str


@dataclass(frozen=True)
class Pods:
    """The Deployment of one revision."""

    wanted: int  # its spec.replicas
    ready: int
    problem: Problem | None = None  # what its pods say of themselves, or how the last one ended
    failing: bool = False  # the pods that are there have a problem: they do not just need time
    fell: bool = False  # one that had started is not ready by its own doing: no node or drain took it
    imageless: bool = False  # none of them can come to serve for want of its image


@dataclass(frozen=True)
class Router:
    """One ready router pod, as its agent tells; `weights` is None where the agent does not answer, or `refuses` to."""

    weights: Mapping[str, int] | None = None
    epoch: str = ""
    ready: Mapping[str, int] = field(default_factory=dict)  # servers that it finds healthy, by revision
    answered: Mapping[str, int] = field(default_factory=dict)  # requests since the epoch began
    chosen: Mapping[str, int] = field(default_factory=dict)  # of `turns`, those whose turn was this revision's
    turns: int = 0  # requests without a conversation since the epoch began, while every share had pods
    refuses: bool = False  # the operator's token is not the one that it started with


@dataclass(frozen=True)
class Seen:
    """The world at the moment of a decision."""

    target: Revision | None = None  # what the spec asks for; None where its source is not ready
    pods: Mapping[str, Pods] = field(default_factory=dict)  # revisions that have a Deployment
    routers: tuple[Router, ...] = ()
    router_problem: Problem | None = None  # why there is no router
    refusal: Problem | None = None  # why the candidate has no Deployment
    verdicts: tuple[Verdict, ...] = ()  # measured in this pass; empty where nothing was due
    annotations: Mapping[str, str] = field(default_factory=dict)
    other: Problem | None = None  # why there is no target, where that is sure to be another revision than the candidate


@dataclass(frozen=True)
class Note:
    """Something users should hear of."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True)
class Decision:
    """The wanted state. `replicas` has every revision that shall have a Deployment, `remove` those that shall go."""

    stable: Revision | None
    candidate: Revision | None
    weight: int  # percent that goes to the candidate
    rollout: RolloutStatus
    replicas: dict[str, int]
    weights: dict[str, int]  # of the routers; adds up to 100, or to 0 before anything is ready
    epoch: str
    remove: tuple[str, ...]
    notes: tuple[Note, ...]
    verdicts: tuple[Verdict, ...]  # those of Seen, where this pass took them into account
    given_up: bool  # in this pass the candidate was: the status has to say so before a router hears of it
    requeue: float | None  # seconds
