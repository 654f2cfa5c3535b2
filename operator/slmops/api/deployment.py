"""ModelDeployment: serves a model behind a router and rolls new revisions out step by step."""

from typing import Annotated, Literal

from pydantic import Field

from slmops.api.base import Model
from slmops.api.meta import Lineage, ModelSource, ObjectRef, Pod, SecretRef, Status, cel

_OWN_OPTIONS = "^--(model|served-name|host|port|metrics-port|api-keys-dir|engine)(=|$)"  # of slmops-server

AUTO = ("auto", "onnxruntime-genai")  # engine names that leave the choice to the server; the second is of before


class QuantizedRef(ObjectRef):
    """A QuantizedModel in the same namespace; its artifact is meant."""

    kind: Literal["QuantizedModel"] = Field(
        description="QuantizedModel: the server runs ONNX (precision fp32 keeps the weights as they are)."
    )


class ServedModel(ModelSource):
    """Where a model comes from: exactly one of `uri` and `ref`."""

    ref: QuantizedRef | None = Field(
        default=None, description="A QuantizedModel; this object waits until it is Ready, and follows its artifact."
    )


class Engine(Model):
    """What runs the model."""

    model_config = cel(
        (
            f"!has(self.args) || self.args.all(arg, !arg.matches('{_OWN_OPTIONS}'))",
            (
                "args: model, served-name, host, port, metrics-port and api-keys-dir are set by the operator, "
                "engine by name"
            ),
        ),
    )

    name: Literal["auto", "onnxruntime", "genai", "openvino", "llamacpp", "onnxruntime-genai"] = Field(
        default="auto",
        description="The engine of slmops-server. auto: onnxruntime for ONNX, and genai where it refuses a graph; "
        "openvino for OpenVINO IR; llamacpp for GGUF. docs/serving.md says when to take which. onnxruntime-genai is "
        "the former name of auto.",
    )
    image: str | None = Field(
        default=None, max_length=1024, description="Server image instead of the operator's default."
    )
    args: list[Annotated[str, Field(max_length=1024)]] | None = Field(
        default=None, max_length=64, description="More arguments of slmops-server."
    )


class Endpoint(Model):
    """How the API is offered."""

    api_keys_secret_ref: SecretRef | None = Field(
        default=None,
        description="A Secret whose values are the accepted bearer tokens; without it no key is asked. To switch it on "
        "is a rollout: until promoted, stable pods ask for no key (rollout.steps: [] goes straight to 100 percent).",
    )


class Step(Model):
    """One step: a share of the requests, and how long it has to hold."""

    weight: int = Field(ge=0, le=100, description="Percent of the requests that the candidate gets.")
    pause_seconds: int | None = Field(
        default=None, ge=1, le=604800, description="Least time at this weight. Without it, analysis alone decides."
    )
    approval: bool = Field(
        default=False,
        description="true: wait here for the annotation slmops.dev/promote with the candidate's revision.",
    )


class AnalysisMetric(Model):
    """One Prometheus measurement; exactly one of `builtin` and `query`."""

    model_config = cel(
        ("has(self.builtin) != has(self.query)", "give exactly one of builtin and query"),
        ("has(self.max) || has(self.min)", "give max or min, or both"),
        ("!has(self.max) || !has(self.min) || self.min <= self.max", "min is above max: no value can pass"),
    )

    name: str = Field(
        min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="Name in status."
    )
    builtin: Literal["errorRate", "latencyP95"] | None = Field(
        default=None,
        description="errorRate: share (0 to 1) of 5xx and unanswered requests, seen by the router, and of streams that "
        "their server ended with an error; "
        "latencyP95: seconds to the whole answer, by the servers' own histogram; let max be one of its bounds "
        "(docs/metrics.md).",
    )
    query: str | None = Field(
        default=None,
        max_length=4096,
        description="PromQL giving one value; "
        "{{namespace}}, {{name}}, {{revision}}, {{stable}}, {{window}} are filled in.",
    )
    max: float | None = Field(default=None, description="Greatest good value.")
    min: float | None = Field(default=None, description="Least good value.")


class Analysis(Model):
    """Evidence that a step must earn. No data, too few samples, an unreachable Prometheus hold; they never promote."""

    interval_seconds: int = Field(default=10, ge=1, le=3600, description="Between two measurements.")
    window_seconds: int = Field(
        default=60,
        ge=5,
        le=86400,
        description="{{window}}: how far back a query looks at least. Further where the measurement before is longer "
        "ago, or where minSamples come more slowly; never to before the step began.",
    )
    min_samples: int = Field(
        default=20, ge=0, description="Requests that the candidate must have answered in this step."
    )
    passes: int = Field(
        default=2, ge=1, le=100, description="Measurements in a row that must pass before the next step."
    )
    failure_limit: int = Field(
        default=1,
        ge=0,
        le=100,
        description="Failed measurements tolerated in a rollout; one more rolls back. One that looks back to before "
        "a counted one is not counted again in that step: both may be about the same requests.",
    )
    metrics: list[AnalysisMetric] = Field(
        min_length=1,
        max_length=16,
        description="All must pass.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )


_EVIDENCE = "has(step.pauseSeconds) || (has(step.approval) && step.approval) || (has(self.analysis) && step.weight > 0)"


class Rollout(Model):
    """How a new revision earns its traffic. The first revision, and steps: [], go straight to 100 percent."""

    model_config = cel(
        (
            "!has(self.steps) || self.steps.map(step, step.weight).isSorted()",
            "steps: a weight must not be below that of the step before",
        ),
        (
            f"!has(self.steps) || self.steps.all(step, {_EVIDENCE})",
            "steps: each needs pauseSeconds, approval, or analysis with a weight above 0; else it proves nothing",
        ),
    )

    steps: list[Step] = Field(
        default=[Step(weight=10, pause_seconds=60), Step(weight=50, pause_seconds=60)],
        max_length=32,
        description="In order; 100 percent follows the last one by itself.",
    )
    analysis: Analysis | None = Field(default=None, description="Without it, readiness and pauses alone decide.")
    progress_deadline_seconds: int = Field(
        default=600,
        ge=10,
        le=86400,
        description="Longest wait for the next one of a candidate's pods to be ready; after it, roll back.",
    )
    scale_down_delay_seconds: int = Field(
        default=30,
        ge=0,
        le=604800,
        description="How long the old revision stays after the switch. One that was given up (rolled back, superseded, "
        "reverted) goes once no router sends it requests.",
    )


_GPU = (  # a GPU for which no server is named
    "has(SPEC.pod) && has(SPEC.pod.resources) && has(SPEC.pod.resources.limits) && "
    "'nvidia.com/gpu' in SPEC.pod.resources.limits && !has(SPEC.engine.image) && !has(SPEC.pod.image)"
)
_GPU_BEFORE = _GPU.replace("SPEC", "oldSelf.value()")  # from when there was no such rule: it can still be scaled


class ModelDeploymentSpec(Model):
    """Serve a model."""

    model_config = cel(
        (
            "!has(self.engine.image) || !has(self.pod) || !has(self.pod.image)",
            "give engine.image or pod.image, not both",
        ),
        (
            f"!({_GPU.replace('SPEC', 'self')}) || (oldSelf.hasValue() && {_GPU_BEFORE})",
            "a GPU needs engine.image, a server that uses it: the operator's own computes on the CPU alone",
        ),
    )

    model: ServedModel = Field(description="A QuantizedModel, or an artifact with an ONNX, OpenVINO or GGUF model.")
    served_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=253,
        description="The model name clients send; default: this object's name.",
    )
    engine: Engine = Field(default=Engine(), description="What runs the model.")
    replicas: int = Field(default=1, ge=0, le=1000, description="Pods of the stable revision.")
    endpoint: Endpoint = Field(default=Endpoint(), description="How the API is offered.")
    pod: Pod | None = Field(
        default=None,
        description="Resources and placement of the server pods; router pods have their tolerations and pull secrets.",
    )
    rollout: Rollout = Field(
        default=Rollout(),
        description="How a new revision earns its traffic; without it 10 and then 50 percent, 60 seconds each, and no "
        "analysis.",
    )


class Revision(Model):
    """A model as it is served."""

    revision: str = Field(
        max_length=63,
        description="Hash of the model (digest or URI, name of its Secret), engine, pod, served name and name of the "
        "Secret with the API keys.",
    )
    model: str = Field(max_length=1024, description="Artifact URI.")
    digest: str = Field(default="", max_length=128, description="Artifact digest, where it is known.")
    source: str = Field(default="", max_length=317, description="Kind/name it came from.")
    served_name: str = Field(default="", max_length=253, description="Name of the model in requests.")
    api_keys_secret: str = Field(default="", max_length=253, description="Secret with the API keys; empty for none.")
    hash_version: int = Field(default=1, description="How the hash was made; an operator upgrade never re-rolls.")


class Verdict(Model):
    """The last measurement of one metric."""

    name: str = Field(max_length=63, description="The metric.")
    verdict: Literal["Pass", "Fail", "NoData", "Unreachable", "TooFewSamples", "Inconclusive"] = Field(
        description="Only Fail counts against failureLimit."
    )
    value: float | None = Field(default=None, description="Measured value.")
    query: str = Field(default="", max_length=8, description="Hash of what was asked: another query is another metric.")
    message: str = Field(default="", max_length=512, description="Why.")


class RolloutStatus(Model):
    """A rollout in progress, or the last one; all times absolute, so that a restart changes nothing."""

    phase: str = Field(
        default="Stable", max_length=32, description="Preparing, Step, Promoting, Draining, RollingBack, ..."
    )
    state: str = Field(
        default="", max_length=32, description="Within the phase: Scaling, Routing, Analyzing, Pausing, Holding."
    )
    step: int = Field(default=0, description="Index into steps.")
    entered_at: str | None = Field(
        default=None, description="When this phase and step began.", json_schema_extra={"format": "date-time"}
    )
    routed_at: str | None = Field(
        default=None,
        description="When every router was seen to give this step's weight.",
        json_schema_extra={"format": "date-time"},
    )
    approved: bool = Field(default=False, description="This step's pause was cut short, or its approval given.")
    approved_weight: int | None = Field(default=None, description="The step's weight then: no other one is approved.")
    waiting_since: str | None = Field(
        default=None,
        description="Since when the next pod is waited for; progressDeadlineSeconds later the revision is given up.",
        json_schema_extra={"format": "date-time"},
    )
    waiting_pods: int | None = Field(default=None, description="Most of them that were ready since then.")
    measured_at: str | None = Field(
        default=None, description="Last measurement.", json_schema_extra={"format": "date-time"}
    )
    answered_at: str | None = Field(
        default=None,
        description="Last measurement in which any metric had an answer: the next one looks back to it.",
        json_schema_extra={"format": "date-time"},
    )
    passes: int = Field(default=0, description="Measurements passed in a row in this step.")
    failures: int = Field(default=0, description="Failed measurements of this rollout, as failureLimit counts them.")
    failed_at: str | None = Field(
        default=None, description="When the last failed.", json_schema_extra={"format": "date-time"}
    )
    losses: int = Field(
        default=0,
        description="How often all pods of the candidate fell over by themselves while it got requests; the fourth "
        "rolls back.",
    )
    samples: int | None = Field(
        default=None,
        description="Requests the candidate answered in this step; while it runs, told anew for each tenth more.",
    )
    verdicts: list[Verdict] = Field(default_factory=list, max_length=16, description="Last measurement by metric.")
    hold: str = Field(default="", max_length=512, description="Why it does not move on, if it holds.")
    outcome: str = Field(default="", max_length=512, description="How the last rollout ended.")
    retiring: dict[str, str] = Field(
        default_factory=dict,
        max_length=16,
        description="Revisions on their way out, and since when no router sends them requests; empty while one may.",
    )
    former: list[str] | None = Field(
        default=None,
        max_length=16,
        description="Those that were stable and still have pods: scaleDownDelaySeconds is theirs.",
    )
    handled: dict[str, str] = Field(
        default_factory=dict, max_length=8, description="Verbs already obeyed, by annotation."
    )
    ignored: dict[str, str] = Field(
        default_factory=dict,
        max_length=8,
        description="Verbs that do nothing, for they name another revision than the candidate; an Event said so.",
    )


class ModelDeploymentStatus(Status):
    """Status."""

    endpoint: str | None = Field(default=None, max_length=1024, description="Base URL inside the cluster, with /v1.")
    replicas: int = Field(default=0, description="Pods of the stable revision.")
    ready_replicas: int = Field(default=0, description="Those that answer.")
    selector: str | None = Field(
        default=None, max_length=1024, description="Of the pods that share the load, for the scale subresource."
    )
    stable: Revision | None = Field(default=None, description="Serves whatever the candidate does not.")
    candidate: Revision | None = Field(default=None, description="On its way, or rolled back.")
    weight: int | None = Field(default=None, description="Percent of the requests that go to the candidate.")
    ready: str = Field(default="", max_length=32, description="Ready pods of wanted pods, for the table.")
    rollout: RolloutStatus = Field(default=RolloutStatus(), description="The rollout.")
    lineage: Lineage | None = Field(default=None, description="What the stable model was made from.")


class ModelDeployment(Model):
    """The kind."""

    spec: ModelDeploymentSpec
    status: ModelDeploymentStatus = ModelDeploymentStatus()
