"""What all kinds share: references, sources, pods, conditions, status."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from slmops.api.base import Model, rules

Kind = Literal["DistillationJob", "FineTuneJob", "QuantizedModel", "ModelDeployment"]
ModelKind = Literal["DistillationJob", "FineTuneJob", "QuantizedModel"]
TrainableKind = Literal["DistillationJob", "FineTuneJob"]
Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
URI_PATTERN = r"^(oci|pvc|hf)://[^\s]+$"


def cel(*pairs: tuple[str, str]) -> ConfigDict:
    """The base's configuration with CEL rules: each pair is (expression, message to the user)."""
    return ConfigDict(
        frozen=True,
        populate_by_name=True,
        alias_generator=to_camel,
        extra="ignore",
        use_enum_values=True,
        json_schema_extra=rules(*pairs),
    )


class SecretRef(Model):
    """A Secret in the same namespace."""

    name: Name = Field(description="Name of a Secret in this namespace.")


class SecretKeyRef(Model):
    """One key of a Secret in the same namespace."""

    name: Name = Field(description="Name of a Secret in this namespace.")
    key: str = Field(min_length=1, max_length=253, description="Key within the Secret.")


class ConfigMapKeyRef(Model):
    """One key of a ConfigMap in the same namespace."""

    name: Name = Field(description="Name of a ConfigMap in this namespace.")
    key: str = Field(min_length=1, max_length=253, description="Key within the ConfigMap; its value is the file.")


class ObjectRef(Model):
    """One of our batch objects in the same namespace; its artifact is meant."""

    kind: ModelKind = Field(description="DistillationJob, FineTuneJob or QuantizedModel.")
    name: Name = Field(description="Name of the object in this namespace.")


class ModelSource(Model):
    """Where a model comes from: exactly one of `uri` and `ref`."""

    model_config = cel(
        ("has(self.uri) != has(self.ref)", "give exactly one of uri and ref"),
        ("!has(self.secretRef) || has(self.uri)", "secretRef goes with uri; a ref needs no credentials"),
    )

    uri: str | None = Field(
        default=None,
        max_length=1024,
        pattern=URI_PATTERN,
        description="oci://registry/repo:tag or @sha256:digest, pvc://claim/path, or hf://org/name@revision.",
    )
    ref: ObjectRef | None = Field(default=None, description="Another object; this one waits until it is Ready.")
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Credentials: key .dockerconfigjson for oci://, key token for hf://; "
        "in key ca.crt, a CA of your own.",
    )


class TrainableRef(ObjectRef):
    """A DistillationJob or FineTuneJob: a QuantizedModel is ONNX, which can be neither trained nor quantized again."""

    kind: TrainableKind = Field(
        description="DistillationJob or FineTuneJob; not a QuantizedModel: name the model it was made from."
    )


class TrainableSource(ModelSource):
    """Where a model comes from that is to be trained or converted: exactly one of `uri` and `ref`."""

    ref: TrainableRef | None = Field(default=None, description="Another object; this one waits until it is Ready.")


class Columns(Model):
    """Names of the dataset's columns where they differ from the usual ones."""

    messages: str | None = Field(
        default=None, max_length=128, description="Chat turns [{role, content}]; default messages."
    )
    prompt: str | None = Field(default=None, max_length=128, description="Prompt text; default prompt.")
    completion: str | None = Field(default=None, max_length=128, description="Wanted answer; default completion.")


class Dataset(Model):
    """A set of examples, one JSON object a line (JSONL): exactly one of `uri` and `configMap`."""

    model_config = cel(
        ("has(self.uri) != has(self.configMap)", "give exactly one of uri and configMap"),
        ("!has(self.file) || has(self.uri)", "file goes with uri; a configMap names its key"),
        ("!has(self.secretRef) || has(self.uri)", "secretRef goes with uri"),
    )

    uri: str | None = Field(
        default=None,
        max_length=1024,
        pattern=URI_PATTERN,
        description="oci://registry/repo:tag, pvc://claim/path, or hf://datasets/org/name@revision.",
    )
    file: str | None = Field(
        default=None,
        max_length=512,
        pattern=r"^[^/\s][^\s]*\.jsonl$",
        description="The .jsonl file inside the artifact; may be left out when there is just one.",
    )
    config_map: ConfigMapKeyRef | None = Field(default=None, description="A ConfigMap key holding the JSONL.")
    secret_ref: SecretRef | None = Field(default=None, description="Credentials, as for models.")
    format: Literal["auto", "messages", "prompt-completion"] = Field(
        default="auto",
        description="messages: chat turns, the last one is the answer; prompt-completion: two texts; "
        "auto: told by the columns.",
    )
    columns: Columns | None = Field(default=None, description="Column names, where they are not the usual ones.")
    limit: int | None = Field(default=None, ge=1, description="Use the first so many examples only.")


class EnvVar(Model):
    """A plain environment variable of the pod."""

    model_config = cel(("!self.name.startsWith('SLMOPS_')", "names starting with SLMOPS_ are the operator's own"))

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Name.")
    value: str = Field(default="", max_length=4096, description="Value; empty unless given.")


class Toleration(Model):
    """As in a Pod."""

    key: str | None = Field(default=None, max_length=317, description="Taint key.")
    operator: Literal["Exists", "Equal"] | None = Field(default=None, description="Exists or Equal.")
    value: str | None = Field(default=None, max_length=63, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(default=None, description="Effect.")
    toleration_seconds: int | None = Field(default=None, description="For NoExecute.")


Quantity = Annotated[
    str,
    Field(
        max_length=32,
        json_schema_extra={
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?[0-9]+))?$",
        },
        coerce_numbers_to_str=True,
    ),
]


class Resources(Model):
    """As in a Pod: a GPU is `limits: {nvidia.com/gpu: 1}`."""

    requests: dict[str, Quantity] | None = Field(default=None, max_length=16, description="Requested resources.")
    limits: dict[str, Quantity] | None = Field(default=None, max_length=16, description="Limits.")


class Pod(Model):
    """What may be set on the pods: an allow-list; the security context is not on it."""

    image: str | None = Field(
        default=None, max_length=1024, description="Container image instead of the operator's default."
    )
    resources: Resources | None = Field(default=None, description="Requests and limits.")
    node_selector: dict[str, Annotated[str, Field(max_length=63)]] | None = Field(
        default=None, max_length=32, description="As in a Pod."
    )
    tolerations: list[Toleration] | None = Field(default=None, max_length=32, description="As in a Pod.")
    priority_class_name: str | None = Field(default=None, max_length=253, description="As in a Pod.")
    runtime_class_name: str | None = Field(default=None, max_length=253, description="As in a Pod, for example nvidia.")
    env: list[EnvVar] | None = Field(
        default=None,
        max_length=64,
        description="Plain variables; SLMOPS_* are ours.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    image_pull_secrets: list[SecretRef] | None = Field(default=None, max_length=8, description="As in a Pod.")


class Condition(Model):
    """The standard condition."""

    type: str = Field(max_length=316, description="Ready, Reconciling, Stalled, Complete, Failed, Suspended, ...")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: str = Field(max_length=1024, description="One word for machines.")
    message: str = Field(default="", max_length=32768, description="A sentence for people.")
    last_transition_time: str = Field(
        description="When status last changed.", json_schema_extra={"format": "date-time"}
    )
    observed_generation: int | None = Field(default=None, description="The generation this was said of.")


STAGE_STARTING = "Starting"  # of a run that has done nothing yet


class Progress(Model):
    """Where a run stands."""

    percent: int = Field(ge=0, le=100, description="0 to 100.")
    stage: str = Field(default="", max_length=64, description="For example Generating, Training, Evaluating.")
    step: int | None = Field(default=None, description="Steps done in this stage.")
    total_steps: int | None = Field(default=None, description="Steps of this stage.")
    eta_seconds: int | None = Field(default=None, description="Estimated rest of the whole run.")
    message: str = Field(default="", max_length=512, description="For example the loss.")
    time: str | None = Field(
        default=None, description="When the operator read this.", json_schema_extra={"format": "date-time"}
    )


class Artifact(Model):
    """What a run made."""

    uri: str = Field(max_length=1024, description="Where it is, pinned to its digest where the store can.")
    digest: str = Field(max_length=128, description="sha256:... of its content: its identity.")
    size_bytes: int | None = Field(
        default=None, description="Bytes of all files.", json_schema_extra={"format": "int64"}
    )


class Ancestor(Model):
    """One artifact that this one was made from."""

    kind: Literal["model", "dataset"] = Field(description="model or dataset.")
    uri: str = Field(max_length=1024, description="Where it was read from.")
    digest: str = Field(max_length=128, description="Its content's digest.")
    name: str = Field(default="", max_length=317, description="Kind/name of the object that made it, if one did.")


class Lineage(Model):
    """From what an artifact was made, nearest ancestor first, back to the base model and the data."""

    digest: str = Field(max_length=128, description="The artifact these are the ancestors of.")
    parents: list[Ancestor] = Field(default_factory=list, max_length=64, description="Ancestors, nearest first.")


class Failure(Model):
    """Why the last attempt failed."""

    reason: str = Field(max_length=64, description="For example OutOfMemory, BadDataset, TeacherUnavailable.")
    message: str = Field(default="", max_length=1024, description="What, where, and how to mend it.")
    exit_code: int | None = Field(default=None, description="Of the container, if it ran.")
    time: str = Field(description="When.", json_schema_extra={"format": "date-time"})


class Status(Model):
    """The part of status that all kinds share."""

    observed_generation: int = Field(
        default=-1, description="The generation this status speaks of; -1 before the first pass."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        description="Ready is always there; Reconciling or Stalled, never both.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    phase: str = Field(default="", max_length=32, description="For people; tools read conditions.")


class BatchStatus(Status):
    """Status of the three kinds that run to an end and leave an artifact."""

    start_time: str | None = Field(
        default=None, description="First pod created.", json_schema_extra={"format": "date-time"}
    )
    completion_time: str | None = Field(
        default=None, description="End of the run.", json_schema_extra={"format": "date-time"}
    )
    attempts: int = Field(default=0, description="Pods that failed through a fault of their own.")
    source: str | None = Field(default=None, max_length=1024, description="The model this is made from, for the table.")
    retries: int = Field(
        default=0, description="Whole runs started again because of something outside (nextRetryTime)."
    )
    next_retry_time: str | None = Field(
        default=None, description="When the next of these starts.", json_schema_extra={"format": "date-time"}
    )
    inputs: str | None = Field(
        default=None,
        max_length=64,
        description="Hashes of the ConfigMaps and of the Secrets that the run was started with.",
    )
    progress: Progress | None = Field(default=None, description="Where the run stands.")
    metrics: dict[str, float] | None = Field(default=None, description="What was measured, by name.")
    quality: str | None = Field(default=None, max_length=64, description="The main metric, for the table.")
    artifact: Artifact | None = Field(default=None, description="The result.")
    lineage: Lineage | None = Field(default=None, description="What the result was made from.")
    last_failure: Failure | None = Field(default=None, description="Why the last attempt failed.")
