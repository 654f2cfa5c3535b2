"""What the watches have told: whose child is whose, who names whom, which phase everything is in.

An optimisation only: it decides who is woken when and which look is worth its reads, never what is done. It is rebuilt
from the watches at start, and what it misses the resync finds.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slmops.api.keys import GROUP, LABEL_OWNER_UID
from slmops.cluster.kinds import OURS
from slmops.cluster.port import Key, Object
from slmops.reconcile.conditions import AVAILABLE, READY, STALLED
from slmops.reconcile.sources import references

_NEWS = (READY, STALLED, AVAILABLE)


@dataclass(frozen=True)
class Note:
    """As much of a watch event as is kept."""

    key: Key
    uid: str
    deleted: bool = False
    owner_uid: str = ""  # for children
    owner: Key | None = None
    names: frozenset[Key] = frozenset()  # for our objects: those of ours that it names
    news: tuple[str, ...] = ()  # for our objects: what others that name it act upon
    phase: str = ""
    unanswered: bool = False  # for ModelDeployments: it has a stable revision, but is not Available
    asked: tuple[str, ...] = ()  # for our objects: what users can change


def note_of(event: Mapping[str, Any]) -> Note:
    """Condense a watch event (`type` and `object`)."""
    obj: Object = event["object"]
    metadata = obj["metadata"]
    namespace = metadata.get("namespace", "")
    key = Key(obj.get("kind", ""), namespace, metadata["name"])
    deleted = event.get("type") == "DELETED"
    if key.kind in OURS:
        status = obj.get("status") or {}
        return Note(
            key,
            metadata["uid"],
            deleted,
            names=frozenset(Key(kind, namespace, name) for kind, name in references(obj)),
            news=_news(status),
            phase=str(status.get("phase") or "Unknown"),
            unanswered=_unanswered(obj.get("spec") or {}, status),
            asked=_asked(metadata),
        )
    owner = next(
        (
            Key(ref["kind"], namespace, ref["name"])
            for ref in metadata.get("ownerReferences") or []
            if str(ref.get("apiVersion", "")).startswith(f"{GROUP}/") and ref["kind"] in OURS
        ),
        None,
    )
    labels = metadata.get("labels") or {}
    return Note(key, metadata["uid"], deleted, owner_uid=labels.get(LABEL_OWNER_UID, ""), owner=owner)


class Known:
    """Fed with every note; says whom each one concerns."""

    def __init__(self) -> None:
        self._notes: dict[Key, Note] = {}
        self._by_uid: dict[str, Key] = {}
        self._named_by: dict[Key, set[Key]] = {}

    def concerned(self, note: Note) -> set[Key]:
        """Take a note; returns the objects of ours that are to be looked at.

        Its own status wakes no object: each pass says when it wants the next one. Else a status that tells of the
        world (how many requests were answered) would be written as fast as passes can follow each other.
        """
        if note.key.kind not in OURS:
            found = self._by_uid.get(note.owner_uid) or note.owner
            return {found} if found else set()
        before = self._notes.get(note.key)
        self._keep(note, before)
        if before is None or before.uid != note.uid or note.deleted:
            return {note.key, *self._named_by.get(note.key, ())}
        woken: set[Key] = set()
        if before.asked != note.asked:
            woken.add(note.key)
        if before.news != note.news or before.names != note.names:
            woken |= self._named_by.get(note.key, set())
        return woken

    def gone(self, key: Key) -> set[Key]:
        """Forget an object that a pass did not find: its end fell into a gap of the watches. Returns who named it."""
        before = self._notes.get(key)
        if before is None:
            return set()
        self._keep(replace(before, deleted=True), before)
        return set(self._named_by.get(key, ()))

    def circular(self, key: Key) -> bool:
        """Whether the object names itself, be it by way of others. May be asked from any thread.

        Whose note closes a circle is woken after that note was kept, so its pass gets a right answer.
        """
        ahead, seen = [key], set[Key]()
        while ahead:
            note = self._notes.get(ahead.pop())
            new = (note.names if note else frozenset[Key]()) - seen
            if key in new:
                return True
            seen |= new
            ahead += new
        return False

    def phases(self) -> Counter[tuple[str, str]]:
        """How many objects there are by kind and phase."""
        return Counter((note.key.kind, note.phase) for note in self._notes.values())

    def unanswered(self) -> int:
        """How many ModelDeployments there are that have a stable revision, but are not Available."""
        return sum(note.unanswered for note in self._notes.values())

    def _keep(self, note: Note, before: Note | None) -> None:
        if before is not None:
            self._by_uid.pop(before.uid, None)
            for named in before.names:
                namers = self._named_by.get(named, set())
                namers.discard(note.key)
                if not namers:
                    self._named_by.pop(named, None)  # or names would pile up for as long as the operator runs
        if note.deleted:
            self._notes.pop(note.key, None)
            return
        self._notes[note.key] = note
        self._by_uid[note.uid] = note.key
        for named in note.names:
            self._named_by.setdefault(named, set()).add(note.key)


def _asked(metadata: Object) -> tuple[str, ...]:
    """What only others than this operator change: the rest of an object is its own status, written by itself.

    Of the annotations our verbs alone: kubectl's copy of what was applied may be as large as the object.
    """
    annotations = metadata.get("annotations") or {}
    return (
        str(metadata.get("generation")),
        str(metadata.get("deletionTimestamp")),
        *(f"{name}={value}" for name, value in sorted(annotations.items()) if name.startswith(f"{GROUP}/")),
    )


def _unanswered(spec: Object, status: Object) -> bool:
    """Not of a first revision, which never answered: until it does its phase says how it gets on."""
    said: Iterable[Object] = status.get("conditions") or []
    silent = any(c.get("type") == AVAILABLE and c.get("status") != "True" for c in said)
    return silent and bool(status.get("stable")) and spec.get("replicas") != 0


def _news(status: Object) -> tuple[str, ...]:
    """What those that name an object wait for: readiness and its reason, that it answers, the artifact, failure."""
    said: Iterable[Object] = status.get("conditions") or []
    words = [f"{c.get('type')}={c.get('status')}:{c.get('reason')}" for c in said if c.get("type") in _NEWS]
    return (*words, str((status.get("artifact") or {}).get("digest") or ""))
