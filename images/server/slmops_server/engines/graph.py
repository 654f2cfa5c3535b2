"""A decoder's ONNX graph, read at load, and changed: logits from a chosen position on, not for the whole prompt.

The output head is a large part of a small model with a large vocabulary, and its result for a prompt is a copy of the
vocabulary for each token, of which one row is needed. A new input `logits_from` (int64, [1]) says where to begin.

A file may hold weights too, so nothing is copied before the changed model is put together: a file is mapped, parts are
views of it, and weights are passed over without being read.
"""

import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_TENSOR = 5
TENSOR_DIMS, TENSOR_INT64, TENSOR_NAME, TENSOR_RAW = 1, 7, 8, 9
INT64 = 7
INT64_BYTES = 8
BYTES = {1: 4, 10: 2, 16: 2}  # float, float16, bfloat16

Field = tuple[int, int | memoryview, memoryview]  # as protobuf.fields has them


@dataclass(frozen=True)
class Node:
    """A NodeProto's body, inputs, outputs, name and operator. A damaged one may have no operator."""

    body: memoryview
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.texts.get(NODE_OP, "")

    @property
    def name(self) -> str:
        """The node's own name."""
        return self.texts.get(NODE_NAME, "")


def read(path: Path) -> memoryview:
    """The file as it lies on the disk. OSError when it cannot be read, ValueError when it is empty."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def logits_from(model: bytes | memoryview, logits: str) -> bytes | None:
    """The changed model, or None where its output head is not of a known form. ValueError when the file is damaged."""
    fields = list(protobuf.fields(memoryview(model)))
    parts = parts_of(fields)
    found = head(made_by(parts), logits)
    if found is None:
        return None
    hidden = found.inputs[0]
    new = message_of(found, [HIDDEN if name == hidden else name for name in found.inputs])
    return whole(
        fields,
        [
            *(new if value is found.body else raw for _, value, raw in parts),
            new_node("Slice", [hidden, FROM, END, AXIS], [HIDDEN], HIDDEN),
            int64_input(FROM, (1,)),
            protobuf.message(INITIALIZER, _int64(END, (1 << 63) - 1)),
            protobuf.message(INITIALIZER, _int64(AXIS, 1)),
        ],
    )


def parts_of(model: Iterable[Field]) -> list[Field]:
    """The fields of a model's graph, none where it has no graph."""
    graph = next((value for number, value, _ in model if number == GRAPH and isinstance(value, memoryview)), None)
    return [] if graph is None else list(protobuf.fields(graph))


def whole(model: Iterable[Field], parts: Sequence[bytes | memoryview]) -> bytes:
    """The model with these fields for its graph's."""
    out: list[bytes | memoryview] = []
    for number, _, raw in model:
        out += [protobuf.head(GRAPH, sum(map(len, parts))), *parts] if number == GRAPH else [raw]
    return b"".join(out)


def made_by(parts: Iterable[Field]) -> dict[str, Node]:
    """The node that makes each value."""
    nodes = (node(value) for number, value, _ in parts if number == NODE and isinstance(value, memoryview))
    return {name: one for one in nodes for name in one.outputs if name}


def head(made: Mapping[str, Node], logits: str) -> Node | None:
    """The product that makes the logits, of states that a node makes; None where they are made in another way."""
    found = made.get(logits)
    for _ in BEHIND_HEADS:  # at most one of each: a damaged graph may be a circle
        if found is not None and found.op in BEHIND_HEADS:
            found = made.get(found.inputs[0])
    return found if found is not None and found.op in HEADS and found.inputs[0] in made else None


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
    nodes = [node(value) for value in protobuf.every(parts, NODE)]
    made = {(one.op, name): one.inputs for one in nodes for name in one.outputs}
    tables = {name for one in nodes if one.op in ROTARY for name in one.inputs}
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
            for one in nodes
            if one.op == "Constant"
            for name in one.outputs
            for tensor in protobuf.every(protobuf.every([one.body], NODE_ATTRIBUTE), ATTRIBUTE_TENSOR)
        ),
    ]
    values = [_whole_number(tensor) for name, tensor in constants if name in limits]
    return min((value for value in values if value > 0), default=None)


def rotary_positions(model: bytes | memoryview) -> int | None:
    """Tokens for which the rotary tables have numbers. None where they are no constants. ValueError as above."""
    parts = list(protobuf.every([memoryview(model)], GRAPH))
    nodes = [node(value) for value in protobuf.every(parts, NODE)]
    tables = {name for one in nodes for name in one.inputs[ROTARY.get(one.op, slice(0))]}
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


def _int64(name: str, value: int) -> bytes:
    """TensorProto of shape [1]: dims = 1, data_type = 2, name = 8, raw_data = 9."""
    return (
        protobuf.number_field(1, 1)
        + protobuf.number_field(2, INT64)
        + protobuf.message(8, name.encode())
        + protobuf.message(9, value.to_bytes(8, "little"))
    )


def int64_input(name: str, shape: Iterable[int]) -> bytes:
    """An input of the graph, -1 for any number.

    ValueInfoProto: name = 1, type = 2 {tensor_type = 1 {elem_type = 1, shape = 2 {dim = 1 {dim_value = 1}}}}.
    """
    axes = (protobuf.message(1, protobuf.number_field(1, size) if size >= 0 else b"") for size in shape)
    tensor = protobuf.number_field(1, INT64) + protobuf.message(2, b"".join(axes))
    kind = protobuf.message(2, protobuf.message(1, tensor))
    return protobuf.message(INPUT, protobuf.message(1, name.encode()) + kind)


def node(body: memoryview) -> Node:
    """A NodeProto. ValueError when it is damaged."""
    found = Node(body)
    for number, value, _ in protobuf.fields(body):
        if not isinstance(value, memoryview):
            continue
        if number in (NODE_INPUT, NODE_OUTPUT):
            (found.inputs if number == NODE_INPUT else found.outputs).append(bytes(value).decode())
        elif number in (NODE_NAME, NODE_OP):
            found.texts[number] = bytes(value).decode()
    if not found.inputs:  # constants have none
        found.inputs.append("")
    return found


def message_of(of: Node, inputs: Iterable[str]) -> bytes:
    """The node as a field of the graph, with other inputs."""
    rest = b"".join(raw for number, _, raw in protobuf.fields(of.body) if number != NODE_INPUT)
    return protobuf.message(NODE, _texts(NODE_INPUT, inputs) + rest)


def new_node(
    op: str, inputs: Iterable[str], outputs: Iterable[str], name: str, domain: bytes = b"", attributes: bytes = b""
) -> bytes:
    """A node as a field of the graph; `attributes` as fields of it."""
    named = protobuf.message(NODE_NAME, name.encode()) + protobuf.message(NODE_OP, op.encode())
    ends = _texts(NODE_INPUT, inputs) + _texts(NODE_OUTPUT, outputs)
    return protobuf.message(NODE, ends + named + attributes + protobuf.message(NODE_DOMAIN, domain))


def _texts(number: int, texts: Iterable[str]) -> bytes:
    return b"".join(protobuf.message(number, text.encode()) for text in texts)
