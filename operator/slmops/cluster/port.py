"""What the rest of the operator may ask of a cluster. Objects are plain dicts, as the API server sends them."""

import re
from dataclasses import dataclass
from typing import Any, Protocol

Object = dict[str, Any]
Objects = list[Object]  # within Cluster, `list` is a method

_DENIED = re.compile(r'admission webhook "[^"]*" denied the request|ValidatingAdmissionPolicy .* denied request')


@dataclass(frozen=True)
class Key:
    """Identity of a namespaced object. `kind` is Kubernetes' or one of ours; the implementation knows its group."""

    kind: str
    namespace: str
    name: str


class ClusterError(Exception):
    """An answer of the API server that is no result. `retryable`: asking again may help; `reason` is its word."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message

    @property
    def denied(self) -> bool:
        """Whether an admission webhook or policy refuses it, with whatever status: of one that gives none, 400."""
        return _DENIED.search(self.message) is not None

    @property
    def retryable(self) -> bool:
        """False only for requests that the server will refuse again as they are (invalid object: 400, 422)."""
        return self.denied or self.status not in (400, 422)


class Cluster(Protocol):
    """Seven calls. None of them lists Secrets or ConfigMaps."""

    def get(self, key: Key) -> Object | None:
        """The object, or None where there is none. Raises ClusterError."""

    def list(self, kind: str, namespace: str, labels: dict[str, str]) -> Objects:
        """Objects of `kind` in `namespace` that carry all `labels`. Raises ClusterError."""

    def apply(self, obj: Object, *, current: Object | None = None) -> Object:
        """Server-side apply as `slmops`, unless `current` shows that nothing would change. Raises ClusterError."""

    def delete(self, key: Key, *, uid: str | None = None) -> None:
        """Delete in the background, only while the uid is that one; an absent object is fine. Raises ClusterError."""

    def patch_status(self, obj: Object, status: Object) -> Object:
        """Make `status` the whole status of one of our objects, as last read in `obj`; no write where it is so already.

        Returns the object after it. Raises ClusterError (404: it is gone; 409: another object has its name now).
        """

    def events(self, namespace: str, *, kind: str, name: str) -> Objects:
        """Events about one object, oldest first. Raises ClusterError."""

    def post_event(self, obj: Object, reason: str, message: str, *, warning: bool = False) -> None:
        """A Kubernetes Event about one of our objects; the same one again counts up. Raises ClusterError."""
