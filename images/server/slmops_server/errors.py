"""Errors a client sees, in OpenAI's shape. Nothing else ever reaches a client."""

import math

import orjson

UNREACHABLE = "deadline_unreachable"  # the code of a 503: the client's own time is too short
MAX_RETRY_AFTER = 60  # seconds


class ApiError(Exception):
    """One refusal. `code` is what programs match, `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
        reason: str | None = None,
    ) -> None:
        """`reason`: the code for metrics where one code has several."""
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind
        self.retry_after, self.reason = retry_after, reason or code

    def body(self) -> bytes:
        """The JSON: {"error": {"message", "type", "param", "code"}}."""
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers beside content type and length."""
        if self.status == 504:  # to OpenAI's clients: nobody waits for it any more
            return [(b"x-should-retry", b"false")]
        told = [] if self.retry_after is None else [(b"retry-after", str(self.retry_after).encode())]
        if self.code == UNREACHABLE:  # to the router: no failure of this server's
            told.append((b"x-slmops-deadline", b"unreachable"))
        return told


def come_again(seconds: float) -> int:
    """What Retry-After says to a client that is to wait for so long."""
    return max(1, min(math.ceil(seconds), MAX_RETRY_AFTER))


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after: int = 1) -> ApiError:
    """503: the request is fine and may be sent again."""
    return ApiError(503, message, code=code, kind="server_error", retry_after=retry_after)


def overloaded(message: str, reason: str, retry_after: int) -> ApiError:
    """503, after which the router tries another pod: too much waits already; `reason` for the metrics."""
    return ApiError(503, message, code="overloaded", kind="server_error", retry_after=retry_after, reason=reason)


def too_many_connections() -> ApiError:
    """503: the connection is one too many."""
    return unavailable("Too many clients are connected.", "too_many_connections")


def too_late(message: str) -> ApiError:
    """504: the time that the client gave has passed."""
    return ApiError(504, message, code="deadline_exceeded", kind="timeout_error")


def format_failed(reason: str) -> ApiError:
    """500: the prescribed format turned out to be too much for the engine, in mid-answer."""
    return ApiError(500, f"The prescribed format failed: {reason}", code="format_failed", kind="server_error")


def internal() -> ApiError:
    """500 without a word about the inside."""
    return ApiError(500, "The server failed on this request.", code="internal_error", kind="server_error")
