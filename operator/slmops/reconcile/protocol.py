"""What a kind brings to the driver: how to read its world, and how to decide."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from slmops.cluster.port import Cluster, Key, Object
from slmops.reconcile.state import Observed, Plan
from slmops.settings import Settings


@dataclass(frozen=True)
class World:
    """What observing may ask.

    `now` is the pass's one clock reading (aware, UTC). `circular`: whether an object may name itself by way of others;
    it costs no read, and a pass looks for itself where it says so.
    """

    cluster: Cluster
    settings: Settings
    now: datetime
    circular: Callable[[Key], bool]


class Reconciler(Protocol):
    """One kind.

    `observe` and `decide` may raise Retry, Terminal, ClusterError, RemoteError or pydantic.ValidationError (of the
    object): the driver makes a condition of each. Whatever else they raise is a bug and backs the object off.
    """

    @property
    def kind(self) -> str:
        """For example ModelDeployment."""

    def observe(self, obj: Object, world: World) -> Observed:
        """Read what the decision needs; writes nothing. `obj` is the object as the API server has it now."""

    def decide(self, obj: Object, observed: Observed, now: datetime) -> Plan:
        """Pure."""

    def references(self, obj: Object) -> frozenset[tuple[str, str]]:
        """(kind, name) of our objects in the same namespace whose change shall wake this one."""
