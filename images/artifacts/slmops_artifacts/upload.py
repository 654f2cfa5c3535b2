"""One blob to an OCI registry: in one request when small, in chunks that can be continued when large.

Some registries take no chunks, or smaller ones than ours: they get large blobs in one request, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlencode

import httpx

from .errors import ArtifactError
from .files import Entry, Ticker
from .transfer import Http, Patience, Reply, retry_after, unreachable

CHUNK_SIZE = 64 << 20
_OCTETS = "application/octet-stream"
_NO_CHUNKS = (400, 405, 413, 416)
"""Answers to a first chunk by registries that do not want it."""
_NO_MORE_CHUNKS = (400, 405, 413)
"""And to a later one: 416 then says that it is not the one that comes next."""

Reader = Callable[[int, int], Iterator[bytes]]


def upload(http: Http, base: httpx.URL, entry: Entry, read: Reader, ticker: Ticker) -> None:
    """Upload until the registry has confirmed the digest. `read(start, end)` yields that part of the content."""
    patience, mark = http.patience(), ticker.done
    location: httpx.URL | None = None
    offset = best = 0
    while True:
        hint = 0.0
        try:
            if location is None:
                location, offset = _begin(http, base, patience), 0
            ticker.add(mark + offset - ticker.done)
            end = min(offset + CHUNK_SIZE, entry.size) if http.takes_chunks else entry.size
            last = end == entry.size
            response = _send(http, location, entry, read, (offset, end))
            try:
                code = response.status_code
                if last and code == 201:
                    return
                if not last and code in (201, 202, 204):
                    location, offset = _location(response, location, http.where), end
                    best = max(best, offset)
                    patience.progressed()
                    continue
                if not last and code in (_NO_CHUNKS if offset == 0 else _NO_MORE_CHUNKS):
                    http.takes_chunks, location = False, None
                    continue
                failure, hint = http.failure(response), retry_after(response)
                if code == 416 and offset:
                    failure = ArtifactError(
                        "SourceUnavailable",
                        f"{http.where}: the registry has another part of {entry.path} than it has confirmed "
                        "(HTTP 416). See its log.",
                    )
                if code == 400:
                    failure = ArtifactError(
                        "DigestMismatch",
                        f"{http.where}: the registry did not accept {entry.path} (HTTP 400); it may have changed "
                        "while it was uploaded. Publish it again.",
                    )
                lost = code in (404, 416) or code >= 500
            finally:
                response.close()
        except httpx.HTTPError as error:
            failure, lost = unreachable(error, http.where), True
            # What was sent may have come through: that is asked before the registry counts as one that says nothing.
            failure.silent = failure.silent and location is None
        except ArtifactError as error:
            failure, lost = error, True
        if lost:
            if failure.reason == "SourceNotFound":
                failure = _not_found(http.where, begun=location is not None)
            patience.wait(failure, hint)
            location, offset = _continue(http, location, patience)
            if offset > best:  # a part of the chunk came through
                best = offset
                patience.progressed()
        else:
            patience.wait(failure, hint)


def _begin(http: Http, base: httpx.URL, patience: Patience) -> httpx.URL:
    reply = http.request("POST", f"{base}blobs/uploads/", expect=(202,), body=lambda: b"", patience=patience)
    return _url(base, reply.headers.get("location", ""), http.where)


def _send(http: Http, location: httpx.URL, entry: Entry, read: Reader, span: tuple[int, int]) -> httpx.Response:
    """One piece; the last one closes the upload and names the digest."""
    start, end = span
    last = end == entry.size
    headers = {"Content-Type": _OCTETS, "Content-Length": str(end - start)}
    if not (start == 0 and last):
        headers["Content-Range"] = f"{start}-{end - 1}"
    url = str(location)
    if last:
        url += ("&" if "?" in url else "?") + urlencode({"digest": f"sha256:{entry.sha256}"})
    return http.send("PUT" if last else "PATCH", url, headers, lambda: read(start, end) if end > start else b"")


def _continue(http: Http, location: httpx.URL | None, patience: Patience) -> tuple[httpx.URL | None, int]:
    """Ask how far the registry got; (None, 0) means: from the start. While it is away, nothing is known: ask again."""
    if location is None or not http.takes_chunks:
        return None, 0
    try:
        reply = http.request("GET", str(location), expect=(204,), patience=patience)
    except ArtifactError as error:
        if error.retryable:
            raise
        return None, 0  # it has forgotten the upload
    first, _, final = reply.headers.get("range", "").removeprefix("bytes=").partition("-")
    if first != "0" or not final.isdigit() or int(final) == 0:
        return None, 0
    return _location(reply, location, http.where), int(final) + 1


def _not_found(where: str, *, begun: bool) -> ArtifactError:
    """What a 404 means: to the rest of an upload, and to the wish to begin one."""
    if begun:
        return ArtifactError("SourceUnavailable", f"{where}: the registry forgot an upload. Try again.")
    return ArtifactError(
        "NoRepository",
        f"{where}: the registry has no such repository and makes none by itself (HTTP 404). Create it there first.",
    )


def _location(answer: httpx.Response | Reply, before: httpx.URL, where: str) -> httpx.URL:
    value = answer.headers.get("location", "")
    return _url(before, value, where) if value else before


def _url(before: httpx.URL, location: str, where: str) -> httpx.URL:
    """Where an upload goes on. Never out of TLS: what is uploaded is nobody else's business."""
    try:
        url = before.join(location)
    except httpx.InvalidURL:
        location, url = "", before
    if not location or url.scheme not in ("http", "https"):
        raise ArtifactError("SourceUnavailable", f"{where}: the registry did not say where to upload. See its log.")
    if before.scheme == "https" and url.scheme != "https":
        raise ArtifactError(
            "AccessDenied",
            f"{where} wants the upload sent to plain HTTP; not done. Have the proxy before the registry set "
            "X-Forwarded-Proto, or give the registry its https address (http.host).",
        )
    return url
