"""How a run ends: the RunResult in the termination message, and the words in it."""

import os
from pathlib import Path

from slmops.api.meta import Ancestor, Artifact
from slmops.api.run import RunResult
from slmops_artifacts import Manifest
from slmops_trainer.failure import RunFailure

LIMIT = 4096  # bytes that the kubelet keeps
MESSAGE_MAX = 1000
QUALITY_MAX = 64


def quality(metric: str, value: float) -> str:
    """The QUALITY column: `0.934 exactMatch`."""
    return f"{value:.3f} {metric}"[:QUALITY_MAX]


def ancestors(manifest: Manifest) -> list[Ancestor]:
    """The manifest's line, nearest first."""
    return [Ancestor(kind=row.kind, uri=row.uri, digest=row.digest, name=row.name) for row in manifest.lineage]


def success(artifact: Artifact, manifest: Manifest, **more: str) -> RunResult:
    """The result of a run whose artifact is published; `more`: quality, size, delta."""
    return RunResult(
        succeeded=True,
        artifact=artifact,
        format=manifest.format,
        lineage=ancestors(manifest),
        metrics=manifest.metrics,
        **more,
    )


def failed(failure: RunFailure, metrics: dict[str, float]) -> RunResult:
    """The result of a run that ended badly, with what it had measured."""
    return RunResult(succeeded=False, reason=failure.reason, message=failure.message, metrics=metrics)


def encode(result: RunResult, limit: int = LIMIT) -> bytes:
    """The result as JSON in at most `limit` bytes: whole rows go, last ones first, and what is left is whole JSON.

    Lineage keeps its nearest rows, metrics their first ones (recipes put the main ones first).
    """
    metrics, lineage, message = list(result.metrics.items()), list(result.lineage), _cut(result.message, MESSAGE_MAX)
    # JSON has no NaN: a metric that is none is left out.
    metrics = [(name, value) for name, value in metrics if value == value and abs(value) != float("inf")]
    while True:
        fitted = result.model_copy(update={"metrics": dict(metrics), "lineage": lineage, "message": message})
        body = fitted.model_dump_json(by_alias=True, exclude_none=True).encode()
        if len(body) <= limit:
            return body
        if len(lineage) > 2:
            lineage.pop()
        elif metrics:
            metrics.pop()
        elif lineage:
            lineage.pop()
        elif message:
            message = _cut(message, len(message) // 2)
        else:
            raise ValueError(f"A result does not fit in {limit} bytes: {body[:200]!r}")


def write(result: RunResult, path: Path) -> None:
    """Leave the result where the kubelet reads it. The file exists already and its folder may be read-only."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(handle, encode(result))
    finally:
        os.close(handle)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(0, limit - 1)] + "…"
