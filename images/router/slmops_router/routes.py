"""The wanted routes, as the operator writes them; checked here, for they end up in a configuration file."""

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

SLOTS = 100  # one for each percent
REVISIONS_MAX = 8
SERVERS_MAX = 2048  # servers of one revision

_REVISION = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_HOST = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\.?")
_EPOCH = re.compile(r"[ -~]{0,200}")


class BadRoutesError(Exception):
    """Routes that cannot be set; the message says why."""


@dataclass(frozen=True)
class Revision:
    """One revision and its share."""

    revision: str
    host: str  # name of its headless Service
    weight: int  # percent of the requests
    servers: int = 8  # room for so many pods


@dataclass(frozen=True)
class Routes:
    """What the router shall do.

    `fallback` takes the requests of a revision without a ready pod. `epoch` names a stretch of time: where it changes,
    the counts of /observed start again.
    """

    port: int = 8000  # of the pods
    fallback: str = ""
    epoch: str = ""
    revisions: tuple[Revision, ...] = field(default=())

    @property
    def structure(self) -> tuple[object, ...]:
        """All that HAProxy can only learn by a reload."""
        return (self.port, *((r.revision, r.host, r.servers) for r in self.revisions))

    def slots(self) -> list[str]:
        """The revision of each of the 100 slots; empty where nobody gets requests.

        The fallback's slots are the last ones: while another revision's weight rises, it keeps the slots it had, so a
        conversation that it answers stays with it.
        """
        ordered = sorted(self.revisions, key=lambda r: r.revision == self.fallback)
        return [r.revision for r in ordered for _ in range(r.weight)]

    def dump(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "revisions": [asdict(r) for r in self.revisions]}


def parse(text: bytes | str) -> Routes:
    """Read routes from JSON. Raises BadRoutesError."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BadRoutesError(f"The routes are not JSON: {error}.") from None
    if not isinstance(data, dict) or not isinstance(data.get("revisions", []), list):
        raise BadRoutesError("The routes must be an object with a list of revisions.")
    revisions = tuple(_revision(item) for item in data.get("revisions", []))
    names = [r.revision for r in revisions]
    if len(names) > REVISIONS_MAX or len(set(names)) != len(names):
        raise BadRoutesError(f"There may be at most {REVISIONS_MAX} revisions, each once; got {names}.")
    if sum(r.weight for r in revisions) not in (0, SLOTS):
        raise BadRoutesError(f"The weights must add up to {SLOTS} (or all be 0); got {[r.weight for r in revisions]}.")
    fallback = data.get("fallback", "")
    if fallback and fallback not in names:
        raise BadRoutesError(f"The fallback {fallback!r} is none of the revisions {names}.")
    epoch = data.get("epoch", "")
    if not isinstance(epoch, str) or not _EPOCH.fullmatch(epoch):
        raise BadRoutesError("epoch must be at most 200 printable characters.")
    return Routes(_number(data, "port", 8000, 1, 65535), fallback, epoch, revisions)


def _revision(item: object) -> Revision:
    if not isinstance(item, dict):
        raise BadRoutesError("Each revision must be an object.")
    name, host = item.get("revision"), item.get("host")
    if not isinstance(name, str) or not _REVISION.fullmatch(name):
        raise BadRoutesError(f"revision must be a DNS label, got {name!r}.")
    if not isinstance(host, str) or not _HOST.fullmatch(host):
        raise BadRoutesError(f"host of revision {name} must be a DNS name, got {host!r}.")
    return Revision(name, host, _number(item, "weight", 0, 0, SLOTS), _number(item, "servers", 8, 1, SERVERS_MAX))


def _number(item: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = item.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise BadRoutesError(f"{name} must be a whole number from {least} to {most}, got {value!r}.")
    return value
