"""What a decision is made of."""

from dataclasses import dataclass, field
from typing import Any, Literal

from slmops.cluster.port import Key, Object


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event about the object, for users; posted only after the status was written."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True)
class Routes:
    """What a ModelDeployment's router shall do: percent of the requests by revision, summing to 100."""

    url: str  # base URL of the router's agent
    weights: dict[str, int]
    token: str = field(default="", repr=False)  # of that agent
    body: Object = field(default_factory=dict)  # all that the agent is told: the weights, and more
    leaving: bool = False  # the router drains and may be gone by now: no harm if it does not take them


@dataclass(frozen=True)
class Count:
    """One more in a counter of the operator's own metrics; told only after the status was written."""

    counter: Literal["rollouts", "verdicts"]
    labels: tuple[str, ...]  # values, in the counter's order


@dataclass(frozen=True)
class Plan:
    """One pass's decision, carried out in this order: apply, routes, delete, status, events; then wait.

    `status` is the whole wanted status; it is written only where it differs. `requeue` is in seconds: None waits for
    an event. `keep_going`: what is refused does not stop the rest, for what serves or runs is to be looked after.
    `status_first`, with `keep_going` alone: the status is written before all else, at the end only where that failed.
    """

    status: Object
    apply: tuple[Object, ...] = ()
    routes: tuple[Routes, ...] = ()
    delete: tuple[Key, ...] = ()
    events: tuple[Event, ...] = ()
    counts: tuple[Count, ...] = ()
    requeue: float | None = None
    keep_going: bool = False
    status_first: bool = False


class Retry(Exception):  # noqa: N818  # an outcome, not an error
    """The pass could not be finished for now: come again `after` seconds later, saying `message` in Reconciling."""

    def __init__(self, reason: str, message: str, after: float = 10.0) -> None:
        super().__init__(message)
        self.reason, self.message, self.after = reason, message, after


class Terminal(Exception):  # noqa: N818  # an outcome, not an error
    """The object cannot succeed as it is written: Stalled=True until its spec changes."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


Observed = Any  # each kind has its own frozen dataclass
