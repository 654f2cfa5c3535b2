"""The cluster behind the port, in a dict: for unit tests of the wiring. The truth is tested on a real API server.

It knows what passes rely on: server-side apply with fields taken away, generation, uid, resourceVersion, status apart
from spec, deletion by owner reference. It validates nothing and runs no controllers.
"""

import copy
from itertools import count
from typing import Any

from slmops.cluster.port import ClusterError, Key, Object, Objects
from slmops.cluster.same import merge_patch


def key_of(obj: Object) -> Key:
    """The key of an object."""
    return Key(obj["kind"], obj["metadata"]["namespace"], obj["metadata"]["name"])


class MemoryCluster:
    """Implements port.Cluster. `writes` lists (verb, key) in order; `refuse` makes the next write of a kind fail."""

    def __init__(self) -> None:
        self.objects: dict[Key, Object] = {}
        self.posted: list[tuple[Key, str, str]] = []
        self.writes: list[tuple[str, Key]] = []
        self.refuse: dict[str, ClusterError] = {}
        self._applied: dict[Key, Object] = {}
        self._events: dict[Key, Objects] = {}
        self._numbers = count(1)

    # What passes call.

    def get(self, key: Key) -> Object | None:
        """See port.Cluster."""
        found = self.objects.get(key)
        return copy.deepcopy(found) if found is not None else None

    def list(self, kind: str, namespace: str, labels: dict[str, str]) -> Objects:
        """See port.Cluster."""
        return [
            copy.deepcopy(obj)
            for key, obj in self.objects.items()
            if (key.kind, key.namespace) == (kind, namespace)
            and labels.items() <= (obj["metadata"].get("labels") or {}).items()
        ]

    def apply(self, obj: Object, *, current: Object | None = None) -> Object:  # noqa: ARG002  # the port names it
        """See port.Cluster; whether anything would change is told from what was applied before, not from `current`."""
        key = key_of(obj)
        if self._applied.get(key) == obj and key in self.objects:
            return copy.deepcopy(self.objects[key])
        self._allow(obj["kind"])
        self.writes.append(("apply", key))
        before = self.objects.get(key) or {}
        merged = _merged(before, self._applied.get(key) or {}, obj)
        self._applied[key] = copy.deepcopy(obj)
        return self.put(merged)

    def delete(self, key: Key, *, uid: str | None = None) -> None:
        """See port.Cluster; what it owns goes with it."""
        found = self.objects.get(key)
        if found is None or (uid and found["metadata"]["uid"] != uid):
            return
        self._allow(key.kind)
        self.writes.append(("delete", key))
        self._collect(key)

    def patch_status(self, obj: Object, status: Object) -> Object:
        """See port.Cluster."""
        key = key_of(obj)
        if not merge_patch(obj.get("status") or {}, status):
            return obj
        self._allow(obj["kind"])
        found = self.objects.get(key)
        if found is None:
            raise ClusterError(404, "NotFound", f"{key.kind} {key.name} not found")
        if found["metadata"]["uid"] != obj["metadata"]["uid"]:
            raise ClusterError(409, "Conflict", "Precondition failed: UID in precondition")
        self.writes.append(("patch_status", key))
        return self.set_status(key, status)

    def events(self, namespace: str, *, kind: str, name: str) -> Objects:
        """See port.Cluster."""
        return copy.deepcopy(self._events.get(Key(kind, namespace, name), []))

    def post_event(self, obj: Object, reason: str, message: str, *, warning: bool = False) -> None:  # noqa: ARG002  # the port names it
        """See port.Cluster."""
        self.posted.append((key_of(obj), reason, message))

    # What a test does in the place of users and of Kubernetes' own controllers.

    def put(self, obj: Object) -> Object:
        """Create or replace, as a user would: the status stays, the generation counts changes of the spec."""
        key = key_of(obj)
        before = self.objects.get(key)
        stored = copy.deepcopy(obj)
        metadata = stored["metadata"]
        number = next(self._numbers)
        old = before["metadata"] if before else {}
        changed = before is None or before.get("spec") != stored.get("spec")
        metadata["uid"] = old.get("uid") or metadata.get("uid") or f"00000000-0000-0000-0000-{number:012d}"
        metadata["generation"] = old.get("generation", 0) + changed
        metadata["resourceVersion"] = str(number)
        metadata.setdefault("creationTimestamp", old.get("creationTimestamp") or "2026-01-01T00:00:00Z")
        if before and "status" in before:
            stored["status"] = before["status"]
        self.objects[key] = stored
        return copy.deepcopy(stored)

    def set_status(self, key: Key, status: Object) -> Object:
        """Replace the status, as a controller would."""
        found = self.objects[key]
        found["status"] = copy.deepcopy(status)
        found["metadata"]["resourceVersion"] = str(next(self._numbers))
        return copy.deepcopy(found)

    def add_event(self, key: Key, event: Object) -> None:
        """An event about an object, as Kubernetes' own controllers post them."""
        self._events.setdefault(key, []).append(event)

    def _collect(self, key: Key) -> None:
        gone = self.objects.pop(key)
        self._applied.pop(key, None)
        uid = gone["metadata"]["uid"]
        for other, obj in list(self.objects.items()):
            if any(ref.get("uid") == uid for ref in obj["metadata"].get("ownerReferences") or []):
                self._collect(other)

    def _allow(self, kind: str) -> None:
        if kind in self.refuse:
            raise self.refuse.pop(kind)


def _merged(current: Any, applied: Any, wanted: Any) -> Any:
    """Server-side apply: what was applied before and is no longer wanted goes, what others set stays."""
    if not isinstance(wanted, dict) or not isinstance(current, dict):
        return copy.deepcopy(wanted)
    kept = {key: value for key, value in current.items() if key not in applied or key in wanted}
    before = applied if isinstance(applied, dict) else {}
    return kept | {key: _merged(current.get(key), before.get(key, {}), value) for key, value in wanted.items()}
