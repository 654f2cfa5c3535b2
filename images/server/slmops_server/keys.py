"""API keys from a mounted Secret, re-read while the server runs."""

import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path

from slmops_server.errors import ApiError

log = logging.getLogger(__name__)


class ApiKeys:
    """Every line of every file in the folder is a key. A folder without keys accepts nobody (it fails closed)."""

    def __init__(self, path: Path | None, every: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._every, self._clock = path, every, clock
        self._keys: list[bytes] = []
        self._signature: object = None
        self._next = 0.0

    def check(self, authorization: bytes | None) -> None:
        """Raise ApiError 401 unless keys are off or the header is "Bearer <a key>"."""
        if self._path is None:
            return
        self._refresh(self._path)
        if authorization is None:
            raise self._refusal("You didn't provide an API key. Send it as: Authorization: Bearer YOUR_KEY")
        scheme, _, given = authorization.partition(b" ")
        given = given.strip()
        matches = [hmac.compare_digest(given, key) for key in self._keys]  # all of them: no early exit to time
        if scheme.lower() != b"bearer" or not any(matches):
            raise self._refusal("Incorrect API key provided.")

    @staticmethod
    def _refusal(message: str) -> ApiError:
        return ApiError(401, message, code="invalid_api_key", kind="authentication_error")

    def _refresh(self, path: Path) -> None:
        now = self._clock()
        if now < self._next:
            return
        self._next = now + self._every
        try:  # names that begin with a dot are the mount's own
            files = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else [path]
            signature = [(p.name, s.st_mtime_ns, s.st_size, s.st_ino) for p in files for s in [p.stat()]]
            if signature == self._signature:
                return
            lines = [line.strip() for p in files for line in p.read_bytes().splitlines()]
        except OSError as error:
            log.error("Failed to read the API keys error=%s", error.strerror)  # noqa: TRY400 - an expected one: no trace
            self._keys, self._signature = [], None
            return
        self._keys, self._signature = [line for line in lines if line], signature
        log.info("Read the API keys count=%d", len(self._keys))
