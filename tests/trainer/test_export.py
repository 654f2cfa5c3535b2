"""A model in the forms of other engines: GGUF is written here, IR by packages that are not in the image.

What llama.cpp computes with the GGUF the tests of the server hold to what transformers answers.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmops_trainer import export_gguf, export_ir

MODULE = "slmops_trainer.export_{}"
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_a_gguf_has_the_files_beside_it_that_a_server_reads(tiny_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "source")
    tools = "additional_chat_templates/tool_use.jinja"
    (source / tools).parent.mkdir()
    (source / tools).write_text("{{ tools }}")
    command = [sys.executable, "-m", MODULE.format("gguf"), source, tmp_path / "out", "--type", "f16"]
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "out/model.gguf").read_bytes()[:4] == b"GGUF"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", tools):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_what_is_no_such_model_is_told_in_a_sentence(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
    assert export_gguf.main([str(source), str(tmp_path / "out")]) == 1
    assert "none of llama" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "told",
    [
        {"model_type": "llama", "rope_scaling": LLAMA3},
        {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
        {"rope_scaling": YARN},
        {"rope_parameters": YARN},
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        {"use_sliding_window": True},
        {"model_type": "mistral", "sliding_window": 64},
        {"model_type": "mistral", "max_position_embeddings": 8192},
    ],
)
def test_a_gguf_that_would_turn_or_see_otherwise_is_refused(tiny_model: Path, told: dict[str, Any]) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    with pytest.raises(export_gguf.UnsupportedError, match="rotation"):
        export_gguf.shapes(_without(config, *told) | told)


@pytest.mark.parametrize(
    "told",
    [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}, "partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 1e6, "model_type": "mistral", "sliding_window": None},
        {"rope_theta": 1e6, "model_type": "mistral"},  # whose window is no smaller than the context
    ],
)
def test_a_gguf_says_the_base_of_the_rotation(tiny_model: Path, told: dict[str, Any]) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    found = export_gguf.shapes(_without(config, "rope_theta", "rope_scaling") | told)
    assert found[f"{found['general.architecture']}.rope.freq_base"] == 1e6


def test_a_llama_without_groups_and_a_token_without_a_row_are_written(tiny_model: Path, tmp_path: Path) -> None:
    """Llama 1's config.json has no num_key_value_heads; Gemma 3's tokenizer for text alone has a token for images."""
    source = shutil.copytree(tiny_model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    for name, value in weights.items():  # as many keys and values as queries
        if ".k_proj." in name or ".v_proj." in name:
            weights[name] = torch.cat([value, value])
    save_file(weights, source / "model.safetensors")
    llama = _without(config, "num_key_value_heads", "layer_types") | {"model_type": "llama"}
    (source / "config.json").write_text(json.dumps(llama))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    beyond = {**tokenizer["added_tokens"][0], "id": config["vocab_size"], "content": "<image>"}
    tokenizer["added_tokens"].append(beyond)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert export_gguf.main([str(source), str(tmp_path / "out"), "--type", "f32"]) == 0
    written = (tmp_path / "out/model.gguf").read_bytes()
    key = weights["model.layers.0.self_attn.k_proj.weight"].numpy()
    assert export_gguf.interleave(key, config["num_attention_heads"]).tobytes() in written
    assert b"<image>" not in written


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """Without `sliding_window` too: it is null in what Qwen writes, and Mistral reads it."""
    return {name: value for name, value in config.items() if name not in (*names, "sliding_window")}


def test_ir_without_its_packages_says_which_they_are(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the image they are not."""
    assert export_ir.main([str(tiny_model), str(tmp_path / "out")]) == 1
    assert export_ir.PACKAGES in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


Optimum = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def optimum(tmp_path: Path) -> Optimum:
    """Runs export_ir with a stand-in for optimum-intel that writes down how it was called, and with which config."""
    package = tmp_path / "packages/optimum/commands"
    package.mkdir(parents=True)
    (package / "optimum_cli.py").write_text(
        "import json, pathlib, sys\n"
        "def main():\n"
        "    model, out = pathlib.Path(sys.argv[4]), pathlib.Path(sys.argv[-1])\n"
        "    weights = (model / 'model.safetensors').stat().st_size\n"
        "    told = json.loads((model / 'config.json').read_text())\n"
        "    out.write_text(json.dumps([sys.argv, weights, told]))\n"
    )
    run = "import sys; sys.path.insert(0, sys.argv.pop(1)); from slmops_trainer.export_ir import main; sys.exit(main())"
    start = [sys.executable, "-c", run, tmp_path / "packages"]
    return lambda *more: subprocess.run([*start, *more], timeout=120, text=True, capture_output=True)


def test_ir_is_asked_of_optimum_as_its_command_is(optimum: Optimum, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert optimum(tiny_model, out, "--block-size", "64").returncode == 0
    called, weights, _ = json.loads(out.read_text())
    assert called == export_ir.command(Path(called[4]), out, 64)
    assert weights == (tiny_model / "model.safetensors").stat().st_size


def test_ir_is_made_of_a_model_as_it_was_meant(optimum: Optimum, tiny_model: Path, tmp_path: Path) -> None:
    """Version 4 of transformers would turn with a base of 10,000 what version 5 has written."""
    source = shutil.copytree(tiny_model, tmp_path / "source")
    config = _without(json.loads((source / "config.json").read_text()), "rope_theta")
    text = json.dumps(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    (source / "config.json").write_text(text)
    assert optimum(source, tmp_path / "out").returncode == 0
    assert json.loads((tmp_path / "out").read_text())[2]["rope_theta"] == 1e6
    assert (source / "config.json").read_text() == text


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, "transformers 4.57"),
    ],
)
def test_ir_that_would_compute_something_else_is_refused(
    optimum: Optimum, tiny_model: Path, tmp_path: Path, told: dict[str, Any], words: str
) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "source")
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | told))
    done = optimum(source, tmp_path / "out")
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
