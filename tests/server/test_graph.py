"""What is read of a model's graph, and the one change to it: what it computes, and what damaged files do to it."""

import contextlib
import json
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]  # it ships no types
import pytest

from slmops_server import model_folder
from slmops_server.engines import graph, protobuf
from slmops_server.engines.ort import OrtForward, _model, _session

TOKENS = [5, 300, 41, 17, 99, 256, 3, 77]


def forward(tiny: Path) -> OrtForward:
    folder = model_folder.read(tiny)
    return OrtForward(folder, _session(folder, _model(folder), 1), 2, 64, 32)


def test_logits_are_those_of_the_chosen_positions(tiny: Path) -> None:
    model = forward(tiny)
    every = model.score(0, TOKENS, 0).copy()
    last = model.prefill(1, TOKENS, 0)
    assert every.shape == (len(TOKENS), 512)
    np.testing.assert_allclose(last, every[-1], atol=1e-4)
    for size in (2, 5):
        np.testing.assert_allclose(model.prefill(1, TOKENS[:size], 0), every[size - 1], atol=1e-4)


def test_the_unchanged_graph_computes_the_same(tiny: Path) -> None:
    folder = model_folder.read(tiny)
    plain = OrtForward(folder, ort.InferenceSession(str(folder.graph)), 2, 64, 32)
    np.testing.assert_allclose(plain.prefill(0, TOKENS, 0), forward(tiny).prefill(0, TOKENS, 0), atol=1e-4)


def test_the_head_gets_its_input_from_the_chosen_position_on(tiny: Path) -> None:
    changed = graph.logits_from((tiny / "model.onnx").read_bytes(), "logits")
    assert changed
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tiny))
    inputs = {i.name: i for i in ort.InferenceSession(changed, options).get_inputs()}
    assert (inputs[graph.FROM].type, inputs[graph.FROM].shape) == ("tensor(int64)", [1])


def test_other_heads_are_left_alone(tiny: Path) -> None:
    model = (tiny / "model.onnx").read_bytes()
    assert graph.logits_from(model, "nothing") is None
    assert graph.logits_from(model, "present.0.key") is None  # made by an attention node
    assert graph.logits_from(b"", "logits") is None


def test_files_that_end_too_early_are_told(tiny: Path) -> None:
    model = (tiny / "model.onnx").read_bytes()
    for size in range(1, len(model), 997):
        with pytest.raises(ValueError, match="ONNX file"):
            graph.logits_from(model[:size], "logits")


@pytest.mark.parametrize("seed", range(200))
def test_no_damage_gets_past_a_value_error(tiny: Path, seed: int) -> None:
    draw = random.Random(seed)
    model = bytearray((tiny / "model.onnx").read_bytes())
    for _ in range(draw.choice([1, 5, 50])):
        model[draw.randrange(len(model))] = draw.randrange(256)
    with contextlib.suppress(ValueError):
        graph.rotary_switch(bytes(model))
        graph.rotary_positions(bytes(model))
    try:
        changed = graph.logits_from(bytes(model), "logits")
    except ValueError:
        return
    assert changed is None or len(changed) > len(model)


def test_the_size_of_a_cached_number_is_read_from_the_graph(tiny: Path) -> None:
    model = (tiny / "model.onnx").read_bytes()
    assert graph.item_bytes(model, "past_key_values.1.value") == 4
    assert graph.item_bytes(model, "input_ids") is None
    assert graph.item_bytes(model, "nothing") is None


@pytest.mark.parametrize(("kind", "size"), [(1, 4), (10, 2), (16, 2), (3, None)])
def test_half_precision_caches_take_two_bytes(kind: int, size: int | None) -> None:
    name, tensor = b"past.0.key", bytes([8, kind])
    value = bytes([10, len(name)]) + name + bytes([18, 4, 10, 2]) + tensor
    model = bytes([58, len(value) + 2, 90, len(value)]) + value
    assert graph.item_bytes(model, "past.0.key") == size
    with pytest.raises(ValueError, match="damaged"):
        graph.item_bytes(model[:-1], "past.0.key")


def test_weights_within_a_graph_are_copied_once_and_read_never_before(tiny: Path, tmp_path: Path) -> None:
    """A pod's memory has room for the model, not for copies of it."""
    model = (tiny / "model.onnx").read_bytes()
    weights = bytes(16 << 20)
    tensor = protobuf.message(graph.INITIALIZER, protobuf.message(9, weights))
    file = tmp_path / "model.onnx"
    old = next(value for number, value, _ in protobuf.fields(memoryview(model)) if number == graph.GRAPH)
    file.write_bytes(protobuf.message(graph.GRAPH, tensor + bytes(old)))  # type: ignore[arg-type]
    size = file.stat().st_size
    tracemalloc.start()
    assert graph.item_bytes(graph.read(file), "past_key_values.1.value") == 4
    assert tracemalloc.get_traced_memory()[1] < size / 8
    changed = graph.logits_from(graph.read(file), "logits")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert changed is not None
    assert len(changed) > size > peak * 0.8


def test_an_empty_file_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match="empty"):
        graph.read(tmp_path / "model.onnx")


def node(kind: str, inputs: list[str], outputs: list[str], attribute: bytes = b"") -> bytes:
    """A field of a graph: a NodeProto."""
    names = [protobuf.message(graph.NODE_INPUT, name.encode()) for name in inputs]
    names += [protobuf.message(graph.NODE_OUTPUT, name.encode()) for name in outputs]
    more = [protobuf.message(graph.NODE_ATTRIBUTE, attribute)] if attribute else []
    return protobuf.message(graph.NODE, b"".join([*names, protobuf.message(graph.NODE_OP, kind.encode()), *more]))


def longrope(limit: int, form: str, attention: str = "GroupQueryAttention") -> bytes:
    """As the builder writes it: the constant as a node of its own, or as an initializer after a pass of Olive."""
    raw = protobuf.number_field(2, graph.INT64) + protobuf.message(9, limit.to_bytes(8, "little"))
    packed = protobuf.number_field(2, graph.INT64) + protobuf.message(7, protobuf.encoded(limit))
    tensor = protobuf.message(8, b"limit") + (packed if form == "packed" else raw)
    branch = protobuf.message(1, b"then_branch") + protobuf.message(6, node("Constant", [], ["cos_cache_large"]))
    parts = [
        node("Shape", ["attention_mask"], ["shape"]),
        node("Gather", ["shape", "one"], ["length"]),
        node("Greater", ["length", "limit"], ["longer"]),
        node("If", ["longer"], ["cos_cache", "sin_cache"], branch),
        node(attention, ["qkv", "", "", "past", "past", "seqlens", "total", "cos_cache", "sin_cache"], ["out"]),
    ]
    if form == "node":
        parts.insert(0, node("Constant", [], ["limit"], protobuf.message(1, b"value") + protobuf.message(5, tensor)))
    else:
        parts.append(protobuf.message(graph.INITIALIZER, tensor))
    return protobuf.message(graph.GRAPH, b"".join(parts))


@pytest.mark.parametrize("form", ["node", "raw", "packed"])
@pytest.mark.parametrize("attention", ["GroupQueryAttention", "RotaryEmbedding"])
def test_the_length_from_which_other_rotary_tables_are_taken_is_read(form: str, attention: str) -> None:
    assert graph.rotary_switch(longrope(4096, form, attention)) == 4096


def test_most_graphs_have_one_rotary_table(tiny: Path) -> None:
    assert graph.rotary_switch((tiny / "model.onnx").read_bytes()) is None
    assert graph.rotary_switch(longrope(4096, "node", "Add")) is None  # the choice is about something else
    assert graph.rotary_switch(b"") is None


@pytest.mark.parametrize(("limit", "served"), [(128, 128), (4096, 512)])
def test_no_context_goes_beyond_the_first_rotary_table(tiny: Path, tmp_path: Path, limit: int, served: int) -> None:
    """Else chunks of one prompt would be turned by different tables, and short rows by those of their neighbours."""
    copy = shutil.copytree(tiny, tmp_path / "model")
    (copy / "model.onnx").write_bytes(longrope(limit, "node"))
    assert model_folder.read(copy).context_length == served


@pytest.mark.parametrize(("told", "served"), [(512, 512), (511, 511), (1024, 512)])
def test_no_context_goes_beyond_the_end_of_the_rotary_tables(
    tiny: Path, tmp_path: Path, told: int, served: int
) -> None:
    """Else an answer that came to their end would bring the engine down."""
    copy = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["context_length"] = told
    (copy / "genai_config.json").write_text(json.dumps(config))
    assert model_folder.read(copy).context_length == served


def test_the_tables_of_a_rotation_of_its_own_count_too() -> None:
    def table(name: str, *shape: int) -> bytes:
        dims = b"".join(protobuf.number_field(1, size) for size in shape)
        return protobuf.message(graph.INITIALIZER, dims + protobuf.message(8, name.encode()))

    rotation = node("RotaryEmbedding", ["query", "positions", "cosines", "sines"], ["turned"])
    parts = [rotation, table("positions", 7, 7), table("cosines", 96, 8), table("other", 3, 8)]
    assert graph.rotary_positions(protobuf.message(graph.GRAPH, b"".join([*parts, table("sines", 95, 8)]))) == 95
    assert graph.rotary_positions(protobuf.message(graph.GRAPH, rotation + table("sines", 95))) is None
    assert graph.rotary_positions(b"") is None
