"""Which models the ONNX builder writes so that they run and compute what transformers does: told by config.json."""

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from slmops_trainer.failure import RunFailure

BUILDER = "onnxruntime_genai.models.builder"
# What it has a branch for, and gets wrong.
UNFAITHFUL = {
    "OlmoForCausalLM": "its norms subtract the mean, and those of its ONNX form would not",
    "SmolLM3ForCausalLM": "some of its layers rotate nothing, which the builder cannot write",
}
HEAD_MULTIPLE = 16  # of onnxruntime's GroupQueryAttention with rotary embeddings on CPUs
# "su" is an older name of longrope; dynamic changes nothing within the model's context.
SCALINGS = ("default", "linear", "llama3", "longrope", "su", "dynamic")
OTHERWISE = "Use another model, or serve it in another form (IR or GGUF, see docs/serving.md)."


@cache
def architectures() -> frozenset[str]:
    """Those that the builder has a branch for, from its text: importing it takes seconds, and it keeps no list."""
    spec = importlib.util.find_spec(BUILDER)
    assert spec is not None
    assert spec.origin is not None
    return frozenset(re.findall(r'architectures\[0\] == "(\w+)"', Path(spec.origin).read_text(encoding="utf-8")))


def refuse(config: Mapping[str, Any], source: str) -> None:
    """Raise RunFailure(UnsupportedModel) for what does not convert, does not run, or computes something else."""
    name = config["architectures"][0]
    if name not in architectures() or name in UNFAITHFUL:
        why = UNFAITHFUL.get(name, "the builder does not know it")
        raise RunFailure("UnsupportedModel", f"{source} is a {name}, which has no ONNX form: {why}. {OTHERWISE}")
    _refuse_positions(config, source)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not heads or not hidden:
        return
    size = config.get("head_dim") or hidden // heads
    groups = config.get("num_key_value_heads") or heads
    if size % HEAD_MULTIPLE or heads % groups:
        what = f"heads of {size} values" if size % HEAD_MULTIPLE else f"{heads} heads over {groups} key-value heads"
        raise RunFailure(
            "UnsupportedModel",
            f"{source} has {what}: onnxruntime computes heads of a multiple of {HEAD_MULTIPLE} values, in groups of "
            "equal size. Use another model, or train it with such a shape.",
        )


def _refuse_positions(config: Mapping[str, Any], source: str) -> None:
    """The builder leaves out a scaling that it does not know, and scales all layers of a Gemma 3, not every sixth."""
    scaling = config.get("rope_scaling")
    kind = (scaling.get("rope_type") or scaling.get("type") or "default") if isinstance(scaling, dict) else "default"
    if kind not in SCALINGS:
        raise RunFailure(
            "UnsupportedModel",
            f"{source} scales its positions by {kind}, which its ONNX form cannot have faithfully. Take rope_scaling "
            "out of its config.json, and let max_position_embeddings be the context that it was trained with.",
        )
    if config["architectures"][0] == "Gemma3ForCausalLM" and kind != "default":
        raise RunFailure(
            "UnsupportedModel",
            f"{source} scales the positions ({kind}) of the layers that see all of a text, and its ONNX form would "
            "scale those of all layers. Use another model (Gemma 3 270M and 1B scale none).",
        )
