"""DistillationJob: a teacher writes the training set, a student learns it."""

from typing import Literal

from pydantic import Field

from slmops.api.base import Model
from slmops.api.batch import TrainedSpec, Training
from slmops.api.meta import BatchStatus, ConfigMapKeyRef, Dataset, Name, SecretKeyRef, TrainableSource, cel

TaskType = Literal["nli", "conversation", "qa", "math", "summarization", "classification", "extraction", "generation"]


class Endpoint(Model):
    """An OpenAI-compatible endpoint."""

    model_config = cel(
        (
            "!self.url.matches('^https?://[^/?#]*@')",
            "url names a user or a key: put the key into a Secret and name that in apiKeySecretRef",
        ),
    )

    url: str = Field(max_length=1024, pattern=r"^https?://[^\s]+$", description="Base URL, up to and with /v1.")
    model: str = Field(min_length=1, max_length=253, description="The model field of the requests.")
    api_key_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Key sent as bearer token, to an Azure deployment as api-key; "
        "in the Secret's key ca.crt, a CA of your own.",
    )


class DeploymentRef(Model):
    """A ModelDeployment in the same namespace, used once it is Ready."""

    name: Name = Field(description="Its name.")


class Teacher(Model):
    """The model that answers: exactly one of `endpoint` and `deploymentRef`."""

    model_config = cel(
        ("has(self.endpoint) != has(self.deploymentRef)", "give exactly one of endpoint and deploymentRef"),
    )

    endpoint: Endpoint | None = Field(default=None, description="An OpenAI-compatible endpoint.")
    deployment_ref: DeploymentRef | None = Field(default=None, description="A ModelDeployment of this namespace.")


class Generation(Model):
    """How the teacher is asked."""

    samples_per_prompt: int = Field(default=1, ge=1, le=64, description="Answers to each prompt; one at temperature 0.")
    temperature: float = Field(default=0.7, ge=0, le=2, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling.")
    max_tokens: int = Field(default=512, ge=1, le=131072, description="Longest answer, in tokens.")
    system_prompt: str | None = Field(
        default=None, max_length=16384, description="Put before each prompt, and trained on."
    )
    chain_of_thought: bool = Field(
        default=False,
        description="Ask the teacher to reason inside <think></think>; the student is trained on the answer after it.",
    )
    concurrency: int = Field(default=8, ge=1, le=1024, description="Requests in flight at most.")
    request_timeout_seconds: int = Field(default=120, ge=1, le=3600, description="Of one request.")
    min_success_ratio: float = Field(
        default=0.9, ge=0, le=1, description="Least share of prompts with an answer; below it the run fails."
    )
    max_total_tokens: int | None = Field(default=None, ge=1, description="Stop asking once the teacher wrote so many.")


class Filters(Model):
    """What is not trained on; every drop is counted in status.metrics as dropped_<filter>."""

    dedupe: bool = Field(default=True, description="Drop exact repeats of prompt and answer.")
    min_characters: int = Field(default=1, ge=0, description="Shortest answer.")
    max_characters: int | None = Field(default=None, ge=1, description="Longest answer.")
    drop_truncated: bool = Field(default=True, description="Drop answers that hit maxTokens.")
    valid_json: bool = Field(default=False, description="Drop answers that are not one JSON value.")
    json_schema: ConfigMapKeyRef | None = Field(
        default=None, description="Drop answers that do not fit this JSON Schema."
    )
    decontaminate: bool = Field(default=True, description="Drop prompts that occur in the evaluation set.")


class Prompts(Dataset):
    """A set of examples that need no answer."""


class DistillationData(Model):
    """The prompts, how the teacher answers them, what is kept."""

    prompts: Prompts = Field(description="Prompts; a wanted answer, if the set has one, is not shown to the teacher.")
    generation: Generation = Field(default=Generation(), description="How the teacher is asked.")
    filters: Filters = Field(default=Filters(), description="What is not trained on.")


class DistillationJobSpec(TrainedSpec):
    """Distil a teacher into a student."""

    model_config = cel(
        ("!has(self.training.earlyStopping) || has(self.evaluation)", "training.earlyStopping needs evaluation"),
    )

    teacher: Teacher = Field(description="The model that answers.")
    student: TrainableSource = Field(description="The model that learns; safetensors, a causal LM.")
    task_type: TaskType = Field(default="generation", description="Recorded in the artifact; chooses no defaults.")
    data: DistillationData = Field(description="Prompts, generation, filters.")
    training: Training = Field(default=Training(), description="How the student learns.")


class DistillationJobStatus(BatchStatus):
    """Status with the columns of this kind."""

    teacher: str | None = Field(default=None, max_length=1024, description="The model that answers, for the table.")


class DistillationJob(Model):
    """The kind."""

    spec: DistillationJobSpec
    status: DistillationJobStatus = DistillationJobStatus()
