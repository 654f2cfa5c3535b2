"""How long a client is willing to wait for its whole answer, from the headers that say so."""

import math

from slmops_server import asgi
from slmops_server.errors import bad_request

SECONDS = b"x-request-timeout"  # what clients set themselves
ENVOY = b"x-envoy-expected-rq-timeout-ms"  # what Envoy and the gateways made of it add; it cuts the answer off then


def seconds(scope: asgi.Scope) -> float:
    """From the request's arrival; inf where none is given, the sooner of two. ApiError 400 for what is no time."""
    return min(_read(scope, SECONDS, 1.0), _read(scope, ENVOY, 1000.0))


def _read(scope: asgi.Scope, name: bytes, per_second: float) -> float:
    given = asgi.header(scope, name)
    if given is None:
        return math.inf
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        unit = "seconds" if per_second == 1 else "milliseconds"
        raise bad_request(f"The header {name.decode()} is not a number of {unit} above 0.", code="invalid_header")
    return value / per_second
