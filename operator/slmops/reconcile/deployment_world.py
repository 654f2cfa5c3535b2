"""What a pass of a ModelDeployment knows when it decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from slmops.api.deployment import Revision
from slmops.api.meta import Lineage
from slmops.api.run import Input
from slmops.cluster.port import Object
from slmops.remote.router import Report
from slmops.rollout.seen import Problem, Seen
from slmops.settings import Settings


@dataclass(frozen=True)
class Wanted:
    """What the spec asks for, as far as it can be told now."""

    revision: Revision | None = None
    model: Input | None = None
    lineage: Lineage | None = None  # of the model that is asked for
    waiting: Problem | None = None  # SourceNotReady, SecretNotFound, Forbidden: mends itself
    other: bool = False  # what is waited for is sure to be another revision than the candidate


@dataclass(frozen=True)
class Agent:
    """A router pod that is ready, or drains."""

    url: str
    report: Report | None  # None where it does not answer, or refuses our token
    leaving: bool = False  # it drains: told of new weights, for it still answers requests, and asked for nothing
    refuses: bool = False


@dataclass(frozen=True)
class Observed:
    """All that a decision needs."""

    settings: Settings
    wanted: Wanted
    seen: Seen
    agents: tuple[Agent, ...] = ()
    live: Mapping[str, Object] = field(default_factory=dict)  # Deployments by revision
    records: Mapping[str, Object] = field(default_factory=dict)
    strays: frozenset[str] = frozenset()  # revisions on record that have a Service, but no Deployment
    budgets: frozenset[str] = frozenset()  # names of disruption budgets that exist
    mute: bool = False  # a pod does not start and does not say why
