"""FineTuneJob: full or LoRA fine-tuning of a causal language model."""

from typing import Annotated, Literal

from pydantic import Field

from slmops.api.base import Model
from slmops.api.batch import TrainedSpec, Training
from slmops.api.meta import BatchStatus, Dataset, TrainableSource, cel


class Lora(Model):
    """LoRA (Hu et al. 2021), by peft."""

    r: int = Field(default=16, ge=1, le=1024, description="Rank.")
    alpha: int = Field(default=32, ge=1, le=4096, description="Scale: alpha / r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[Annotated[str, Field(min_length=1, max_length=128)]] | None = Field(
        default=None, min_length=1, max_length=64, description="Module names; default: all linear layers but the head."
    )


class FineTuneJobSpec(TrainedSpec):
    """Fine-tune a base model on a dataset."""

    model_config = cel(
        ("!has(self.lora) || self.method == 'lora'", "lora goes with method: lora"),
        ("!has(self.merge) || self.method == 'lora'", "merge goes with method: lora"),
        ("!has(self.training.earlyStopping) || has(self.evaluation)", "training.earlyStopping needs evaluation"),
    )

    base: TrainableSource = Field(description="The model to tune; safetensors, a causal LM.")
    method: Literal["full", "lora"] = Field(default="lora", description="full: all weights; lora: low-rank adapters.")
    lora: Lora | None = Field(default=None, description="With method: lora.")
    merge: bool | None = Field(
        default=None, description="With method: lora: write the merged model (default true) or the adapter alone."
    )
    dataset: Dataset = Field(description="Training examples.")
    loss_on: Literal["assistant", "all"] = Field(
        default="assistant",
        description="assistant: the answers' tokens alone (every assistant turn, or the completion); all: every token.",
    )
    training: Training = Field(default=Training(), description="How it learns.")


class FineTuneJob(Model):
    """The kind."""

    spec: FineTuneJobSpec
    status: BatchStatus = BatchStatus()
