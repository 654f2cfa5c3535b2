"""The HTTP client for workers, Prometheus and routers: one for all passes, for making one costs more than asking."""

import ssl
from functools import lru_cache

import httpx


def shared(ca: str = "") -> httpx.Client:
    """Usable from many threads. No connection is kept: pods come and go, and so do the addresses they had.

    `ca`: certificates (PEM, ASCII) to trust, and no others. Raises ssl.SSLError where they are none.
    """
    return _client(ca)


@lru_cache(maxsize=4)
def _client(ca: str) -> httpx.Client:
    verify: ssl.SSLContext | bool = True
    if ca:
        verify = ssl.create_default_context(cadata=ca)
        verify.verify_flags &= ~ssl.VERIFY_X509_STRICT  # a CA of one's own often lacks what Python 3.13 asks for
    return httpx.Client(trust_env=False, verify=verify, limits=httpx.Limits(max_keepalive_connections=0))
