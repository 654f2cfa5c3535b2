"""Reading a worker's /progress. A courtesy: whatever goes wrong, the run itself is not touched."""

from time import monotonic

import httpx
from pydantic import ValidationError

from slmops.api.keys import METRICS_PORT
from slmops.api.meta import Progress

TIMEOUT_SECONDS = 1.0  # of connecting, and of each read
TOTAL_SECONDS = 2.0
BODY_MAX = 16_384  # a pod is not trusted to be brief


def read_progress(address: str, *, port: int = METRICS_PORT, client: httpx.Client | None = None) -> Progress | None:
    """Where the run on the pod with this IP address stands; None where that cannot be read soon."""
    host = f"[{address}]" if ":" in address else address
    began = monotonic()
    opened = client or httpx.Client(trust_env=False, timeout=TIMEOUT_SECONDS)
    try:
        with opened.stream("GET", f"http://{host}:{port}/progress") as answer:
            if answer.status_code != httpx.codes.OK:
                return None
            body = b""
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > BODY_MAX or monotonic() - began > TOTAL_SECONDS:
                    return None
        return Progress.model_validate_json(body)
    except (httpx.HTTPError, httpx.InvalidURL, ValidationError):
        return None
    finally:
        if client is None:
            opened.close()
