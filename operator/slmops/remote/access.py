"""What the operator shows to Prometheus and knows it by: keys of the Secret prometheus.existingSecret of the chart."""

from dataclasses import dataclass
from pathlib import Path

import httpx

from slmops.remote.client import shared

FOLDER = Path("/etc/slmops/prometheus")  # where the chart mounts it; read at each query, for Secrets change


class AccessError(Exception):
    """The Secret has something that cannot be used; says what, and nothing of its content."""


@dataclass(frozen=True)
class Access:
    """Sends the token, where there is one, with each request."""

    token: str
    client: httpx.Client

    def auth(self, request: httpx.Request) -> httpx.Request:
        """As httpx takes it."""
        request.headers["authorization"] = f"Bearer {self.token}"
        return request


def access(folder: Path = FOLDER) -> Access:
    """Raises AccessError. Keys that the Secret does not have are not needed."""
    token, ca = _key(folder, "token"), _key(folder, "ca.crt")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise AccessError("Key token of the Secret prometheus.existingSecret is not one word of ASCII.")
    try:
        return Access(token, shared(ca.encode("ascii", "ignore").decode()))  # PEM is ASCII; comments need not be
    except OSError:
        raise AccessError("Key ca.crt of the Secret prometheus.existingSecret has no certificate (PEM).") from None


def _key(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        said = type(error).__name__
        raise AccessError(f"Key {name} of the Secret prometheus.existingSecret cannot be read: {said}.") from None
