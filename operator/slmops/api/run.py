"""The contract between the operator and a worker pod.

The operator puts a `RunSpec` as JSON into the container's SLMOPS_RUN variable (one child object instead of two, and
no moment at which the pod could see another spec). The pod serves `/progress` (a `meta.Progress` as JSON) and
`/metrics` on `keys.METRICS_PORT`, and leaves one `RunResult` as JSON in its termination message (at most 4,096 bytes).
"""

from typing import Literal

from pydantic import Field

from slmops.api.base import Model
from slmops.api.distillation import DistillationJobSpec
from slmops.api.finetune import FineTuneJobSpec
from slmops.api.meta import Ancestor, Artifact
from slmops.api.quantized import QuantizedModelSpec

ENV_RUN = "SLMOPS_RUN"
ENV_GPU = "SLMOPS_GPU"  # the GPU resource that the pod asks for, if it does: one that is not seen is an error then
CONFIGMAP_ROOT = "/slmops/configmaps"  # <root>/<configmap name>/<key>
SECRET_ROOT = "/slmops/secrets"  # <root>/<secret name>/<key>  # noqa: S105  # a path, no secret
PVC_ROOT = "/slmops/pvc"  # <root>/<claim name>/...
WORK_DIR = "/slmops/work"  # an emptyDir: scratch
TERMINATION_LOG = "/dev/termination-log"

EXIT_OK = 0
EXIT_RETRY = 1  # worth another pod: counts against backoffLimit
EXIT_FATAL = 3  # another pod now would fail again: podFailurePolicy ends the Job
EXIT_INTERRUPTED = 143  # SIGTERM, checkpoint written: a disruption

FailureReason = Literal[
    "OutOfMemory",
    "DiskFull",
    "SourceUnavailable",
    "SourceNotFound",
    "AccessDenied",
    "UnsupportedModel",
    "BadDataset",
    "BadSpec",
    "TeacherUnavailable",
    "TeacherAnswersRejected",
    "NothingToTrain",
    "LossDiverged",
    "QualityBelowThreshold",
    "GateFailed",
    "StoreUnavailable",
    "Interrupted",
    "InternalError",
]


class Input(Model):
    """One resolved input: where to pull it from. `name` is Kind/name of the object that made it, or empty."""

    uri: str
    name: str = ""
    secret: str | None = None  # name of the Secret mounted below SECRET_ROOT


class TeacherEndpoint(Model):
    """The resolved teacher."""

    url: str  # up to and with /v1
    model: str
    secret: str | None = None
    key: str | None = None  # file below SECRET_ROOT/<secret>/
    name: str = ""  # ModelDeployment/name, if it is ours
    lineage: list[Ancestor] = Field(default_factory=list)  # of the served model, if it is ours
    revision: str = ""  # that answers, if it is ours: a candidate's answers are another teacher's


class RunSpec(Model):
    """All a worker needs; exactly one of the three specs is set. Sources named by `ref` stand in `model` resolved."""

    version: Literal[1] = 1
    namespace: str
    name: str
    uid: str
    distill: DistillationJobSpec | None = None
    finetune: FineTuneJobSpec | None = None
    quantize: QuantizedModelSpec | None = None
    model: Input  # student, base or source
    teacher: TeacherEndpoint | None = None
    output: str  # artifact URI to write, with a tag
    checkpoint: str  # artifact URI for checkpoints of this run (its tag holds the uid)


class RunResult(Model):
    """How a run ended. On success `artifact` is set, else `reason` and `message`."""

    succeeded: bool
    reason: str = ""  # a FailureReason
    message: str = ""
    artifact: Artifact | None = None
    format: str = ""  # safetensors | onnx
    lineage: list[Ancestor] = Field(default_factory=list)
    metrics: dict[str, float] = Field(default_factory=dict)
    quality: str = ""
    size: str = ""
    delta: str = ""
