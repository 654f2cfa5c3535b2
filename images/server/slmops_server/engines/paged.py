"""A decoder as OpenVINO reads it, changed so that its attention keeps many rows' keys and values in one block store.

OpenVINO's PagedAttention computes tokens of any number of rows in one call, each row at its own length, which is what
makes continuous batching possible. Two kinds of files become such a model: the ONNX graph that Olive and the
onnxruntime-genai builder write (GroupQueryAttention), and OpenVINO IR as optimum-intel exports it (a stateful
scaled dot product). Tokens come flat: [tokens, 1] instead of [batch, length].
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation
from openvino.op import _PagedAttentionExtension

from slmops_server.engines.base import EngineRefusedError

AT = "logits_at"  # indices of the tokens whose logits are wanted
COUNTERS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
POSITIONS = "position_ids"
ROTARY = slice(7, 9)  # inputs of GroupQueryAttention: cosines and sines
OPTIONAL = 9  # the first input that a plain decoder leaves empty
SPECIAL = ("rotary_interleaved", "smooth_softmax", "sliding_window_cache", "softcap", "kv_cache_bit_width")
BEHIND_HEADS = {"Convert", "Multiply", "Divide", "Tanh", "Reshape"}  # scaled and capped logits


def read(core: ov.Core, path: Path) -> ov.Model:
    """The model with inputs input_ids, position_ids, logits_at, the counters, max_context_len and the caches.

    EngineRefusedError when its attention is of another form.
    """
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise EngineRefusedError(f"OpenVINO cannot read {path.name}: {_reason(error)}") from None
    model = _from_ir(model, path.name) if path.suffix == ".xml" else _from_onnx(model)
    model.validate_nodes_and_infer_types()
    return model


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message: those before are its source files."""
    return str(error).strip().splitlines()[-1].strip()


def _from_ir(model: ov.Model, name: str) -> ov.Model:
    if not model.get_variables():
        raise EngineRefusedError(f"{name} keeps no state: export it with optimum-cli export openvino, not --stateless")
    try:
        paged_attention_transformation(model)
    except RuntimeError as error:
        raise EngineRefusedError(f"the attention of {name} is of an unknown form: {_reason(error)}") from None
    at = _parameter(AT, [-1], np.int64)
    _choose_logits(_logits(model), at)
    model.add_parameters([at])
    return model


def _from_onnx(model: ov.Model) -> ov.Model:
    given = {name: parameter for parameter in model.get_parameters() for name in parameter.output(0).get_names()}
    if "input_ids" not in given:
        raise EngineRefusedError("the graph has no input_ids")
    positions = given.get(POSITIONS) or _parameter(POSITIONS, [-1, 1], np.int64)
    for tokens in (given["input_ids"], positions):
        tokens.set_partial_shape(ov.PartialShape([-1, 1]))
    made = [_parameter(name, [-1], np.int32) for name in COUNTERS] + [_parameter("max_context_len", [], np.int32)]
    attention = [node for node in model.get_ordered_ops() if node.get_type_name() == "GroupQueryAttention"]
    if not attention:
        raise EngineRefusedError("the graph has no GroupQueryAttention")
    rotate = rotation(positions)
    caches: list[Any] = []
    for layer, node in enumerate(attention):
        pair = [_cache(f"{part}_cache.{layer}") for part in ("key", "value")]
        caches += pair
        out = _attention(node, pair, made, rotate)
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(out)
    logits, at = _logits(model), _parameter(AT, [-1], np.int64)
    _choose_logits(logits, at)
    return ov.Model([logits], [given["input_ids"], positions, at, *made, *caches], "paged")


def _attention(node: Any, caches: list[Any], counters: list[Any], rotate: Callable[[Any, Any, Any], Any]) -> Any:
    """The output of a PagedAttention in place of a GroupQueryAttention."""
    told, inputs = node.get_attributes(), [one.get_source_output() for one in node.inputs()]
    check(told, [f"input {at}" for at, one in enumerate(inputs[OPTIONAL:], OPTIONAL) if not _empty(one)])
    query, key, value = inputs[:3]
    size = int(query.get_partial_shape()[3].get_length())
    heads, kv_heads = int(told["num_heads"]), int(told["kv_num_heads"])
    if told["do_rotary"]:
        query, key = rotate(query, size, inputs[ROTARY]), rotate(key, size, inputs[ROTARY])
    scale = ops.constant(np.float32(told["scale"] or size**-0.5)).output(0)
    flat = [_flat(query, heads * size), _flat(key, kv_heads * size), _flat(value, kv_heads * size)]
    store = [cache.output(0) for cache in caches]
    *where, longest = [counter.output(0) for counter in counters]
    paged = _PagedAttentionExtension([*flat, *store, *where, scale, _int(0), _none(np.float32), longest, *_unused()])
    notes = paged.get_rt_info()  # the CPU plugin shapes the caches by these
    notes["num_k_heads"] = notes["num_v_heads"] = kv_heads
    notes["k_head_size"] = notes["v_head_size"] = size
    return ops.reshape(paged.output(0), _ints([-1, 1, heads * size]), False).output(0)


def check(told: Mapping[str, Any], extras: Sequence[str]) -> None:
    """EngineRefusedError when a GroupQueryAttention with these attributes and extra inputs is more than a plain one."""
    found = [name for name in SPECIAL if told.get(name)] + list(extras)
    if told["local_window_size"] > 0:
        found.append("local_window_size")
    if not told["causal"]:
        found.append("causal off")
    if found:
        raise EngineRefusedError(f"its GroupQueryAttention has {', '.join(found)}")


def _unused() -> list[Any]:
    """The inputs of PagedAttention behind max_context_len: scores, rotation and eviction of blocks, sparsity, sinks."""
    ints, floats = _none(np.int32), _none(np.float32)
    return [
        *(ints, ints, ints, floats),  # score_aggregation_window, rotated_block_indices, rotation_deltas, .._trig_lut
        *(floats, _int(0), _int(0), floats),  # xattention_threshold, .._block_size, .._stride, sinks
        *(_int(0), ints, ints, ints),  # adaptive_rkv_start_size, .._evictable_sizes, .._set_indices, .._begins
        *(ints, _none(np.uint8), ints),  # token_type_ids, qq_bias, qq_bias_begins
    ]


def rotation(positions: Any) -> Callable[[Any, Any, Any], Any]:
    """A function (states [tokens, heads, 1, size], size, tables) -> rotated states.

    Layers that share tables share what is looked up in them.
    """
    looked_up: dict[str, Any] = {}

    def look_up(table: Any) -> Any:
        name = table.get_node().get_friendly_name()
        if name not in looked_up:  # [tokens, 1, size / 2] -> [tokens, 1, 1, size / 2]
            rows = ops.gather(table, positions, ops.constant(np.int64(0)))
            looked_up[name] = ops.unsqueeze(rows, ops.constant(np.int64(1)))
        return looked_up[name]

    def rotate(states: Any, size: int, tables: Any) -> Any:
        cosines, sines = (look_up(table) for table in tables)
        half = int(tables[0].get_partial_shape()[1].get_length())
        sizes = [half, half] + ([size - 2 * half] if size > 2 * half else [])  # the rest is not rotated
        parts = ops.variadic_split(states, ops.constant(np.int64(3)), _ints(sizes)).outputs()
        first = ops.subtract(ops.multiply(parts[0], cosines), ops.multiply(parts[1], sines))
        second = ops.add(ops.multiply(parts[1], cosines), ops.multiply(parts[0], sines))
        return ops.concat([first.output(0), second.output(0), *parts[2:]], 3).output(0)

    return rotate


def _logits(model: ov.Model) -> Any:
    found = [one for one in model.get_results() if "logits" in one.input(0).get_source_output().get_names()]
    if not found:
        raise EngineRefusedError("the graph has no output logits")
    return found[0]


def _choose_logits(result: Any, at: Any) -> None:
    """The output head is computed for the tokens `at` only. EngineRefusedError where it is not a matrix product."""
    node = result.input(0).get_source_output().get_node()
    while node.get_type_name() in BEHIND_HEADS:
        node = node.input(0).get_source_output().get_node()
    if node.get_type_name() != "MatMul":
        raise EngineRefusedError(f"its output head is a {node.get_type_name()}")
    hidden = node.input(0)
    hidden.replace_source_output(ops.gather(hidden.get_source_output(), at, ops.constant(np.int64(0))).output(0))


def _empty(source: Any) -> bool:
    node = source.get_node()
    return node.get_type_name() == "Constant" and 0 in list(node.get_output_shape(0))


def _parameter(name: str, shape: list[int], kind: type) -> Any:
    made = ops.parameter(shape, kind, name=name)
    made.output(0).set_names({name})
    return made


def _cache(name: str) -> Any:
    """Type and shape are the plugin's to choose."""
    made = _parameter(name, [-1, -1, -1, -1], np.float32)
    made.set_element_type(ov.Type.dynamic)
    return made


def _flat(source: Any, width: int) -> Any:
    return ops.reshape(source, _ints([-1, width]), False).output(0)


def _ints(values: list[int]) -> Any:
    return ops.constant(np.array(values, np.int64))


def _int(value: int) -> Any:
    return ops.constant(np.int32(value)).output(0)


def _none(kind: type) -> Any:
    return ops.constant(np.zeros(0, kind)).output(0)
