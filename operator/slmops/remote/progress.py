"""Reading a worker's /progress. A courtesy: whatever goes wrong, the run itself is not touched."""

from collections.abc import Callable
from time import monotonic

import httpx
from pydantic import ValidationError

from slmops.api.keys import METRICS_PORT
from slmops.api.meta import Progress
from slmops.remote.silence import Silence

TIMEOUT_SECONDS = 1.0  # of connecting, and of each read
TOTAL_SECONDS = 2.0
BODY_MAX = 16_384  # a pod is not trusted to be brief
SILENT_SECONDS = 60.0  # how long a pod that let us wait is not asked again


class ProgressReader:
    """Reads from any pod; may be used from many threads."""

    def __init__(self, *, port: int = METRICS_PORT, transport: httpx.BaseTransport | None = None) -> None:
        self._port = port
        self._client = httpx.Client(trust_env=False, timeout=TIMEOUT_SECONDS, transport=transport)
        self._silence = Silence(SILENT_SECONDS)

    def __call__(self, address: str, *, clock: Callable[[], float] = monotonic) -> Progress | None:
        """Where the run on the pod with this IP address stands; None where that cannot be read soon."""
        now = clock()
        if self._silence.keeps(address, now):
            return None
        try:
            return Progress.model_validate_json(self._read(address))
        except httpx.TimeoutException:
            self._silence.begin(address, now)
            return None
        except (httpx.HTTPError, httpx.InvalidURL, ValidationError):
            return None

    def _read(self, address: str) -> bytes:
        began = monotonic()
        host = f"[{address}]" if ":" in address else address
        with self._client.stream("GET", f"http://{host}:{self._port}/progress") as answer:
            answer.raise_for_status()
            body = b""
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > BODY_MAX:
                    return b""
                if monotonic() - began > TOTAL_SECONDS:
                    raise httpx.ReadTimeout("the whole answer takes too long")
        return body
