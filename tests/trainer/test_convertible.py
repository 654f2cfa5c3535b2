"""What the ONNX builder cannot write faithfully is refused, from config.json alone or from the graph that it built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from slmops.api.run import Input
from slmops_trainer import convertible, onnx_graph, quantize
from slmops_trainer.context import Context
from slmops_trainer.failure import RunFailure


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, ""),
        ({"hidden_size": 96, "num_attention_heads": 4}, "heads of 24 values"),
        ({"hidden_size": 96, "num_attention_heads": 4, "head_dim": 32, "num_key_value_heads": 2}, ""),
        ({"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads over 3 key-value heads"),
        ({"n_embd": 64}, ""),
        ({"rope_scaling": None}, ""),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ""),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ""),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "positions by yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32}}, "positions by yarn"),
        ({"architectures": ["Gemma3ForCausalLM"], "rope_scaling": None}, ""),
        (
            {"architectures": ["Gemma3ForCausalLM"], "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "of all lay",
        ),
        ({"architectures": ["OlmoForCausalLM"]}, "norms subtract the mean"),
        ({"architectures": ["SmolLM3ForCausalLM"]}, "rotate nothing"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "a GPT2LMHeadModel, which has no ONNX form: the builder does not know",
        ),
        ({"architectures": ["Olmo2ForCausalLM"]}, "the builder does not know"),
    ],
)
def test_what_would_not_run_or_compute_something_else_is_refused_before_converting(
    config: dict[str, Any], what: str
) -> None:
    config = {"architectures": ["LlamaForCausalLM"], **config}
    if not what:
        convertible.refuse(config, "m")
        return
    with pytest.raises(RunFailure, match=what):
        convertible.refuse(config, "m")


def test_what_cannot_be_converted_is_refused_before_its_weights_are_pulled(
    make_run: Callable[..., Context], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_model / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    pulled: list[list[str]] = []

    def pull(*_: Any, choose: Any = None, **__: Any) -> Any:
        files = ["config.json", "model.safetensors", "tokenizer.json"]
        pulled.append(choose(files) if choose else files)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path, None

    ctx = make_run(quantize={"source": {"uri": "pvc://models/tiny"}})
    ctx.spec = ctx.spec.model_copy(update={"model": Input(uri="hf://openai-community/gpt2")})
    monkeypatch.setattr(ctx, "pull", pull)
    with pytest.raises(RunFailure, match="which has no ONNX form"):
        quantize.run(ctx)
    assert pulled == [["config.json"]]


def test_windows_of_layers_with_rotary_tables_of_their_own_are_not_exchanged(tmp_path: Path) -> None:
    tables = ("local", "global")
    nodes = [
        onnx.helper.make_node(
            onnx_graph.ATTENTION, ["q", "k", "v", "", "", "a", "b", table, table], [table],
            name=f"/model/layers.{layer}/attn/{onnx_graph.ATTENTION}", local_window_size=window,
        )
        for layer, (table, window) in enumerate(zip(tables, (8, -1), strict=True))
    ]  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [])), path)
    built = path.read_bytes()
    onnx_graph.slide(tmp_path, [8, -1], "m")
    with pytest.raises(RunFailure, match="m looks through windows in other layers"):
        onnx_graph.slide(tmp_path, [-1, 8], "m")
    assert path.read_bytes() == built
