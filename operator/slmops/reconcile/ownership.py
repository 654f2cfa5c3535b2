"""Whether a child of the right name is really ours."""

from slmops.cluster.port import Object
from slmops.reconcile.state import Retry


def is_ours(owner: Object, current: Object) -> bool:
    """Whether it is a child of this very owner."""
    references = current["metadata"].get("ownerReferences") or []
    return any(ref.get("uid") == owner["metadata"]["uid"] for ref in references)


def check_ours(owner: Object, current: Object) -> None:
    """Refuse to touch an object that merely has the name of our child. Raises Retry(NameConflict, ChildTerminating)."""
    if is_ours(owner, current):
        return
    metadata = current["metadata"]
    references = metadata.get("ownerReferences") or []
    what = f"{current.get('kind', 'Object')} {metadata['name']}"
    former = (owner["kind"], owner["metadata"]["name"])
    if any((ref.get("kind"), ref.get("name")) == former for ref in references):
        raise Retry("ChildTerminating", f"{what} of a deleted object of this name is still being removed.", after=5.0)
    raise Retry(
        "NameConflict",
        f"{what} exists already and does not belong to this object: delete or rename it.",
        after=30.0,
    )
