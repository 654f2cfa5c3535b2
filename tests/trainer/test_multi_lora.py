"""Bases in multi-adapter form: with an adapter they compute what peft does, without one what a plain model does."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CHATML, write_model, write_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from slmops_trainer import multi_lora

TOKENS = list(range(5, 40))
SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def made(model: Any, folder: Path) -> Path:
    folder.mkdir()
    write_tokenizer(folder, CHATML)
    model.save_pretrained(folder)
    return folder


def session(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def logits(model: ort.InferenceSession, adapter: dict[str, np.ndarray]) -> np.ndarray:
    """Of adapters with the names that `olive convert-adapters` gives, which are those of peft's modules.

    All matrices have to be of one rank: those that an adapter lacks are zeros.
    """
    feeds = {"input_ids": np.array([TOKENS]), "attention_mask": np.ones((1, len(TOKENS)), np.int64)}
    for past in model.get_inputs():
        if past.name.startswith("past_key_values."):
            feeds[past.name] = np.zeros((1, past.shape[1], 0, past.shape[3]), np.float32)
    named = {n.replace("self_attn", "attn").replace(".weight", ".MatMul.weight"): v for n, v in adapter.items()}
    rank = next((value.shape[1] for name, value in named.items() if ".lora_A." in name), 0)
    for weight in model.get_overridable_initializers():
        size = next(n for n in weight.shape if isinstance(n, int))
        feeds[weight.name] = np.zeros((size, rank) if ".lora_A." in weight.name else (rank, size), np.float32)
    assert set(named) <= set(feeds)
    feeds |= named
    return np.asarray(model.run(["logits"], feeds)[0][0])


def converted(peft: Path, out: Path) -> dict[str, np.ndarray]:
    subprocess.run(["olive", "convert-adapters", "-a", peft, "-o", out / "weights"], check=True)
    held = ort.AdapterFormat.read_adapter(str(out / "weights.onnx_adapter"))
    return {name: value.numpy().copy() for name, value in held.get_parameters().items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_with_an_adapter_it_computes_what_peft_computes(tmp_path: Path, family: str) -> None:
    if family == "qwen":
        source = write_model(tmp_path / "source", CHATML)
    else:
        torch.manual_seed(0)
        source = made(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path / "source")
    assert multi_lora.main([str(source), str(tmp_path / "out"), "--precision", "fp32"]) == 0
    model = session(tmp_path / "out")
    seen = []
    for rank, targets in ((4, "all-linear"), (3, ["q_proj", "down_proj"])):
        peft = tmp_path / f"peft{rank}"
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(source),
            LoraConfig(r=rank, lora_alpha=10, target_modules=targets, init_lora_weights=False),
        )
        adapted.save_pretrained(peft)
        with torch.no_grad():
            wanted = adapted(torch.tensor([TOKENS])).logits[0].numpy()
        seen.append(logits(model, converted(peft, tmp_path / f"onnx{rank}")))
        np.testing.assert_allclose(seen[-1], wanted, atol=2e-3)
    assert np.abs(seen[0] - seen[1]).max() > 0.1
    assert not [path.name for path in (tmp_path / "out").iterdir() if "adapter" in path.name]


@pytest.mark.slow
def test_without_an_adapter_an_int4_base_is_bit_for_bit_the_plain_one(tmp_path: Path) -> None:
    """The same weights are quantized to the same numbers; only the adapter's are left alone."""
    source = write_model(tmp_path / "source", CHATML)
    plain = tmp_path / "plain"
    options = {**multi_lora.passes("int4", 32, [])["build"]}
    del options["type"]
    builder = ["python", "-m", "onnxruntime_genai.models.builder", "-m", source, "-i", source, "-o", plain]
    extra = [
        "int4_block_size=32",
        "int4_is_symmetric=true",
        "int4_accuracy_level=4",
        "int4_op_types_to_quantize=MatMul/Gather",
    ]
    subprocess.run([*builder, "-p", "int4", "-e", "cpu", "-c", tmp_path / "c", "--extra_options", *extra], check=True)
    assert multi_lora.main([str(source), str(tmp_path / "out")]) == 0
    base = session(tmp_path / "out")
    assert np.array_equal(logits(base, {}), logits(session(plain), {}))
    nodes = {i.name: (i.type, i.shape) for i in base.get_overridable_initializers()}
    assert len(nodes) == 2 * 2 * 7
    assert {kind for kind, _ in nodes.values()} == {"tensor(float)"}


@pytest.mark.slow
def test_a_config_of_transformers_5_keeps_its_rotary_base(tmp_path: Path) -> None:
    """Version 4 would compute with 10,000, and say nothing. The folder may be one that cannot be written to."""
    torch.manual_seed(0)
    source = made(LlamaForCausalLM(LlamaConfig(**SHAPE, rope_theta=50.0)), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(source)(torch.tensor([TOKENS])).logits[0].numpy()
    del config["rope_theta"]
    text = json.dumps({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}})
    (source / "config.json").write_text(text)
    with torch.no_grad():
        wrong = AutoModelForCausalLM.from_pretrained(source)(torch.tensor([TOKENS])).logits[0].numpy()
    assert multi_lora.main([str(source), str(tmp_path / "out"), "--precision", "fp32"]) == 0
    found = logits(session(tmp_path / "out"), {})
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert np.abs(found - wrong).max() > 0.1
    assert (source / "config.json").read_text() == text


@pytest.mark.slow
def test_answers_end_where_the_chat_template_ends_a_turn(tmp_path: Path) -> None:
    """Base models of chat families declare another end of text, and adapters are tuned to write the template's."""
    source = write_model(tmp_path / "source", CHATML)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(told | {"eos_token_id": 0}))
    told = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(told | {"eos_token": "<|endoftext|>"}))
    (source / "special_tokens_map.json").unlink()
    assert multi_lora.main([str(source), str(tmp_path / "out"), "--precision", "fp32"]) == 0
    made = json.loads((tmp_path / "out/genai_config.json").read_text())
    assert made["model"]["eos_token_id"] == [0, 2]


@pytest.mark.slow
def test_each_layer_has_its_own_window(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", CHATML)
    config = json.loads((source / "config.json").read_text())
    del config["layer_types"]
    slides = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    (source / "config.json").write_text(json.dumps(config | slides))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(source)(torch.tensor([TOKENS])).logits[0].numpy()
    assert multi_lora.main([str(source), str(tmp_path / "out"), "--precision", "fp32"]) == 0
    np.testing.assert_allclose(logits(session(tmp_path / "out"), {}), wanted, atol=2e-3)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "positions by yarn"),
        ({"architectures": ["GPT2LMHeadModel"]}, "which has no ONNX form"),
        # Nothing says that the builder will miss an entry of such a config.
        ({"architectures": ["Phi3ForCausalLM"]}, "Olive cannot convert .*: AttributeError: .*original_max_position_em"),
    ],
)
def test_what_would_compute_something_else_or_nothing_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], told: dict[str, Any], words: str
) -> None:
    source = write_model(tmp_path / "source", CHATML)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | told))
    assert multi_lora.main([str(source), str(tmp_path / "out")]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_weights_that_can_run_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "source", CHATML)
    torch.save(AutoModelForCausalLM.from_pretrained(source).state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert multi_lora.main([str(source), str(tmp_path / "out")]) == 1
    assert f"{source} has no .safetensors weights. Convert them" in capsys.readouterr().err


@pytest.mark.slow
def test_only_the_modules_that_are_named_take_adapters(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", CHATML)
    assert multi_lora.main([str(source), str(tmp_path / "out"), "--precision", "fp32", "--targets", "v_proj"]) == 0
    names = {i.name for i in session(tmp_path / "out").get_overridable_initializers()}
    assert names == {f"model.layers.{n}.attn.v_proj.lora_{x}.MatMul.weight" for n in (0, 1) for x in "AB"}


@pytest.mark.slow
def test_what_cannot_be_made_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = Phi3Config(**{**SHAPE, "hidden_size": 128}, original_max_position_embeddings=256, sliding_window=None)
    fused = made(Phi3ForCausalLM(config), tmp_path / "phi")
    for arguments, words in (
        ([str(tmp_path), str(tmp_path / "a")], "no config.json"),
        ([str(fused), str(tmp_path / "b"), "--targets", "wrong"], "wrong"),
        ([str(fused), str(tmp_path / "c")], "multi-adapter form of this architecture"),
    ):
        assert multi_lora.main(arguments) == 1
        assert words in capsys.readouterr().err
