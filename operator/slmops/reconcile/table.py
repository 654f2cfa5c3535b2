"""Every kind with its reconciler: the one place that knows them all."""

from collections.abc import Mapping

from slmops.api.batch import BatchSpec
from slmops.api.distillation import DistillationJobSpec, DistillationJobStatus
from slmops.api.finetune import FineTuneJobSpec
from slmops.api.meta import BatchStatus, ModelSource
from slmops.api.quantized import QuantizedModelSpec, QuantizedModelStatus
from slmops.reconcile import deployment
from slmops.reconcile.batch import BatchReconciler, ReadProgress, Recipe
from slmops.reconcile.protocol import Reconciler
from slmops.reconcile.sources import source_label, teacher_label
from slmops.remote.progress import ProgressReader


def _student(spec: BatchSpec) -> ModelSource:
    assert isinstance(spec, DistillationJobSpec)
    return spec.student


def _base(spec: BatchSpec) -> ModelSource:
    assert isinstance(spec, FineTuneJobSpec)
    return spec.base


def _source(spec: BatchSpec) -> ModelSource:
    assert isinstance(spec, QuantizedModelSpec)
    return spec.source


def _teacher(spec: BatchSpec) -> dict[str, str]:
    assert isinstance(spec, DistillationJobSpec)
    return {"source": source_label(spec.student), "teacher": teacher_label(spec)}


RECIPES = (
    Recipe("DistillationJob", "distill", DistillationJobSpec, DistillationJobStatus, _student, _teacher),
    Recipe(
        "FineTuneJob",
        "finetune",
        FineTuneJobSpec,
        BatchStatus,
        _base,
        lambda spec: {"source": source_label(_base(spec))},
    ),
    Recipe(
        "QuantizedModel",
        "quantize",
        QuantizedModelSpec,
        QuantizedModelStatus,
        _source,
        lambda spec: {"source": source_label(_source(spec))},
    ),
)


def reconcilers(read: ReadProgress | None = None) -> Mapping[str, Reconciler]:
    """Make the reconciler of every kind."""
    read = read or ProgressReader()
    found: dict[str, Reconciler] = {recipe.kind: BatchReconciler(recipe, read) for recipe in RECIPES}
    return {**found, deployment.RECONCILER.kind: deployment.RECONCILER}
