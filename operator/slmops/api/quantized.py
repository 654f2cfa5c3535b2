"""QuantizedModel: ONNX conversion and quantization by Olive, behind a quality gate."""

from typing import Literal

from pydantic import Field

from slmops.api.base import Model
from slmops.api.batch import BatchSpec, Metric
from slmops.api.meta import BatchStatus, Dataset, TrainableSource, cel


class Gate(Model):
    """Compares the quantized model with its source on the same examples and fails the object when it lost too much."""

    dataset: Dataset = Field(description="Examples with wanted answers.")
    metric: Metric = Field(default="exactMatch", description="Compared metric.")
    max_drop: float = Field(
        default=0.02, ge=0, le=1, description="Greatest loss of the metric, absolute (perplexity: relative rise)."
    )
    max_tokens: int = Field(default=256, ge=1, le=8192, description="Longest answer, in tokens.")


class QuantizedModelSpec(BatchSpec):
    """Convert a model to ONNX at a precision."""

    model_config = cel(
        ("!has(self.blockSize) || self.precision == 'int4'", "blockSize goes with precision: int4"),
        ("!has(self.symmetric) || self.precision == 'int4'", "symmetric goes with precision: int4"),
        ("!has(self.accuracyLevel) || self.precision == 'int4'", "accuracyLevel goes with precision: int4"),
    )

    source: TrainableSource = Field(description="The model to convert; safetensors, a causal LM.")
    precision: Literal["int4", "fp16", "fp32"] = Field(default="int4", description="Of the weights.")
    block_size: Literal[16, 32, 64, 128, 256] | None = Field(
        default=None, description="Weights that share a scale; default 32."
    )
    symmetric: bool | None = Field(default=None, description="No zero points: smaller and faster; default true.")
    accuracy_level: Literal[0, 1, 2, 3, 4] | None = Field(
        default=None, description="MatMulNBits accuracy level: 4 computes in int8, 1 in fp32; default 4."
    )
    gate: Gate | None = Field(default=None, description="Quality gate; without it size and speed alone are reported.")


class QuantizedModelStatus(BatchStatus):
    """Status with the columns of this kind."""

    size: str | None = Field(default=None, max_length=32, description="Size and share of the source, for the table.")
    delta: str | None = Field(default=None, max_length=32, description="Change of the gate's metric, for the table.")


class QuantizedModel(Model):
    """The kind."""

    spec: QuantizedModelSpec
    status: QuantizedModelStatus = QuantizedModelStatus()
