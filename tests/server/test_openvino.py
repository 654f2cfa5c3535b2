"""The engine openvino: that it computes the same model, what it refuses, and that a server runs on it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from server_harness import Server, check_sampling_formats_and_leaving

from slmops_server import model_folder
from slmops_server.engines import choose, openvino, ort, paged
from slmops_server.engines.base import EngineRefusedError

PROMPT = [(37 * index + 11) % 509 + 3 for index in range(70)]


@pytest.fixture(scope="module")
def tiny_ir(tiny: Path) -> Path:
    return tiny.parent / "tiny-ir"


def test_logits_are_those_of_onnxruntime_but_for_rounding(tiny: Path) -> None:
    """Either may round activations to 8 bits, as the CPU has it: near, not equal. Without rotation it is below 0.4."""
    folder = model_folder.read(tiny)
    theirs, _, _ = ort.load(folder, 2, 512, 256, 1, 1)
    ours, _ = openvino.load(folder, 2, 512, 256, 1)
    for past, tokens in ((0, PROMPT), (70, PROMPT[:40])):
        for mine, other in zip(ours.score(0, tokens, past), theirs.score(0, tokens, past).copy(), strict=True):
            assert np.corrcoef(mine, other)[0, 1] > 0.98


@pytest.mark.parametrize("rotated", [16, 12])
def test_rotation_turns_pairs_of_halves_and_leaves_the_rest(rotated: int) -> None:
    draw, half = np.random.default_rng(0), rotated // 2
    cosines, sines = draw.random((9, half), np.float32), draw.random((9, half), np.float32)
    states, at = draw.random((3, 2, 1, 16), np.float32), np.array([[4], [0], [8]])
    positions = ov.opset13.parameter([-1, 1], np.int64)
    given = ov.opset13.parameter([-1, 2, 1, 16], np.float32)
    tables = [ov.opset13.constant(table).output(0) for table in (cosines, sines)]
    made = paged.rotation(positions)(given.output(0), 16, tables)
    model = ov.Model([ov.opset13.result(made)], [given, positions], "rotation")
    (out,) = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([states, at]).values()
    pair = states[..., :half] + 1j * states[..., half:rotated]
    pair = pair * (cosines + 1j * sines)[at[:, 0]][:, None, None]
    assert np.allclose(out, np.concatenate([pair.real, pair.imag, states[..., rotated:]], axis=-1), atol=1e-6)


def test_what_reports_is_not_loaded_where_pip_has_brought_it(tmp_path: Path) -> None:
    """The image is without it; here is one that would say that it was loaded."""
    (tmp_path / "openvino_telemetry.py").write_text("print('loaded')")
    run = "import sys; sys.path.insert(0, sys.argv[1]); from slmops_server.engines import openvino; print(openvino.ov)"
    done = subprocess.run([sys.executable, "-c", run, tmp_path], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("<module 'openvino'")


def test_a_copied_row_goes_on_like_its_source(tiny: Path) -> None:
    forward, _ = openvino.load(model_folder.read(tiny), 3, 512, 256, 1)
    forward.prefill(0, PROMPT, 0)
    forward.copy(0, 2, len(PROMPT))
    wanted = forward.prefill(0, [5, 6], len(PROMPT)).copy()
    assert np.array_equal(forward.prefill(2, [5, 6], len(PROMPT)), wanted)
    assert not np.array_equal(forward.prefill(1, [5, 6], len(PROMPT)), wanted)


@pytest.mark.parametrize(
    ("name", "value"), [("local_window_size", 128), ("causal", False), ("rotary_interleaved", True), ("softcap", 30.0)]
)
def test_attention_that_would_be_computed_wrongly_is_refused(name: str, value: object) -> None:
    plain = {"causal": True, "local_window_size": -1, "do_rotary": True, "rotary_interleaved": False}
    paged.check(plain, [])
    with pytest.raises(EngineRefusedError, match=name):
        paged.check({**plain, name: value}, [])
    with pytest.raises(EngineRefusedError, match="input 11"):
        paged.check(plain, ["input 11"])


def test_files_that_are_no_such_model_are_refused(tmp_path: Path) -> None:
    tokens = ov.opset13.parameter([-1, -1], np.int64, name="input_ids")
    tokens.output(0).set_names({"input_ids"})
    model = ov.Model([ov.opset13.convert(tokens, "f32")], [tokens], "other")
    ov.save_model(model, tmp_path / "openvino_model.xml")
    with pytest.raises(EngineRefusedError, match="keeps no state"):
        paged.read(ov.Core(), tmp_path / "openvino_model.xml")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineRefusedError, match=r"cannot read broken\.onnx"):
        paged.read(ov.Core(), tmp_path / "broken.onnx")


def test_ir_goes_to_openvino_and_nowhere_else(tiny_ir: Path) -> None:
    folder = model_folder.read(tiny_ir)
    assert choose.load(folder, choose.EngineOptions(threads=1)).info.name == "openvino"
    for engine in ("onnxruntime", "genai"):
        with pytest.raises(EngineRefusedError, match="--engine openvino"):
            choose.load(folder, choose.EngineOptions(engine=engine, threads=1))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", {"model_type": "qwen2"}, "not a decoder-only model"),
        ("openvino_model.bin", None, r"openvino_model\.bin is missing"),
    ],
)
def test_an_ir_folder_that_is_not_whole_is_refused(
    tiny_ir: Path, tmp_path: Path, file: str, content: object, message: str
) -> None:
    copy = shutil.copytree(tiny_ir, tmp_path / "model")
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(json.dumps(content))
    with pytest.raises(model_folder.BadModelFolderError, match=message):
        model_folder.read(copy)


def test_the_cache_that_does_not_fit_is_refused_with_the_numbers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose.cgroup, "memory_limit", lambda: openvino.RUNTIME_BYTES + (1 << 20))
    with pytest.raises(choose.DoesNotFitError, match="4096 slots x 512 tokens"):
        choose.load(model_folder.read(tiny), choose.EngineOptions(engine="openvino", threads=1, slots=4096))


@pytest.mark.parametrize("over", ["tiny-int4", "tiny-ir"])
def test_a_server_on_it_does_what_the_others_do(start: Callable[..., Server], tiny: Path, over: str) -> None:
    server = start("--engine", "openvino", "--slots", "2", "--max-queue", "64", model=tiny.parent / over)
    check_sampling_formats_and_leaving(server)
