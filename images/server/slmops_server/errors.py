"""Errors a client sees, in OpenAI's shape. Nothing else ever reaches a client."""

import orjson


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
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind
        self.retry_after = retry_after

    def body(self) -> bytes:
        """The JSON: {"error": {"message", "type", "param", "code"}}."""
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers beside content type and length."""
        return [] if self.retry_after is None else [(b"retry-after", str(self.retry_after).encode())]


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after: int = 1) -> ApiError:
    """503: the request is fine and may be sent again."""
    return ApiError(503, message, code=code, kind="server_error", retry_after=retry_after)


def internal() -> ApiError:
    """500 without a word about the inside."""
    return ApiError(500, "The server failed on this request.", code="internal_error", kind="server_error")
