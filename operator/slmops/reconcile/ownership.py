"""Whether a child of the right name is really ours."""

from slmops.api import keys
from slmops.cluster.port import Object
from slmops.reconcile.state import Retry

NOT_OURS = ("ChildTerminating", "Leftover", "NameConflict")  # the reasons why a child's place is taken


def is_ours(owner: Object, current: Object) -> bool:
    """Whether it is a child of this very owner."""
    references = current["metadata"].get("ownerReferences") or []
    return any(ref.get("uid") == owner["metadata"]["uid"] for ref in references)


def check_ours(owner: Object, current: Object) -> None:
    """Refuse to touch an object that merely has the name of our child. Raises Retry with a reason of NOT_OURS."""
    if is_ours(owner, current):
        return
    metadata = current["metadata"]
    references = metadata.get("ownerReferences") or []
    what = f"{current.get('kind', 'Object')} {metadata['name']}"
    former = (owner["kind"], owner["metadata"]["name"])
    if any((ref.get("kind"), ref.get("name")) == former for ref in references):
        raise Retry("ChildTerminating", f"{what} of a deleted object of this name is still being removed.", after=5.0)
    former_uid = _left_by(owner, metadata)
    if former_uid:
        remedy = f"kubectl -n {metadata['namespace']} delete {_KINDS} -l {keys.LABEL_OWNER_UID}={former_uid}"
        raise Retry(
            "Leftover",
            f"{what} was made for an object of this name with another uid, and belongs to none any more (after a "
            f"restore, or a deletion with --cascade=orphan). Remove all that is left of it: {remedy}",
            after=30.0,
        )
    raise Retry(
        "NameConflict",
        f"{what} exists already and does not belong to this object: delete or rename it.",
        after=30.0,
    )


_KINDS = "deploy,rs,job,pod,svc,cm,secret,pdb"  # all that carries the label: our children, and what is made for them


def _left_by(owner: Object, metadata: Object) -> str:
    """The uid of the owner's namesake whose child this was; empty where it was none, or has an owner still.

    It may serve: whether that is to end, a person decides.
    """
    labels = metadata.get("labels") or {}
    wanted = {
        keys.LABEL_MANAGED_BY: keys.MANAGED_BY,
        keys.LABEL_KIND: owner["kind"],
        keys.LABEL_OWNER: keys.label_value(owner["metadata"]["name"]),
    }
    uid = str(labels.get(keys.LABEL_OWNER_UID) or "")
    theirs = wanted.items() <= labels.items() and not metadata.get("ownerReferences")
    return uid if theirs and uid != owner["metadata"]["uid"] else ""
