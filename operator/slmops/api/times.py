"""Times as Kubernetes writes them: RFC 3339, UTC, whole seconds."""

from datetime import UTC, datetime


def stamp(moment: datetime) -> str:
    """`moment` (aware) as `2026-01-02T03:04:05Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse(text: str) -> datetime:
    """The aware datetime that `text` says, with or without fractions. Raises ValueError."""
    return datetime.fromisoformat(text)
