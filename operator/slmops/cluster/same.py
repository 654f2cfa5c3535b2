"""Would writing change anything: pure comparison of objects."""

import hashlib
import json
from typing import Any

from slmops.api.quantities import amount
from slmops.cluster.port import Object

APPLIED = "slmops.dev/applied"  # annotation: hash of what was applied last, so that a field taken away is noticed

_EMPTY: tuple[Any, ...] = (None, "", {}, [])
_QUANTITIES = frozenset({"requests", "limits", "sizeLimit"})
_WHOLE = frozenset({"selector", "nodeSelector"})  # maps that a write replaces: one more label selects other things


def stamped(obj: Object) -> Object:
    """`obj` with the hash of itself as its annotation.

    A resourceVersion is a condition of the write, not a part of what is written: it is another one after each write,
    and what somebody else keeps otherwise would be written without end.
    """
    metadata = obj["metadata"]
    notes = {name: value for name, value in (metadata.get("annotations") or {}).items() if name != APPLIED}
    said = {**metadata, "annotations": notes}
    said.pop("resourceVersion", None)
    text = json.dumps({**obj, "metadata": said}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {**obj, "metadata": {**metadata, "annotations": {**notes, APPLIED: digest}}}


def covers(current: Any, wanted: Any, *, quantity: bool = False) -> bool:
    """Whether `current` says all that `wanted` says; what the API server added or left out as empty does not count."""
    if isinstance(wanted, dict):
        if not isinstance(current, dict):
            return wanted == {} and current in _EMPTY
        if any((current.get(k) or {}) != wanted[k] for k in _WHOLE & wanted.keys()):
            return False
        return all(covers(current.get(k), v, quantity=quantity or k in _QUANTITIES) for k, v in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(current, list):
            return wanted == [] and current in _EMPTY
        return len(current) == len(wanted) and all(
            covers(have, want, quantity=quantity) for have, want in zip(current, wanted, strict=True)
        )
    if quantity and current is not None:
        return amount(current) == amount(wanted)
    return bool(current == wanted) or (current in _EMPTY and wanted in _EMPTY)


def merge_patch(current: Any, wanted: Any) -> Any:
    """The JSON merge patch (RFC 7386) that turns `current` into `wanted`; both are objects."""
    patch: Object = {key: None for key in current if key not in wanted}
    for key, value in wanted.items():
        have = current.get(key)
        if isinstance(value, dict) and isinstance(have, dict):
            inner = merge_patch(have, value)
            if inner:
                patch[key] = inner
        elif key not in current or have != value:
            patch[key] = value
    return patch
