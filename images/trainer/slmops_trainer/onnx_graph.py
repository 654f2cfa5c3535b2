"""What a built ONNX model really is: its graph is read, not believed, for builders ignore what they do not know."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from slmops.api.quantized import QuantizedModelSpec
from slmops_trainer.failure import RunFailure

GRAPH = "model.onnx"
QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")
ATTENTION = "GroupQueryAttention"
WINDOW = "local_window_size"  # its attribute: tokens that a token sees, itself among them; -1 for all
COSINES = 7  # its input
TABLES = ("cos_cache", "sin_cache", "_scales")  # of the rotary embedding, and of quantized weights: no weights
TOLERATED = 0.01  # share of values in another precision: some architectures keep their norms in fp32
ITEM_BYTES = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2}
NAMES = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the graph holds.

    operators     how often each operator occurs
    floats        elements of floating point weights by precision (fp32, fp16)
    largest       name and elements of the largest floating point matrix
    settings      (operator, bits, block size, accuracy level, has zero points) of each quantized node
    kv_precision  of the KV cache's tensors
    kv_bytes      of the KV cache for one token
    """

    operators: Counter[str]
    floats: Counter[str]
    largest: tuple[str, int]
    settings: frozenset[tuple[str, int, int, int, bool]]
    kv_precision: str
    kv_bytes: int


def read(folder: Path) -> Facts:
    """Read the graph in `folder` without its weights."""
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    floats: Counter[str] = Counter()
    largest = ("", 0)
    for tensor in graph.initializer:
        if tensor.data_type not in NAMES or any(part in tensor.name for part in TABLES):
            continue
        count = math.prod(tensor.dims)
        floats[NAMES[tensor.data_type]] += count
        if len(tensor.dims) > 1 and count > largest[1]:
            largest = (tensor.name, count)
    cache = [value.type.tensor_type for value in graph.input if value.name.startswith("past_key_values.")]
    kinds = {entry.elem_type for entry in cache}
    kind = next(iter(kinds), onnx.TensorProto.FLOAT)
    # [batch, kv heads, past length, head size]
    items = sum(entry.shape.dim[1].dim_value * entry.shape.dim[3].dim_value for entry in cache)
    return Facts(
        operators=Counter(node.op_type for node in graph.node),
        floats=floats,
        largest=largest,
        settings=frozenset(_setting(node) for node in graph.node if node.op_type in QUANTIZED),
        kv_precision=NAMES.get(kind, str(kind)),
        kv_bytes=items * ITEM_BYTES.get(kind, 4),
    )


def windows(config: Any) -> list[int]:
    """How many tokens each layer of a transformers model sees, -1 for all. Pure."""
    window, layers = getattr(config, "sliding_window", None) or -1, config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else -1 for kind in kinds]


def slide(folder: Path, wanted: list[int], source: str) -> None:
    """Give each layer of the graph in `folder` its window: the builder gives all the same, or the wrong half (Gemma 2).

    Raises RunFailure(UnsupportedModel) where layers differ in more than the window.
    """
    model = onnx.load(folder / GRAPH, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == ATTENTION]
    wrong = [node for node in nodes if _window(node) != wanted[_layer(node)]]
    if not wrong:
        return
    if len({node.input[COSINES] for node in nodes}) > 1:
        raise RunFailure(
            "UnsupportedModel",
            f"{source} looks through windows in other layers than its ONNX form would, whose rotary tables differ. Use "
            "another model.",
        )
    for node in wrong:
        others = [attribute for attribute in node.attribute if attribute.name != WINDOW]
        del node.attribute[:]
        node.attribute.extend([*others, onnx.helper.make_attribute(WINDOW, wanted[_layer(node)])])
    onnx.save(model, folder / GRAPH)


def _window(node: Any) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == WINDOW), -1)


def _layer(node: Any) -> int:
    found = re.search(r"layers\.(\d+)/", node.name)
    assert found is not None
    return int(found[1])


def check(facts: Facts, spec: QuantizedModelSpec, parameters: int) -> None:
    """Raise RunFailure(UnsupportedModel) if the graph is not what the spec asks for. `parameters`: of the source."""
    wrong = _not_int4(facts, spec, parameters) if spec.precision == "int4" else _not_float(facts, spec.precision)
    if wrong:
        raise RunFailure(
            "UnsupportedModel",
            f"Olive was asked for {spec.precision} and built something else: {wrong}. Use another precision for this "
            "architecture.",
        )


def weight_bytes(folder: Path) -> int:
    """Bytes of all files that hold weights: the graph and its external data."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith(GRAPH))


def _not_float(facts: Facts, precision: str) -> str:
    if facts.settings:
        return f"{len(facts.settings)} kinds of quantized nodes"
    others = {name: count for name, count in facts.floats.items() if name != precision}
    if sum(others.values()) > TOLERATED * facts.floats.total():
        return f"weights in {', '.join(f'{name} ({count} values)' for name, count in others.items())}"
    return "" if facts.floats else "no weights"


def _not_int4(facts: Facts, spec: QuantizedModelSpec, parameters: int) -> str:
    block = spec.block_size or 32
    level = 4 if spec.accuracy_level is None else spec.accuracy_level
    points = spec.symmetric is False
    if not facts.operators["MatMulNBits"]:
        return "no MatMulNBits node"
    for operator, bits, size, found, zero in sorted(facts.settings):
        if bits != 4 or size != block or zero != points or (operator == "MatMulNBits" and found != level):
            return f"a {operator} with bits {bits}, block size {size}, accuracy level {found}, zero points: {zero}"
    if facts.largest[1] > TOLERATED * parameters:
        return f"{facts.largest[0]} with {facts.largest[1]} values is not quantized"
    return ""


def _setting(node: Any) -> tuple[str, int, int, int, bool]:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    zero_points = len(node.input) > 3 and bool(node.input[3])
    return (
        node.op_type,
        attributes.get("bits", 4),
        attributes["block_size"],
        attributes.get("accuracy_level", 0),
        zero_points,
    )
