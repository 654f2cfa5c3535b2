"""The HTTP client for Prometheus and the routers' agents: one for all passes, for making one costs more than asking."""

from functools import cache

import httpx


@cache
def shared() -> httpx.Client:
    """Usable from many threads. No connection is kept: pods come and go, and so do the addresses they had."""
    return httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
