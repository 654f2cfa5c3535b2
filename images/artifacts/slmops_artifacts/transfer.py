"""HTTP with patience: bounded retries, credentials that stay at home, and messages without secrets."""

from __future__ import annotations

import logging
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Protocol

import httpx

from .errors import ArtifactError, Reason, disk_full
from .waiting import hold

_SLOW = httpx.Timeout(300.0, connect=10.0)
"""A registry reads a large blob once more before it confirms it."""
_CHUNK = httpx.Timeout(30.0, connect=10.0, write=120.0)
"""A slow disk takes its time for a chunk; a run that is told to end has no more for it."""
SILENCE = 60.0
"""Seconds after which a server that took the connection and says nothing is given up, whatever the patience."""
_LEAST_READ = 5.0
"""Seconds that an answer may always take."""
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class Auth(Protocol):
    """Who we are, for one server."""

    def headers(self, url: httpx.URL) -> dict[str, str]:
        """Credentials for `url`: empty for any host but the server's own."""

    def challenge(self, response: httpx.Response) -> bool:
        """Answer a 401; True when asking again may help."""


class Reply(NamedTuple):
    """A small answer, read to its end."""

    status: int
    headers: httpx.Headers
    body: bytes


class Patience:
    """Retries until a store has failed for `window` seconds and nothing moved between.

    They count from the first failure, for what went before it may have been a long way through a slow link; those of a
    server that says nothing from the last thing that moved, for it says nothing before it fails, too.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self.progressed()

    def progressed(self) -> None:
        """Something worked: forget the failures before."""
        self._moved = time.monotonic()
        self._failing: float | None = None
        self._pause = 0.25

    def wait(self, failure: ArtifactError, hint: float = 0.0) -> None:
        """Sleep before the next attempt, or raise `failure` when the time is over or trying is useless."""
        pause = max(min(hint, 60.0), self._pause * random.uniform(0.7, 1.3))  # noqa: S311 - jitter, not a secret
        now = time.monotonic()
        self._failing = now if self._failing is None else self._failing
        since, window = (self._moved, min(self._window, SILENCE)) if failure.silent else (self._failing, self._window)
        if not failure.retryable or now - since + pause > window:
            raise failure
        hold(failure, pause)
        self._pause = min(self._pause * 2, 15.0)


class Http:
    """A client for one server, named `where` in messages. `trust` is as in httpx: True is for the usual authorities."""

    def __init__(
        self, where: str, auth: Auth, patience: float | None = None, trust: ssl.SSLContext | bool = True
    ) -> None:
        logger = logging.getLogger("httpx")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)  # httpx logs whole URLs, and signed ones are secrets
        self.where = where
        self.auth = auth
        self.takes_chunks = True
        """Whether the server takes a part of an upload; upload() finds out."""
        self._window = _default_patience() if patience is None else patience
        # Half the silence, so that one lost answer is asked for again before the source is given up.
        read = max(_LEAST_READ, min(self._window, SILENCE) / 2)
        self._timeout = httpx.Timeout(read, connect=10.0, write=120.0)
        self.client = httpx.Client(
            timeout=self._timeout, headers={"User-Agent": "slmops"}, follow_redirects=False, verify=trust
        )

    def patience(self) -> Patience:
        """Fresh patience, as much as this client was given."""
        return Patience(self._window)

    def request(
        self,
        method: str,
        url: str,
        *,
        expect: tuple[int, ...] = (200,),
        body: Callable[[], Any] | None = None,
        headers: Mapping[str, str] | None = None,
        limit: int = 4 << 20,
        patience: Patience | None = None,
    ) -> Reply:
        """Ask until one of the `expect`ed answers comes. `body()` gives the content anew for every attempt."""
        patience = patience or self.patience()
        while True:
            hint = 0.0
            try:
                response = self.send(method, url, headers or {}, body)
                try:
                    if response.status_code in expect:
                        return Reply(response.status_code, response.headers, _read(response, limit, self.where))
                    failure, hint = self.failure(response), retry_after(response)
                finally:
                    response.close()
            except httpx.HTTPError as error:
                failure = unreachable(error, self.where)
            except ArtifactError as error:
                failure = error
            patience.wait(failure, hint)

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: Callable[[], Any] | None = None
    ) -> httpx.Response:
        """One exchange: sign, follow redirects of reads (never with our credentials abroad), answer one 401."""
        target, challenged, hops = httpx.URL(url), False, 0
        while True:
            signed = {**headers, **self.auth.headers(target)}
            content = body() if body is not None else None
            wait = {"PUT": _SLOW, "PATCH": _CHUNK}.get(method, self._timeout)
            request = self.client.build_request(method, target, headers=signed, content=content, timeout=wait)
            response = self.client.send(request, stream=True)
            if response.status_code == 401 and not challenged and self.auth.challenge(response):
                challenged = True
            elif response.is_redirect and method in ("GET", "HEAD") and hops < 5:
                hops += 1
                target = self._redirect(target, response)
            else:
                return response
            response.close()

    def failure(self, response: httpx.Response) -> ArtifactError:
        """Name what a bad answer means."""
        code, writing = response.status_code, response.request.method not in ("GET", "HEAD")
        try:
            text = response.read()[:65536].decode("utf-8", "replace").lower()
        except httpx.HTTPError:
            text = ""
        if "no space left" in text or code == 507:
            return disk_full(f"{self.where} has no space left on its own volume")
        if response.headers.get("x-error-code") == "GatedRepo":
            return gated(self.where)
        if code in (401, 403):
            return ArtifactError(
                "AccessDenied",
                f"{self.where} refused access (HTTP {code}). Check that the Secret holds credentials for this host "
                "with the rights that are needed.",
            )
        if code in (404, 410):
            return ArtifactError("SourceNotFound", f"{self.where} does not exist (HTTP {code}). Check the URI.")
        if code == 405:
            return ArtifactError("AccessDenied", f"{self.where} does not allow this (HTTP 405): it is read-only.")
        if code == 413:
            return ArtifactError(
                "Refused", f"{self.where} refused an upload as too large (HTTP 413). Raise its body limit."
            )
        if code in _BUSY or code >= 500:
            return ArtifactError(
                "SourceUnavailable",
                f"{self.where} does not work now (HTTP {code}). Check the server and its log.",
            )
        reason: Reason = "Refused" if writing else "UnsupportedFormat"
        return ArtifactError(reason, f"{self.where} refused the request (HTTP {code}). See its log.")

    def _redirect(self, url: httpx.URL, response: httpx.Response) -> httpx.URL:
        """Where a redirect leads. Never out of TLS: a manifest found by its tag has no digest to be checked with."""
        try:
            target = url.join(response.headers.get("location", ""))
        except httpx.InvalidURL as error:
            raise httpx.RemoteProtocolError("a redirect to nowhere") from error
        if url.scheme == "https" and target.scheme != "https":
            raise ArtifactError(
                "AccessDenied", f"{self.where} redirects to plain HTTP. Mend its redirect; not followed."
            )
        return target


def gated(where: str) -> ArtifactError:
    """A repository of the Hub that its owner opens by hand."""
    return ArtifactError(
        "AccessDenied",
        f"{where} is gated. Ask for access on the Hub, and put the HF_TOKEN of the account that has it in the Secret.",
    )


def _default_patience() -> float:
    value = os.environ.get("SLMOPS_RETRY_SECONDS", "")
    return float(value) if value.replace(".", "", 1).isdecimal() else 300.0


def unreachable(error: httpx.HTTPError, where: str) -> ArtifactError:
    """Name what went wrong below HTTP, without the URL."""
    text = str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if "CERTIFICATE_VERIFY_FAILED" in text or isinstance(cause, ssl.SSLCertVerificationError):
        why = text.partition("verify failed: ")[2].partition(" (_ssl")[0]
        return ArtifactError(
            "AccessDenied",
            f"{where} has a certificate that is not trusted here{f' ({why})' if why else ''}. If its CA is your own, "
            "put that CA's certificate as ca.crt into the Secret with the credentials: that of secretRef, or for the "
            "store that of the chart's store.secretName.",
        )
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return ArtifactError(
            "AccessDenied",
            f"{where} does not speak TLS. If it shall be plain HTTP, name it in the chart's store.plainHttp (outside "
            "the cluster in SLMOPS_PLAIN_HTTP).",
        )
    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
        return ArtifactError(
            "SourceUnavailable",
            f"{where} took the connection and then said nothing. Check the server and its log, and proxies before it.",
            silent=True,
        )
    if isinstance(error, httpx.TimeoutException):
        text = "no answer in time"
    return ArtifactError(
        "SourceUnavailable",
        f"{where} cannot be reached ({text[:160]}). Check the host, DNS and network policies.",
    )


def retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks us to wait, which it may give as a number or as a date."""
    value: str = response.headers.get("retry-after", "")
    if value.isdigit() and len(value) < 6:
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _read(response: httpx.Response, limit: int, where: str) -> bytes:
    """Read a small answer into memory, and refuse a large one."""
    body = bytearray()
    for block in response.iter_bytes():
        body += block
        if len(body) > limit:
            raise ArtifactError("UnsupportedFormat", f"{where} sent a document of more than {limit >> 20} MiB.")
    return bytes(body)
