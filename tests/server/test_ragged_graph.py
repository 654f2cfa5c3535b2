"""The graph with the server's own operators: what it computes, what is left to onnxruntime's, and damaged files."""

import contextlib
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slmops_server import model_folder
from slmops_server.engines import graph, kernels, ort, protobuf, ragged_graph
from slmops_server.engines.ragged import RaggedForward
from slmops_server.engines.ragged_graph import UnsuitedError
from slmops_server.model_folder import ModelFolder

TOKENS = [5, 300, 41, 17, 99, 256, 3, 77]
needs_kernels = pytest.mark.skipif(not kernels.library(), reason="this CPU has not what the operators need")


@pytest.fixture
def folder(tiny: Path) -> ModelFolder:
    return model_folder.read(tiny)


def forward(folder: ModelFolder) -> RaggedForward:
    model = ragged_graph.ragged(graph.read(folder.graph), folder)
    return RaggedForward(folder, ort._session(folder, model, 1, kernels.library()), 4, 60, 32)


@needs_kernels
def test_the_logits_are_near_those_of_onnxruntimes_own_operators(folder: ModelFolder) -> None:
    """Near: both round activations to 8 bits, and sum in different orders."""
    own, theirs = forward(folder), ort.OrtForward(folder, ort._session(folder, ort._model(folder), 1), 2, 64, 32)
    before = theirs.score(0, TOKENS, 0).copy()
    np.testing.assert_allclose(own.score(3, TOKENS, 0), before, atol=0.02 * float(np.abs(before).max()))


@needs_kernels
def test_calls_hold_any_rows_and_chunks_beside_each_other(folder: ModelFolder) -> None:
    own = forward(folder)
    alone = [own.score(row, [row + 5, *TOKENS], 0).copy() for row in range(4)]
    own.prefill(2, [7, *TOKENS[:5]], 0)
    own.prefill(0, [5], 0)
    own.prefill(3, [8, *TOKENS[:7]], 0)
    logits = own.compute([2, 3, 0], [TOKENS[5:], [TOKENS[7]], [TOKENS[0]]], [6, 8, 1], [2, 3, 4])
    for got, wanted in zip(logits, (alone[2][8], alone[3][8], alone[0][1]), strict=True):
        np.testing.assert_array_equal(got, wanted)
    again = own.compute([3], [[11]], [9], [0])[0].copy()
    np.testing.assert_array_equal(own.compute([1, 3], [[4, 6], [11]], [9, 9], [0, 1, 2])[2], again)


@needs_kernels
def test_a_row_becomes_the_beginning_of_another(folder: ModelFolder) -> None:
    own = forward(folder)
    prompt = [(7 * at + 3) % 509 for at in range(50)]
    whole = own.prefill(0, prompt, 0).copy()
    own.copy(0, 2, 35)
    np.testing.assert_array_equal(own.prefill(2, prompt[35:], 35), whole)


@needs_kernels
def test_a_call_beyond_a_rows_end_fails_instead_of_writing_there(folder: ModelFolder) -> None:
    own = forward(folder)  # 60 tokens, of which 64 are kept
    with pytest.raises(Exception, match="RowAttention: calls"):
        own.prefill(0, TOKENS, 57)
    with pytest.raises(Exception, match="RowAttention: calls"):
        own.compute([5], [[3]], [0], [0])


Change = Callable[[memoryview], bytes]


def changed(model: bytes, op: str, change: Change) -> bytes:
    """The model with the first node of that operator changed; `change` gets the NodeProto and gives a new one."""
    out, done = b"", False
    for number, value, raw in protobuf.fields(memoryview(model)):
        if number != graph.GRAPH or not isinstance(value, memoryview):
            out += bytes(raw)
            continue
        body = b""
        for part, node, field in protobuf.fields(value):
            ops = [bytes(name) for name in protobuf.every([node], graph.NODE_OP)] if part == graph.NODE else []  # type: ignore[list-item]
            if ops == [op.encode()] and not done:
                body, done = body + protobuf.message(graph.NODE, change(node)), True  # type: ignore[arg-type]
            else:
                body += bytes(field)
        out += protobuf.message(graph.GRAPH, body)
    assert done
    return out


def number(name: str, value: float) -> Change:
    """The node with another value of an attribute."""

    def change(node: memoryview) -> bytes:
        kept = b"".join(
            bytes(raw)
            for part, value, raw in protobuf.fields(node)
            if part != graph.NODE_ATTRIBUTE or not bytes(value).startswith(protobuf.message(1, name.encode()))  # type: ignore[arg-type]
        )
        return kept + protobuf.message(graph.NODE_ATTRIBUTE, ragged_graph._attribute(name, value))

    return change


def more_inputs(*names: str) -> Change:
    """The node with these inputs in place of its empty ones at the end, or behind all."""

    def change(node: memoryview) -> bytes:
        inputs = [bytes(name) for name in protobuf.every([node], graph.NODE_INPUT)]
        while inputs and not inputs[-1]:
            inputs.pop()
        rest = b"".join(bytes(raw) for part, _, raw in protobuf.fields(node) if part != graph.NODE_INPUT)
        new = [*inputs, *(name.encode() for name in names)]
        return b"".join(protobuf.message(graph.NODE_INPUT, name) for name in new) + rest

    return change


def inputs(*names: str) -> Change:
    def change(node: memoryview) -> bytes:
        rest = b"".join(bytes(raw) for part, _, raw in protobuf.fields(node) if part != graph.NODE_INPUT)
        return b"".join(protobuf.message(graph.NODE_INPUT, name.encode()) for name in names) + rest

    return change


def operator(name: str) -> Change:
    def change(node: memoryview) -> bytes:
        rest = b"".join(bytes(raw) for part, _, raw in protobuf.fields(node) if part != graph.NODE_OP)
        return rest + protobuf.message(graph.NODE_OP, name.encode())

    return change


def first_node(model: bytes, op: str) -> graph.Node:
    parts = protobuf.every([memoryview(model)], graph.GRAPH)
    return next(node for node in map(graph.node, protobuf.every(parts, graph.NODE)) if node.op == op)


@pytest.mark.parametrize(
    ("op", "change", "why"),
    [
        ("MatMulNBits", number("bits", 8), "not of 4 bits"),
        ("MatMulNBits", number("block_size", 24), "blocks of a multiple of 16"),
        ("MatMulNBits", number("accuracy_level", 1), "accuracy level 4"),
        ("MatMulNBits", more_inputs("zeros"), "zero points not of 4 bits"),
        ("MatMulNBits", more_inputs("", "order"), "an order of their own or a bias"),
        ("MatMulNBits", number("something_new", 3), "an order of their own or a bias"),
        ("MatMulNBits", number("K", 3.0), "K is no whole number"),
        ("GroupQueryAttention", number("softcap", 30.0), "more than a plain one"),
        ("GroupQueryAttention", number("rotary_interleaved", 1), "more than a plain one"),
        ("GroupQueryAttention", number("smooth_softmax", 1), "more than a plain one"),
        ("GroupQueryAttention", number("local_window_size", 0), "more than a plain one"),
        ("GroupQueryAttention", more_inputs("positions"), "more than a plain one"),
        ("SkipSimplifiedLayerNormalization", operator("DynamicQuantizeLinear"), "the operator DynamicQuantizeLinear"),
        ("MatMulNBits", inputs("attention_mask", "b", "model.layers.0.input_layernorm.weight"), "reads the mask"),
    ],
)
def test_other_graphs_are_left_to_onnxruntimes_own_operators(
    folder: ModelFolder, op: str, change: Change, why: str
) -> None:
    model = folder.graph.read_bytes()
    with pytest.raises(UnsuitedError, match=why):
        ragged_graph.ragged(changed(model, op, change), folder)


@needs_kernels
def test_zero_points_that_are_all_in_the_middle_change_nothing(folder: ModelFolder, tmp_path: Path) -> None:
    model = changed(folder.graph.read_bytes(), "MatMulNBits", more_inputs("zeros"))
    node = first_node(model, "MatMulNBits")
    sizes = {name: int(value) for name, value in ragged_graph._told(node).items()}
    count = sizes["N"] * -(-sizes["K"] // sizes["block_size"] // 2)
    tensor = protobuf.number_field(1, count) + protobuf.number_field(2, 2)
    tensor += protobuf.message(8, b"zeros") + protobuf.message(9, b"\x88" * count)
    shutil.copytree(folder.path, tmp_path, dirs_exist_ok=True)
    with_zeros = replace(folder, path=tmp_path, graph=tmp_path / folder.graph.name)
    whole = b"".join(bytes(part) for part in protobuf.every([memoryview(model)], graph.GRAPH))
    whole += protobuf.message(graph.INITIALIZER, tensor)
    rest = b"".join(bytes(raw) for part, _, raw in protobuf.fields(memoryview(model)) if part != graph.GRAPH)
    with_zeros.graph.write_bytes(rest + protobuf.message(graph.GRAPH, whole))
    np.testing.assert_array_equal(forward(with_zeros).prefill(0, TOKENS, 0), forward(folder).prefill(0, TOKENS, 0))


@pytest.mark.parametrize("cache", ["past_key_values.1.key", "past_key_values.0.value", "made"])
def test_caches_that_attention_does_not_read_as_they_come_are_left_alone(folder: ModelFolder, cache: str) -> None:
    """What is written into a copy of a cache, or into one that others use, is lost."""
    model = folder.graph.read_bytes()
    given = list(first_node(model, "GroupQueryAttention").inputs)
    given[3] = cache
    with pytest.raises(UnsuitedError, match="each layer's cache"):
        ragged_graph.ragged(changed(model, "GroupQueryAttention", inputs(*given)), folder)


@needs_kernels
@pytest.mark.parametrize("when", ["loaded", "run"])
def test_what_fails_with_the_own_operators_is_computed_by_onnxruntimes(
    tiny: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "model")
    if when == "loaded":  # a name that the changed graph uses is taken
        weight = protobuf.number_field(1, 0) + protobuf.number_field(2, 1)
        taken = protobuf.message(graph.INITIALIZER, weight + protobuf.message(8, ragged_graph.HIDDEN.encode()))
        fields = list(protobuf.fields(memoryview((copy / "model.onnx").read_bytes())))
        new = [
            protobuf.message(number, bytes(value) + taken)
            if isinstance(value, memoryview) and number == graph.GRAPH
            else raw
            for number, value, raw in fields
        ]
        (copy / "model.onnx").write_bytes(b"".join(new))
    else:

        def refuse(*_: object) -> None:
            raise RuntimeError("Error in execution: slmops/hidden_at\nand more")

        monkeypatch.setattr(RaggedForward, "prefill", refuse)
    forward, _, notes = ort.load(model_folder.read(copy), 2, 60, 32, 1, 1)
    assert isinstance(forward, ort.OrtForward)
    assert "slmops/hidden_at" in notes["without_kernels"]
    assert "\n" not in notes["without_kernels"]


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("MatMulNBits", number("something_old", 0)),
        ("MatMulNBits", more_inputs("", "")),
        ("GroupQueryAttention", number("softcap", 0.0)),
        ("GroupQueryAttention", number("local_window_size", 64)),
        ("GroupQueryAttention", more_inputs("", "", "")),
    ],
)
def test_what_asks_for_nothing_and_windows_are_taken(folder: ModelFolder, op: str, change: Change) -> None:
    model = folder.graph.read_bytes()
    assert ragged_graph.ragged(changed(model, op, change), folder)


def test_rotary_tables_that_are_no_constants_or_missing_are_left_alone(folder: ModelFolder) -> None:
    model = folder.graph.read_bytes()
    *before, _, _ = first_node(model, "GroupQueryAttention").inputs[:9]
    with pytest.raises(UnsuitedError, match="rotary tables"):
        ragged_graph.ragged(changed(model, "GroupQueryAttention", inputs(*before, "made", "too")), folder)
    with pytest.raises(UnsuitedError, match="rotary tables"):
        ragged_graph.ragged(changed(model, "GroupQueryAttention", inputs(*before)), folder)


def test_heads_of_other_sizes_and_heads_that_are_none_are_left_alone(folder: ModelFolder) -> None:
    model = folder.graph.read_bytes()
    with pytest.raises(UnsuitedError, match="heads have 24 numbers"):
        ragged_graph.ragged(model, replace(folder, head_size=24))
    with pytest.raises(UnsuitedError, match="output head"):
        ragged_graph.ragged(model, replace(folder, outputs={**folder.outputs, "logits": "nothing"}))
    with pytest.raises(UnsuitedError, match="no graph"):
        ragged_graph.ragged(b"", folder)


@pytest.mark.parametrize("seed", range(200))
def test_no_damage_gets_past_a_value_error(folder: ModelFolder, seed: int) -> None:
    draw = random.Random(seed)
    model = bytearray(folder.graph.read_bytes())
    for _ in range(draw.choice([1, 5, 50])):
        model[draw.randrange(len(model))] = draw.randrange(256)
    with contextlib.suppress(ValueError, UnsuitedError):
        assert ragged_graph.ragged(bytes(model), folder)
