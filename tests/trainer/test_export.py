"""A model in the forms of other engines: GGUF is written here, IR by packages that are not in the image.

What llama.cpp computes with the GGUF the tests of the server hold to what transformers answers.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slmops_trainer import export_gguf, export_ir

MODULE = "slmops_trainer.export_{}"


def test_a_gguf_has_the_files_beside_it_that_a_server_reads(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", MODULE.format("gguf"), tiny_model, tmp_path / "out", "--type", "f16"]
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "out/model.gguf").read_bytes()[:4] == b"GGUF"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_model / name).read_bytes()


def test_what_is_no_such_model_is_told_in_a_sentence(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
    assert export_gguf.main([str(source), str(tmp_path / "out")]) == 1
    assert "none of llama" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
