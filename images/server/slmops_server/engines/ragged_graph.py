"""A decoder's ONNX graph, changed to the operators of images/server/kernels, in which rows need not be of one length.

The tokens of a call lie one behind the other, [1, tokens], whatever rows of the cache they belong to: all operators but
attention take each token by itself, and attention is told by a new input `calls` (int64, [sequences, 3]: row, tokens
in it before, tokens of this call). `logits_at` (int64, [n]) are the tokens whose logits are wanted. The caches are
inputs that are written in place; the mask is gone.
"""

import struct
from collections.abc import Iterable, Mapping

from slmops_server.engines import graph, protobuf
from slmops_server.engines.graph import INITIALIZER, INPUT, NODE, NODE_ATTRIBUTE, TENSOR_NAME, Node
from slmops_server.model_folder import ModelFolder

CALLS, AT = "slmops/calls", "slmops/logits_at"
WORDS_OF_CALL = 3
HIDDEN = "slmops/hidden_at"
DOMAIN = b"slmops"
OPSET, OUTPUT = 8, 12  # field numbers of onnx.proto3, beside those of graph.py
ATTRIBUTE_NAME, ATTRIBUTE_FLOAT, ATTRIBUTE_INT, ATTRIBUTE_TEXT, ATTRIBUTE_TYPE = 1, 2, 3, 4, 20
TENSOR_TYPE, FLOAT, BYTE, A_FLOAT, AN_INT, FLOAT_BYTES = 2, 1, 2, 1, 2, 4
LANES, LARGEST_HEAD = 16, 512  # of kernels/attention.h
ACCURACY = 4  # activations rounded to 8 bits
PRODUCT_INPUTS, ATTENTION_INPUTS = 4, 9  # what is behind them is empty, or the node is of another kind
# These take each token by itself, or numbers that belong to no token.
ALONE = {
    *("Add", "Cast", "Concat", "Constant", "Div", "FastGelu", "Gather", "GatherBlockQuantized", "Gelu", "Identity"),
    *("LayerNormalization", "MatMul", "Mul", "Neg", "Pow", "QuickGelu", "ReduceMean", "Relu", "Reshape"),
    *("RotaryEmbedding", "Shape", "Sigmoid", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
    *("SkipSimplifiedLayerNormalization", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Unsqueeze"),
}


class UnsuitedError(Exception):
    """The graph is of another form; the message says of which."""


def ragged(model: bytes | memoryview, folder: ModelFolder) -> bytes:
    """The changed model. UnsuitedError where it would not compute the same; ValueError when the file is damaged."""
    fields = list(protobuf.fields(memoryview(model)))
    parts = graph.parts_of(fields)
    if not parts:
        raise UnsuitedError("it has no graph")
    tensors = (value for number, value, _ in parts if number == INITIALIZER and isinstance(value, memoryview))
    constants = dict(_constants(tensors))
    made = graph.made_by(parts)
    logits = folder.outputs["logits"]
    head = graph.head(made, logits)
    if head is None:
        raise UnsuitedError(f"its output head is {made[logits].op if logits in made else 'missing'}")
    nodes, needed, caches = [], {logits}, []
    for node in _before(made, logits):
        inputs, new = _changed(node, head, folder, constants)
        nodes.append(new)
        needed |= {*inputs}
        caches += inputs[3:5] if node.op == "GroupQueryAttention" else []
    if sorted(caches) != sorted(folder.cache_inputs):
        raise UnsuitedError("its attention does not read each layer's cache as it comes")
    mask = folder.inputs["attention_mask"]
    if mask in needed:
        raise UnsuitedError("more than its attention reads the mask")
    kept = [raw for number, value, raw in parts if number != NODE and not _is_gone(number, value, needed, logits)]
    opset = protobuf.message(OPSET, protobuf.message(1, DOMAIN) + protobuf.number_field(2, 1))
    gather = graph.new_node("Gather", [head.inputs[0], AT], [HIDDEN], HIDDEN, attributes=_attributes({"axis": 1}))
    told = [graph.int64_input(CALLS, (-1, WORDS_OF_CALL)), graph.int64_input(AT, (-1,))]
    return opset + graph.whole(fields, [*kept, *nodes, gather, *told])


def _is_gone(number: int, value: int | memoryview, needed: set[str], logits: str) -> bool:
    """Inputs that nothing reads any more, and all outputs but the logits; constants without a reader do no harm."""
    if number not in (INPUT, OUTPUT) or not isinstance(value, memoryview):
        return False
    name = bytes(next(protobuf.every([value], 1), b"")).decode()
    return name not in needed if number == INPUT else name != logits


def _before(made: Mapping[str, Node], logits: str) -> list[Node]:
    """The nodes that the logits are made by; of attention's mask nothing is read any more."""
    found: dict[int, Node] = {}
    waiting = [logits]
    while waiting:
        node = made.get(waiting.pop())
        if node is not None and id(node) not in found:
            found[id(node)] = node
            read = node.inputs if node.op != "GroupQueryAttention" else [*node.inputs[:5], *node.inputs[7:]]
            waiting += read
    return list(found.values())


def _changed(node: Node, head: Node, folder: ModelFolder, constants: Mapping[str, int]) -> tuple[list[str], bytes]:
    """What the node reads, and itself as a field of the graph."""
    inputs = [HIDDEN, *node.inputs[1:]] if node is head else node.inputs
    if node.op == "MatMulNBits":
        return inputs, _product(node, inputs, constants)
    if node.op == "GroupQueryAttention":
        inputs, told = _attention(node, folder, constants)
        return inputs, _new(node, "RowAttention", inputs, told)
    if node.op not in ALONE:
        raise UnsuitedError(f"it has the operator {node.op}")
    return inputs, graph.message_of(node, inputs) if node is head else protobuf.message(NODE, bytes(node.body))


def _product(node: Node, inputs: list[str], constants: Mapping[str, int]) -> bytes:
    told = _told(node)
    sizes = {name: _whole(told, name) for name in ("K", "N", "block_size")}
    if told.pop("bits", 4) != 4 or sizes["block_size"] % LANES or sizes["block_size"] < LANES:
        raise UnsuitedError("its weights are not of 4 bits in blocks of a multiple of 16")
    if told.pop("accuracy_level", 0) != ACCURACY:
        raise UnsuitedError("its products do not ask for accuracy level 4")
    if any(inputs[PRODUCT_INPUTS:]) or len(inputs) < PRODUCT_INPUTS - 1 or not _neutral(told):
        raise UnsuitedError("its products have an order of their own or a bias")
    zeros = [name for name in inputs[PRODUCT_INPUTS - 1 : PRODUCT_INPUTS] if name]
    if constants.get(inputs[2]) != FLOAT or any(constants.get(name) != BYTE for name in zeros):
        raise UnsuitedError("its products are not of float32, or their zero points not of 4 bits")
    return _new(node, "Int4MatMul", [*inputs[: PRODUCT_INPUTS - 1], *zeros], {**sizes, "zero_points": len(zeros)})


def _attention(
    node: Node, folder: ModelFolder, constants: Mapping[str, int]
) -> tuple[list[str], dict[str, int | float]]:
    """Inputs and attributes of a RowAttention in place of a GroupQueryAttention."""
    told, size = _told(node), folder.head_size
    if size % LANES or size > LARGEST_HEAD:
        raise UnsuitedError(f"its heads have {size} numbers")
    numbers: dict[str, int | float] = {name: _whole(told, name) for name in ("num_heads", "kv_num_heads")}
    numbers["local_window_size"] = _whole(told, "local_window_size", -1)
    scale = told.pop("scale", 0.0)
    turned = told.pop("do_rotary", 0)
    tables = node.inputs[7:ATTENTION_INPUTS] if turned else []
    plain = len(node.inputs) >= ATTENTION_INPUTS - 2 and not any(node.inputs[ATTENTION_INPUTS:]) and _neutral(told)
    if not plain or not numbers["local_window_size"]:
        raise UnsuitedError("its attention is more than a plain one")
    if any(constants.get(name) != FLOAT for name in tables) or (turned and not tables):
        raise UnsuitedError("its rotary tables are missing, change with the length, or are not of float32")
    numbers["scale"] = scale if isinstance(scale, float) and scale else size**-0.5
    return [*node.inputs[:5], CALLS, *tables], numbers


def _whole(attributes: dict[str, int | float | bytes], name: str, default: int = 0) -> int:
    """An attribute that has to be a whole number, taken out."""
    value = attributes.pop(name, default)
    if not isinstance(value, int):
        raise UnsuitedError(f"{name} is no whole number")
    return value


def _neutral(attributes: Mapping[str, int | float | bytes]) -> bool:
    """Whether attributes that are not known here ask for nothing: 0, -1 and NONE are onnxruntime's words for that."""
    return all(value in (0, -1, 0.0, b"", b"NONE") for value in attributes.values())


def _new(node: Node, op: str, inputs: list[str], numbers: Mapping[str, int | float]) -> bytes:
    return graph.new_node(op, inputs, node.outputs[:1], node.name, DOMAIN, _attributes(numbers))


def _attributes(numbers: Mapping[str, int | float]) -> bytes:
    return b"".join(protobuf.message(NODE_ATTRIBUTE, _attribute(name, value)) for name, value in numbers.items())


def _attribute(name: str, value: int | float) -> bytes:
    begin = protobuf.message(ATTRIBUTE_NAME, name.encode())
    if isinstance(value, float):
        number = protobuf.encoded(ATTRIBUTE_FLOAT << 3 | 5) + struct.pack("<f", value)
        return begin + number + protobuf.number_field(ATTRIBUTE_TYPE, A_FLOAT)
    number = protobuf.number_field(ATTRIBUTE_INT, value & (1 << 64) - 1)
    return begin + number + protobuf.number_field(ATTRIBUTE_TYPE, AN_INT)


def _constants(tensors: Iterable[memoryview]) -> Iterable[tuple[str, int]]:
    """Names and types of TensorProtos."""
    for tensor in tensors:
        name = next(protobuf.every([tensor], TENSOR_NAME), memoryview(b""))
        kind = next((value for number, value, _ in protobuf.fields(tensor) if number == TENSOR_TYPE), 0)
        yield bytes(name).decode(), kind if isinstance(kind, int) else 0


def _told(node: Node) -> dict[str, int | float | bytes]:
    """The node's attributes."""
    return dict(_value(attribute) for attribute in protobuf.every([node.body], NODE_ATTRIBUTE))


def _value(attribute: memoryview) -> tuple[str, int | float | bytes]:
    """Name and value of an AttributeProto; of other kinds than numbers and texts what nobody takes for neutral."""
    name, value = "", b"another kind"
    found: int | float | bytes | None = None
    for number, part, _ in protobuf.fields(attribute):
        if number == ATTRIBUTE_NAME and isinstance(part, memoryview):
            name = bytes(part).decode()
        elif number == ATTRIBUTE_INT and isinstance(part, int):
            found = part - (1 << 64) if part >> 63 else part
        elif number == ATTRIBUTE_FLOAT and isinstance(part, memoryview) and len(part) == FLOAT_BYTES:
            found = float(struct.unpack("<f", part)[0])
        elif number == ATTRIBUTE_TEXT and isinstance(part, memoryview):
            found = bytes(part)
    return name, value if found is None else found
