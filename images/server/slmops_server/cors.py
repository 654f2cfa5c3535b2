"""Pages of other origins: which of them a browser may let talk to the API, and read its answers."""

from collections.abc import Collection

from slmops_server import asgi

ANY = "*"
SHOWN = b"x-request-id, retry-after, x-should-retry"  # what clients in a page look at
KEPT = b"7200"  # seconds for which a browser need not ask again


def allowance(scope: asgi.Scope, origins: Collection[str]) -> asgi.Headers:
    """Headers of an answer: none where no origin is allowed; without leave where the request's is not."""
    if not origins:
        return []
    shown = (b"access-control-expose-headers", SHOWN)
    if ANY in origins:
        return [(b"access-control-allow-origin", b"*"), shown]
    vary = (b"vary", b"origin")
    origin = asgi.header(scope, b"origin") or b""
    if origin.decode("latin-1") not in origins:
        return [vary]
    return [(b"access-control-allow-origin", origin), shown, vary]


def is_question(scope: asgi.Scope) -> bool:
    """Whether a browser asks before it sends what its page wants: such a request never has a key."""
    return scope["method"] == "OPTIONS" and asgi.header(scope, b"access-control-request-method") is not None


async def answer(scope: asgi.Scope, _receive: asgi.Receive, send: asgi.Send) -> None:
    """Any header may be sent, as by clients that are no browsers. The leave itself is `allowance`'s."""
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-max-age", KEPT),
        (b"access-control-allow-headers", asgi.header(scope, b"access-control-request-headers") or b"authorization"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
