"""What DistillationJob, FineTuneJob and QuantizedModel share: run policy, training, evaluation."""

from typing import Annotated, Literal

from pydantic import Field

from slmops.api.base import Model
from slmops.api.meta import Dataset, Pod, cel

MUTABLE = ("suspend", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")

SECONDS_MAX = 2147483647  # 68 years; more is no date any more

Metric = Literal["exactMatch", "fieldMatch", "jsonValid", "tokenF1", "rougeL", "perplexity"]


class Evaluation(Model):
    """Held-out examples, answered greedily before and after; the first metric is the QUALITY column."""

    model_config = cel(
        (
            "!has(self.thresholds) || self.thresholds.all(name, name in self.metrics)",
            "thresholds: each name has to be one of metrics",
        )
    )

    dataset: Dataset = Field(
        description="Held-out examples. In a FineTuneJob, one that also occurs in training is an error; a "
        "DistillationJob does not ask such a prompt (or, with data.filters.decontaminate: false, has the same error)."
    )
    metrics: list[Metric] = Field(
        default=["exactMatch"],
        min_length=1,
        max_length=6,
        description="exactMatch of the whole answer; fieldMatch: share of equal fields of JSON answers; jsonValid; "
        "tokenF1; rougeL; perplexity of the wanted answer. Default: exactMatch.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    thresholds: dict[str, float] | None = Field(
        default=None,
        max_length=6,
        description="Least value by metric (greatest, for perplexity); "
        "below it the run fails with QualityBelowThreshold.",
    )
    max_tokens: int = Field(default=256, ge=1, le=8192, description="Longest answer, in tokens.")
    batch_size: int = Field(default=32, ge=1, le=1024, description="Answers generated side by side.")


class Checkpoint(Model):
    """How often a run saves itself, so that a lost pod costs no more than that."""

    every_seconds: int = Field(
        default=300, ge=5, le=86400, description="Seconds between checkpoints; SIGTERM always writes one."
    )


class EarlyStopping(Model):
    """Stop when the evaluation loss no longer falls; published are the weights that had the least."""

    patience: int = Field(ge=1, le=1000, description="Evaluations without improvement before stopping.")
    every_steps: int = Field(ge=1, description="Optimizer steps between evaluations; one more follows the last step.")
    min_delta: float = Field(default=0.0, ge=0, description="Least fall of the loss that counts.")


class Training(Model):
    """The optimizer's recipe; defaults are those of the Azure ML distillation job where it has one."""

    model_config = cel(
        ("!(has(self.epochs) && has(self.maxSteps))", "give epochs or maxSteps, not both"),
    )

    epochs: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        default=None, description="Passes over the data; default 3."
    )
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Optimizer steps instead of epochs."
    )
    learning_rate: float = Field(default=2e-5, gt=0, le=1, description="Peak learning rate.")
    batch_size: int = Field(default=2, ge=1, le=4096, description="Examples of one forward pass.")
    gradient_accumulation: int = Field(default=1, ge=1, le=4096, description="Forward passes of one optimizer step.")
    max_length: int = Field(
        default=1024, ge=8, le=131072, description="Longest example in tokens; longer ones are left out and counted."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: autocast, weights stay fp32. auto: bf16 where the node's GPU or CPU has it, else fp32.",
    )
    gradient_checkpointing: bool = Field(default=False, description="Less memory for more time.")
    scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="cosine", description="Decay of the learning rate."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping.")
    seed: int = Field(default=42, ge=0, le=4294967295, description="Seed of everything random.")
    early_stopping: EarlyStopping | None = Field(
        default=None,
        description="Off unless given; needs evaluation. The weights with the least loss on it are published.",
    )
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="How often the run saves itself.")


class BatchSpec(Model):
    """Run policy; all of it but `queueName`, `pod` and `output` stays mutable."""

    suspend: bool = Field(default=False, description="Stop the pods, keep what was done; false resumes.")
    backoff_limit: int = Field(
        default=3, ge=0, le=100, description="Retries after a pod's own fault; evictions are free."
    )
    active_deadline_seconds: int | None = Field(
        default=None, ge=1, le=SECONDS_MAX, description="Longest run of one Job, in seconds."
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=SECONDS_MAX,
        description="Seconds after the end at which the Job (not this object) is removed.",
    )
    queue_name: str | None = Field(
        default=None, max_length=63, description="Kueue LocalQueue; sets the label on the Job."
    )
    pod: Pod | None = Field(default=None, description="Image, resources, placement of the pods.")
    output: str | None = Field(
        default=None,
        max_length=1024,
        pattern=r"^(oci|pvc)://[^\s@/]+/+[^\s@/][^\s@]*$",  # beside it stand the checkpoints: never a whole claim
        description="Where to write the artifact: oci://registry/repo:tag, or pvc://claim/folder; default: the "
        "operator's store, <namespace>/<kind>-<name>.",
    )


class TrainedSpec(BatchSpec):
    """What the kinds that train share beyond it."""

    evaluation: Evaluation | None = Field(default=None, description="Held-out evaluation.")
