"""A decoder's ONNX graph, read at load, and changed: logits from a chosen position on, not for the whole prompt.

The output head is a large part of a small model with a large vocabulary, and its result for a prompt is a copy of the
vocabulary for each token, of which one row is needed. A new input `logits_from` (int64, [1]) says where to begin.

A file may hold weights too, so nothing is copied before the changed model is put together: a file is mapped, parts are
views of it, and weights are passed over without being read.
"""

import mmap
from pathlib import Path

from slmops_server.engines import protobuf

FROM = "logits_from"
HIDDEN = "slmops/hidden_from"
END, AXIS = "slmops/end", "slmops/axis"
HEADS = {"MatMul", "MatMulNBits"}
BEHIND_HEADS = {"Cast", "Mul", "Div", "Tanh"}  # scaled and capped logits
ROTARY = {"GroupQueryAttention": slice(7, 9), "RotaryEmbedding": slice(2, 4)}  # and which inputs are the tables

# field numbers of onnx.proto3
GRAPH = 7
NODE, INITIALIZER, INPUT = 1, 5, 11
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP, NODE_ATTRIBUTE = 1, 2, 3, 4, 5
ATTRIBUTE_TENSOR = 5
TENSOR_DIMS, TENSOR_INT64, TENSOR_NAME, TENSOR_RAW = 1, 7, 8, 9
INT64 = 7
INT64_BYTES = 8
BYTES = {1: 4, 10: 2, 16: 2}  # float, float16, bfloat16


def read(path: Path) -> memoryview:
    """The file as it lies on the disk. OSError when it cannot be read, ValueError when it is empty."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def logits_from(model: bytes | memoryview, logits: str) -> bytes | None:
    """The changed model, or None where its output head is not of a known form. ValueError when the file is damaged."""
    fields = list(protobuf.fields(memoryview(model)))
    graph = next((value for number, value, _ in fields if number == GRAPH and isinstance(value, memoryview)), None)
    if graph is None:
        return None
    parts = list(protobuf.fields(graph))
    nodes = {index: _node(value) for index, (number, value, _) in enumerate(parts) if number == NODE}
    made_by = {name: index for index, node in nodes.items() for name in node[NODE_OUTPUT]}
    at = made_by.get(logits)
    for _ in BEHIND_HEADS:  # at most one of each: a damaged graph may be a circle
        if at is not None and nodes[at][NODE_OP][0] in BEHIND_HEADS:
            at = made_by.get(nodes[at][NODE_INPUT][0])
    if at is None or nodes[at][NODE_OP][0] not in HEADS:
        return None
    hidden = nodes[at][NODE_INPUT][0]
    if hidden not in made_by:
        return None
    head = _renamed(parts[at][1], hidden)
    new: list[bytes | memoryview] = [head if index == at else raw for index, (_, _, raw) in enumerate(parts)]
    new += [protobuf.message(NODE, _slice(hidden)), protobuf.message(INPUT, _input())]
    new += [protobuf.message(INITIALIZER, _int64(END, (1 << 63) - 1)), protobuf.message(INITIALIZER, _int64(AXIS, 1))]
    whole: list[bytes | memoryview] = []
    for number, _, raw in fields:
        whole += [protobuf.head(GRAPH, sum(map(len, new))), *new] if number == GRAPH else [raw]
    return b"".join(whole)


def item_bytes(model: bytes | memoryview, name: str) -> int | None:
    """Bytes of one number of that input, None where the graph does not tell. ValueError when the file is damaged."""
    for value in protobuf.every(protobuf.every([memoryview(model)], GRAPH), INPUT):
        if any(bytes(found) == name.encode() for found in protobuf.every([value], 1)):
            for tensor in protobuf.every(protobuf.every([value], 2), 1):
                kind = next((part for number, part, _ in protobuf.fields(tensor) if number == 1), None)
                return BYTES.get(kind) if isinstance(kind, int) else None
    return None


def rotary_switch(model: bytes | memoryview) -> int | None:
    """Tokens beyond which a call takes other rotary tables for all that it computes. ValueError: the file is damaged.

    The builder's form of longrope (Phi-3.5, Phi-4-mini): If(Greater(length of the mask, constant)) before attention.
    None where the tables are always the same.
    """
    parts = list(protobuf.every([memoryview(model)], GRAPH))
    nodes = [(_node(value), value) for value in protobuf.every(parts, NODE)]
    made = {(node[NODE_OP][0], name): node[NODE_INPUT] for node, _ in nodes for name in node[NODE_OUTPUT]}
    tables = {name for node, _ in nodes if node[NODE_OP][0] in ROTARY for name in node[NODE_INPUT]}
    conditions = {made["If", name][0] for name in tables if ("If", name) in made}
    limits = {made["Greater", name][-1] for name in conditions if ("Greater", name) in made}
    constants = [
        *(
            (bytes(name).decode(), one)
            for one in protobuf.every(parts, INITIALIZER)
            for name in protobuf.every([one], TENSOR_NAME)
        ),
        *(
            (name, tensor)
            for node, value in nodes
            if node[NODE_OP][0] == "Constant"
            for name in node[NODE_OUTPUT]
            for tensor in protobuf.every(protobuf.every([value], NODE_ATTRIBUTE), ATTRIBUTE_TENSOR)
        ),
    ]
    values = [_whole_number(tensor) for name, tensor in constants if name in limits]
    return min((value for value in values if value > 0), default=None)


def rotary_positions(model: bytes | memoryview) -> int | None:
    """Tokens for which the rotary tables have numbers. None where they are no constants. ValueError as above."""
    parts = list(protobuf.every([memoryview(model)], GRAPH))
    nodes = [_node(value) for value in protobuf.every(parts, NODE)]
    tables = {name for node in nodes for name in node[NODE_INPUT][ROTARY.get(node[NODE_OP][0], slice(0))]}
    lengths = []
    for tensor in protobuf.every(parts, INITIALIZER):
        if any(bytes(name).decode() in tables for name in protobuf.every([tensor], TENSOR_NAME)):
            match [size for number, size, _ in protobuf.fields(tensor) if number == TENSOR_DIMS]:
                case [int(positions), _] if positions:
                    lengths.append(positions)
    return min(lengths, default=None)


def _whole_number(tensor: memoryview) -> int:
    """The number of a TensorProto that holds one int64, 0 of any other."""
    for number, value, _ in protobuf.fields(tensor):
        if number == TENSOR_RAW and isinstance(value, memoryview) and len(value) == INT64_BYTES:
            return int.from_bytes(value, "little", signed=True)
        if number == TENSOR_INT64:
            return value if isinstance(value, int) else protobuf.varint(value, 0)[0]
    return 0


def _slice(hidden: str) -> bytes:
    """Slice(hidden, logits_from, end, axis) -> hidden_from."""
    inputs = b"".join(protobuf.message(NODE_INPUT, name.encode()) for name in (hidden, FROM, END, AXIS))
    return (
        inputs
        + protobuf.message(NODE_OUTPUT, HIDDEN.encode())
        + protobuf.message(NODE_NAME, HIDDEN.encode())
        + protobuf.message(NODE_OP, b"Slice")
    )


def _int64(name: str, value: int) -> bytes:
    """TensorProto of shape [1]: dims = 1, data_type = 2, name = 8, raw_data = 9."""
    return (
        protobuf.number_field(1, 1)
        + protobuf.number_field(2, INT64)
        + protobuf.message(8, name.encode())
        + protobuf.message(9, value.to_bytes(8, "little"))
    )


def _input() -> bytes:
    """ValueInfoProto: name = 1, type = 2 {tensor_type = 1 {elem_type = 1, shape = 2 {dim = 1 {dim_value = 1}}}}."""
    tensor = protobuf.number_field(1, INT64) + protobuf.message(2, protobuf.message(1, protobuf.number_field(1, 1)))
    return protobuf.message(1, FROM.encode()) + protobuf.message(2, protobuf.message(1, tensor))


def _node(data: int | memoryview) -> dict[int, list[str]]:
    """A NodeProto's inputs, outputs, name and operator."""
    found: dict[int, list[str]] = {NODE_INPUT: [], NODE_OUTPUT: [], NODE_NAME: [], NODE_OP: []}
    assert isinstance(data, memoryview)
    for number, value, _ in protobuf.fields(data):
        if number in found and isinstance(value, memoryview):
            found[number].append(bytes(value).decode())
    for number in (NODE_INPUT, NODE_OP):  # constants have no inputs; damaged nodes may have no operator
        found[number] = found[number] or [""]
    return found


def _renamed(data: int | memoryview, hidden: str) -> bytes:
    """The head as a field of the graph, reading from the sliced states."""
    assert isinstance(data, memoryview)
    old, new = (protobuf.message(NODE_INPUT, name.encode()) for name in (hidden, HIDDEN))
    node = b"".join(
        new if number == NODE_INPUT and bytes(raw) == old else raw for number, _, raw in protobuf.fields(data)
    )
    return protobuf.message(NODE, node)
