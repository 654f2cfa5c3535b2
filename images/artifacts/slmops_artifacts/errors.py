"""Named failures: a reason that machines match on, and a sentence that tells a person how to mend it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Literal

Reason = Literal[
    "SourceUnavailable",
    "SourceNotFound",
    "AccessDenied",
    "DiskFull",
    "DigestMismatch",
    "UnsupportedFormat",
    "Refused",
    "NoRepository",
    "BadUri",
]


class ArtifactError(Exception):
    """An artifact could not be moved. `message` says what failed, where, and what to do about it."""

    def __init__(self, reason: Reason, message: str, *, silent: bool = False) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message
        self.silent = silent
        """The other side took the connection and then said nothing."""

    def __reduce__(self) -> tuple[type[ArtifactError], tuple[Reason, str]]:
        """Survive pickling, so that the error may cross a process pool."""
        return type(self), (self.reason, self.message)

    def from_secret(self, name: str | None) -> ArtifactError:
        """Return the error with the Secret `name` in its message, where that Secret may be the cause."""
        if not name or self.reason not in ("AccessDenied", "SourceNotFound"):
            return self
        return ArtifactError(self.reason, f"{self.message} The Secret is {name}.", silent=self.silent)

    @property
    def retryable(self) -> bool:
        """True when the same call can succeed later although nobody changed anything."""
        return self.reason == "SourceUnavailable"


def from_os(error: OSError, doing: str, path: Path | str) -> ArtifactError:
    """Translate an operating system error met while `doing` something at `path`."""
    what = f"{doing} {path} failed: {error.strerror or error}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return disk_full(f"{doing} {path}: no space left on the volume")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return ArtifactError("AccessDenied", f"{what}. Check the volume's access mode and fsGroup.")
        case errno.ENOENT | errno.ENOTDIR:
            return ArtifactError("SourceNotFound", f"{what}. Check the path and that the volume is mounted.")
        case errno.ENAMETOOLONG | errno.EILSEQ | errno.EINVAL:
            return ArtifactError("UnsupportedFormat", f"{what}. Rename the file and publish it again.")
        case _:
            return ArtifactError("SourceUnavailable", f"{what}. The volume may be unwell; trying again may help.")


def disk_full(what: str) -> ArtifactError:
    """Say in the one way that a volume is too small."""
    return ArtifactError("DiskFull", f"{what}. Give the volume more room, or use a smaller model.")
