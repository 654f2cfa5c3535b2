"""Reading a worker's /progress. A courtesy: whatever goes wrong, the run itself is not touched."""

from collections.abc import Callable
from time import monotonic

import httpx
from pydantic import ValidationError

from slmops.api.keys import METRICS_PORT
from slmops.api.meta import Progress
from slmops.remote.client import shared
from slmops.remote.exchange import TooMuchError, ask
from slmops.remote.silence import Silence

CONNECT_SECONDS = 1.0
TOTAL_SECONDS = 2.0
BODY_MAX = 16_384  # a pod is not trusted to be brief
SILENT_SECONDS = 60.0  # how long a pod that let us wait is not asked again


class ProgressReader:
    """Reads from any pod; may be used from many threads."""

    def __init__(self, *, port: int = METRICS_PORT, client: httpx.Client | None = None) -> None:
        self._port, self._client = port, client
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
        except (httpx.HTTPError, httpx.InvalidURL, TooMuchError, ValidationError):
            return None

    def _read(self, address: str) -> bytes:
        host = f"[{address}]" if ":" in address else address
        url = f"http://{host}:{self._port}/progress"
        client = self._client or shared()
        said = ask(client, "GET", url, seconds=TOTAL_SECONDS, connect=CONNECT_SECONDS, limit=BODY_MAX)
        return said.body if said.status == httpx.codes.OK else b""
