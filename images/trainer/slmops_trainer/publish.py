"""The last act of a training run: model card, manifest, thresholds, and the result."""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import __version__
from slmops.api.batch import Evaluation
from slmops.api.meta import Artifact
from slmops.api.run import RunResult
from slmops_artifacts import Manifest, Parent, pinned
from slmops_trainer import evaluate, result
from slmops_trainer.failure import RunFailure

if TYPE_CHECKING:
    from slmops_trainer.context import Context

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")
REJECTED = "-rejected"  # after the output's tag: an artifact that missed its thresholds
ANNOTATION_INPUTS = "slmops.dev/inputs"

log = logging.getLogger("slmops")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model was made from: the model's URI, its manifest, the object that made it, and the datasets."""

    uri: str
    manifest: Manifest
    name: str
    datasets: tuple[Parent, ...]


def publish(
    ctx: "Context",
    folder: Path,
    origin: Origin,
    evaluation: Evaluation | None,
    *,
    inputs: str,
    recipe: Mapping[str, Any],
    seed: int,
    title: str,
) -> RunResult:
    """Write card and manifest, push, hold the metrics of `ctx` against the thresholds.

    A model that misses them is pushed beside the output, for it was paid for, and the run ends with
    RunFailure(QualityBelowThreshold), whose message says where it lies.
    """
    manifest = Manifest(
        kind="model",
        parents=(
            Parent(
                kind="model",
                uri=pinned(origin.uri, origin.manifest),
                digest=origin.manifest.digest,
                name=origin.name,
            ),
            *origin.datasets,
        ),
        lineage=origin.manifest.lineage,
        dataset_digest=origin.datasets[0].digest if origin.datasets else None,
        recipe=dict(recipe),
        seed=seed,
        versions=versions(),
        metrics=dict(ctx.metrics),
        annotations={ANNOTATION_INPUTS: inputs},
        created=ctx.started,
    )
    (folder / "README.md").write_text(card(ctx, manifest, title), encoding="utf-8")
    missed = evaluate.below(ctx.metrics, evaluation.thresholds if evaluation else None)
    artifact, pushed = ctx.push(folder, manifest, rejected_uri(ctx.spec.output) if missed else ctx.spec.output)
    if missed:
        raise rejection(missed, artifact)
    return finished(artifact, pushed, evaluation)


def earlier(ctx: "Context", evaluation: Evaluation | None) -> RunResult | None:
    """The result, if an earlier pod of this run published its artifact and only its last word was lost."""
    found = ctx.existing()
    return finished(*found, evaluation) if found is not None else None


def check_rejected(ctx: "Context", evaluation: Evaluation | None, inputs: str) -> None:
    """Raise RunFailure(QualityBelowThreshold) if an earlier pod of this run published a rejected model of the same."""
    if evaluation is None or not evaluation.thresholds:
        return
    rejected = existing(ctx, rejected_uri(ctx.spec.output), inputs)
    if rejected is not None:
        artifact, manifest = rejected
        ctx.metrics.update(manifest.metrics)
        raise rejection(evaluate.below(manifest.metrics, evaluation.thresholds), artifact)


def inputs_of(*parts: str | None) -> str:
    """Identity of what a run reads besides its recipe, which cannot be edited: digests of datasets, and texts."""
    return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def existing(ctx: "Context", uri: str, inputs: str) -> tuple[Artifact, Manifest] | None:
    """What an earlier pod of this run published at `uri`, if it read the same: a ConfigMap may have been mended since.

    One that does not say what it was made from, by an earlier version, counts as made from the same.
    """
    found = ctx.existing(uri)
    if found is not None and found[1].annotations.get(ANNOTATION_INPUTS, inputs) != inputs:
        log.info("It was made from other data than is there now: it is made anew")
        return None
    return found


def finished(artifact: Artifact, manifest: Manifest, evaluation: Evaluation | None) -> RunResult:
    """The result of a published artifact."""
    main = evaluation.metrics[0] if evaluation else ""
    quality = result.quality(main, manifest.metrics[main]) if main in manifest.metrics else ""
    return result.success(artifact, manifest, quality=quality)


def rejection(missed: list[str], artifact: Artifact) -> RunFailure:
    """The failure of a model that is not good enough."""
    return RunFailure(
        "QualityBelowThreshold",
        f"{'; '.join(missed)}. The model is kept at {artifact.uri}. Train longer or on more data, "
        "or lower the threshold.",
    )


def rejected_uri(output: str) -> str:
    """Beside the output: nothing that reads the output ever finds a rejected model."""
    return output.rstrip("/") + REJECTED


def versions() -> dict[str, str]:
    """What took part, by package."""
    found = {"slmops": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def card(ctx: "Context", manifest: Manifest, title: str, library: str = "transformers") -> str:
    """The model card: what it is, what it was made from, how, and how good it is."""
    spec = ctx.spec
    lines = [
        "---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [slmops]", "---",
        f"# {spec.name}", "", f"{title} Made in namespace {spec.namespace} by slmops {__version__}.", "",
        "## Made from", "", *_table(("what", "where", "digest"), [
            (row.name or row.kind, row.uri, row.digest) for row in manifest.parents
        ]),
        "## Measured", "", *_table(("metric", "value"), [
            (name, f"{value:.6g}") for name, value in manifest.metrics.items()
        ]),
        "## Recipe", "", *_table(("setting", "value"), sorted(_flat(manifest.recipe))),
        "## Versions", "", *_table(("package", "version"), sorted(manifest.versions.items())),
    ]  # fmt: skip
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[Any]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells
    ] + [""]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, entry in value.items():
        found += _flat(entry, f"{prefix}{name}.") if isinstance(entry, dict) else [(f"{prefix}{name}", str(entry))]
    return found
