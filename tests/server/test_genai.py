"""The engine genai: which folders go to it, what it says of GPUs that it cannot use, and that a server runs on it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from server_harness import Server, check_sampling_formats_and_leaving

from slmops_server import model_folder
from slmops_server.engines import choose, genai
from slmops_server.engines.base import Engine, EngineRefusedError


def load(path: Path, engine: str) -> Engine:
    return choose.load(model_folder.read(path), choose.EngineOptions(engine=engine, threads=1))


@pytest.mark.parametrize(
    ("provider", "wheel"),
    [("cuda", "onnxruntime-genai-cuda"), ("WebGPU", "a build of onnxruntime-genai for WebGPU"), ("cpu", "")],
)
def test_a_folder_for_a_gpu_is_not_computed_on_the_cpu_in_silence(
    tiny: Path, tmp_path: Path, provider: str, wheel: str
) -> None:
    """genai's own message of the provider that the wheel lacks comes with it, which only engine genai can know."""
    copy = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{provider: {}}]
    (copy / "genai_config.json").write_text(json.dumps(config))
    if not wheel:
        assert load(copy, "auto").info.name == "onnxruntime"
        return
    with pytest.raises(EngineRefusedError, match=f"names the execution provider {provider}, and this engine"):
        load(copy, "onnxruntime")
    for engine in ("auto", "genai"):
        with pytest.raises(EngineRefusedError, match=rf"(?i){provider}.*{provider}.*install {wheel} in its place"):
            load(copy, engine)


def test_a_folder_for_a_gpu_goes_to_genai_with_the_reason(tiny: Path) -> None:
    folder = replace(model_folder.read(tiny), providers=("cuda",))  # genai reads the file, which asks for none
    fallen_back = choose.load(folder, choose.EngineOptions(threads=1))
    assert (fallen_back.info.name, "provider cuda" in fallen_back.info.notes["reason"]) == ("genai", True)


def test_a_machine_without_genai_is_told_how_to_get_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genai, "og", None)
    with pytest.raises(EngineRefusedError, match="extra genai"):
        load(tiny, "genai")


def test_a_server_on_it_does_what_the_others_do(start: Callable[..., Server]) -> None:
    server = start("--engine", "genai", "--slots", "2", "--max-queue", "64")
    check_sampling_formats_and_leaving(server)
