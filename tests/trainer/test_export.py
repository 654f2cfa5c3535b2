"""A model in the forms of other engines: GGUF is written here, IR by packages that are not in the image.

What llama.cpp computes with the GGUF the tests of the server hold to what transformers answers.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_ir_is_asked_of_optimum_as_its_command_is(tmp_path: Path) -> None:
    """With a stand-in for optimum-intel that writes down how it was called."""
    package = tmp_path / "packages/optimum/commands"
    package.mkdir(parents=True)
    (package / "optimum_cli.py").write_text(
        "import json, pathlib, sys\ndef main():\n    pathlib.Path(sys.argv[-1]).write_text(json.dumps(sys.argv))\n"
    )
    run = "import sys; sys.path.insert(0, sys.argv.pop(1)); from slmops_trainer.export_ir import main; sys.exit(main())"
    out = tmp_path / "out"
    command = [sys.executable, "-c", run, tmp_path / "packages", "model", out, "--block-size", "64"]
    subprocess.run(command, check=True, timeout=60)
    assert json.loads(out.read_text()) == export_ir.command(Path("model"), out, 64)
