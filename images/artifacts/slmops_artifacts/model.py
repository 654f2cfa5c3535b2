"""What an artifact says about itself: kind, format, identity, ancestors, recipe and metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SHA256 = r"^sha256:[0-9a-f]{64}$"
SHA256_OR_EMPTY = r"^(sha256:[0-9a-f]{64})?$"


class Parent(BaseModel):
    """One ancestor of an artifact."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["model", "dataset"]
    uri: str
    digest: str = Field(pattern=SHA256)
    name: str = ""


class Manifest(BaseModel):
    """The identity card of an artifact.

    `digest` is filled by push and pull and never stored inside the artifact (it would have to contain itself).
    `created` is the caller's: use the start of the run, so that publishing twice gives one digest.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=True, ser_json_inf_nan="strings")

    kind: Literal["model", "dataset", "checkpoint"]
    format: str = ""
    digest: str = Field(default="", pattern=SHA256_OR_EMPTY)
    parents: tuple[Parent, ...] = ()
    dataset_digest: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    lineage: tuple[Parent, ...] = ()
    annotations: dict[str, str] = Field(default_factory=dict)
    created: str = ""
    size_bytes: int = Field(default=0, ge=0)

    def derived_from(self, uri: str, ancestor: Manifest, name: str = "") -> Manifest:
        """Return a copy that has `ancestor` among its parents, and the ancestor's own line behind it."""
        parent = Parent(
            kind="dataset" if ancestor.kind == "dataset" else "model",
            uri=uri,
            digest=ancestor.digest,
            name=name,
        )
        parents = dedupe((*self.parents, parent))
        return self.model_copy(
            update={"parents": parents, "lineage": dedupe((*parents, *self.lineage, *ancestor.lineage))}
        )

    def completed(self, **update: Any) -> Manifest:
        """Return a copy with `update` applied and every parent part of the lineage."""
        return self.model_copy(update={"lineage": dedupe((*self.parents, *self.lineage)), **update})


def dedupe(parents: Iterable[Parent]) -> tuple[Parent, ...]:
    """Keep the first mention of each ancestor: nearest first stays nearest first."""
    seen: dict[tuple[str, str], Parent] = {}
    for parent in parents:
        seen.setdefault((parent.kind, parent.digest), parent)
    return tuple(seen.values())
