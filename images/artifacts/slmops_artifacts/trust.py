"""Whose certificates are trusted: those of the usual authorities, and of the ones that a Secret names in `ca.crt`."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from .errors import ArtifactError

CA_KEY = "ca.crt"


def trusted(secret: Mapping[str, Any] | None) -> ssl.SSLContext:
    """Trust the usual authorities, those in the Secret, and those beside the Docker config at SLMOPS_REGISTRY_AUTH.

    Raises ArtifactError(AccessDenied) for a ca.crt that holds no certificate.
    """
    context = httpx.create_ssl_context()
    for where, text in _authorities(secret):
        try:
            # Bundles have names between the certificates, in any script.
            context.load_verify_locations(cadata=text.encode("ascii", "ignore").decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise ArtifactError(
                "AccessDenied", f"{CA_KEY} in {where} holds no certificate. Put the CA's there in PEM form."
            ) from None
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # a CA of one's own often lacks what Python 3.13 asks for
    return context


def _authorities(secret: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    value = (secret or {}).get(CA_KEY)
    if value is not None:
        yield "the Secret", value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    config = os.environ.get("SLMOPS_REGISTRY_AUTH", "")
    if not config:
        return
    file = (Path(config) if Path(config).is_dir() else Path(config).parent) / CA_KEY
    try:
        if file.is_file():
            yield str(file.parent), file.read_text("utf-8", "replace")
    except OSError as error:
        raise ArtifactError("AccessDenied", f"Cannot read {file}: {error.strerror}. Check the mount.") from error
