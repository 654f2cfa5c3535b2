"""The engine llamacpp: that it computes what transformers does, what it refuses, and that a server runs on it."""

import ctypes
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import random_decoder
from server_harness import Server, check_sampling_formats_and_leaving

from slmops_server import model_folder
from slmops_server.engines import choose, llama_library, llamacpp
from slmops_server.engines.base import EngineRefusedError, Job, Sampling
from slmops_trainer import export_gguf

Maker = Callable[[str, str], Path]
PROMPT = [(37 * index + 11) % 509 + 3 for index in range(400)]
# as the tokenizer.json of Qwen2.5 and of Llama 3 have them
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PLAIN: dict[str, object] = {"type": "ByteLevel", "use_regex": False}
GREEDY = json.loads((Path(__file__).parent / "data/greedy.json").read_text())


def load(folder: Path, **more: int) -> llamacpp.LlamacppForward:
    return llamacpp.LlamacppForward(model_folder.read(folder), more.get("slots", 3), 512, 256, 1)


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("family", random_decoder.FAMILIES)
def test_greedy_tokens_are_those_of_transformers(gguf: Maker, family: str, kind: str) -> None:
    engine = choose.load(model_folder.read(gguf(family, kind)), choose.EngineOptions(threads=1, slots=2))
    assert engine.info.name == "llamacpp"
    got: dict[int, list[int]] = {}
    for number, prompt in enumerate(random_decoder.PROMPTS):
        engine.submit(Job(number, list(prompt), random_decoder.COUNT, Sampling(temperature=0.0), ignore_eos=True))
    while engine.busy:
        for token in engine.step():
            got.setdefault(token.job, []).append(token.token)
    assert [got[number] for number in range(len(random_decoder.PROMPTS))] == GREEDY[family]


def test_weights_of_4_bits_are_near(gguf: Maker) -> None:
    """Random weights bear them badly: about a tenth of each weight is lost."""
    exact, near = load(gguf("qwen2", "f32")), load(gguf("qwen2", "q4_0"))
    pairs = zip(exact.score(0, PROMPT[:30], 0).copy(), near.score(0, PROMPT[:30], 0), strict=True)
    alike = [np.corrcoef(one, other)[0, 1] for one, other in pairs]
    assert 0.9 < np.median(alike) < 0.9999


def test_a_block_of_4_bits_is_at_most_a_step_off() -> None:
    weights = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    weights[1, :32] = 0
    blocks = export_gguf.q4_0(weights).reshape(-1, 18)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    levels = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    off = np.abs(scale * (levels - np.float32(8)) - weights.reshape(-1, 32))
    assert (off <= 1.01 * np.abs(scale)).all()
    assert np.median(off[scale[:, 0] != 0] / np.abs(scale[scale[:, 0] != 0])) < 0.5


@pytest.mark.parametrize("kind", ["q4_0", "f16"])
def test_more_than_a_page_of_cells_changes_no_logit(gguf: Maker, kind: str) -> None:
    """Of a row of 300 tokens, cut in several ways; and of a short row beside it, for which more cells are masked."""
    forward = load(gguf("qwen2", kind))

    def fill(slot: int, size: int, count: int) -> None:
        for past in range(0, count, size):
            forward.prefill(slot, PROMPT[past : min(past + size, count)], past)

    rows = []
    for size in (256, 60, 64, 7):
        fill(0, size, 300)
        fill(1, size, 20)
        beside = forward.decode(0, [5, 5], [300, 20]).copy()
        rows.append(beside)
        fill(2, size, 20)
        rows.append(np.stack([beside[0], forward.decode(1, [5, 5], [20, 20])[0]]))
    assert all(np.array_equal(row, rows[0]) for row in rows)


def test_a_long_context_makes_every_call_shorter_but_those_over_guesses(gguf: Maker) -> None:
    """Attention's scores are as many as tokens x cells, for each head: 32 tokens of 131,072 would be hundreds of MB."""
    forward = llamacpp.LlamacppForward(model_folder.read(gguf("qwen2", "q4_0")), 2, 1 << 16, 256, 1, guesses=16)
    assert (forward.chunk, forward.scored) == (8, 8)
    wanted = [forward.prefill(0, PROMPT[: size + 1], 0).copy() for size in range(17)]
    assert np.array_equal(forward.score(0, PROMPT[:17], 0), np.stack(wanted))


def test_a_copied_row_goes_on_like_its_source(gguf: Maker) -> None:
    forward = load(gguf("qwen2", "q4_0"))
    forward.prefill(0, PROMPT[:64], 0)
    forward.copy(0, 2, 60)
    wanted = forward.prefill(0, [5, 6], 60).copy()
    assert np.array_equal(forward.prefill(2, [5, 6], 60), wanted)
    assert not np.array_equal(forward.prefill(1, [5, 6], 0), wanted)


def test_an_idle_row_keeps_what_it_holds(gguf: Maker) -> None:
    """Also where it holds all that an answer can leave: one less than the context."""
    forward = load(gguf("qwen2", "q4_0"))
    whole = [PROMPT[at % 400] for at in range(511)]
    for past in range(0, 511, 60):
        forward.prefill(1, whole[past : past + 60], past)
    wanted = forward.prefill(1, whole[500:], 500).copy()
    for slot in (0, 2):
        forward.prefill(slot, PROMPT[:9], 0)
    for length in range(9, 15):
        forward.decode(0, [5, 0, 5], [length, llamacpp.IDLE, length])
    assert np.array_equal(forward.prefill(1, whole[500:], 500), wanted)


def test_gguf_goes_to_llamacpp_and_nowhere_else(gguf: Maker, tiny: Path) -> None:
    folder = gguf("qwen2", "q4_0")
    for engine in ("onnxruntime", "genai", "openvino"):
        with pytest.raises(EngineRefusedError, match="--engine llamacpp"):
            choose.load(model_folder.read(folder), choose.EngineOptions(engine=engine, threads=1))
    with pytest.raises(EngineRefusedError, match="llamacpp reads GGUF"):
        choose.load(model_folder.read(tiny), choose.EngineOptions(engine="llamacpp", threads=1))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 500, "512 tokens in the vocabulary against 500"),
        ("num_hidden_layers", 3, "2 layers against 3"),
        ("max_position_embeddings", 4096, "512 tokens of context against 4096"),
    ],
)
def test_a_file_of_another_model_is_refused(gguf: Maker, tmp_path: Path, field: str, value: int, message: str) -> None:
    copy = shutil.copytree(gguf("qwen2", "q4_0"), tmp_path / "model")
    (copy / "config.json").write_text(json.dumps(random_decoder.config("qwen2") | {field: value}))
    with pytest.raises(EngineRefusedError, match=message):
        load(copy)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def of_no_model(data: bytes) -> bytes:
    return b"<html>" + data


def of_later_version(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", 99) + data[8:]


def endless(data: bytes) -> bytes:
    """More tensors than anyone has."""
    return data[:8] + struct.pack("<Q", 1 << 60) + data[16:]


@pytest.mark.parametrize("damage", [cut, of_no_model, of_later_version, endless, lambda _: b"", lambda data: data[:30]])
def test_a_damaged_file_is_refused_with_a_sentence(
    gguf: Maker, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    copy = shutil.copytree(gguf("qwen2", "q4_0"), tmp_path / "model")
    (copy / "model.gguf").write_bytes(damage((copy / "model.gguf").read_bytes()))
    with pytest.raises(EngineRefusedError, match=r"cannot read model\.gguf: (?!llama.cpp gives no reason)."):
        load(copy)


def test_other_files_beside_it_do_not_count_as_the_model(gguf: Maker, tmp_path: Path) -> None:
    copy = shutil.copytree(gguf("qwen2", "q4_0"), tmp_path / "model")
    (copy / "model.safetensors").write_bytes(bytes(10_000_000))
    assert model_folder.read(copy).model_bytes == (copy / "model.gguf").stat().st_size


def test_several_files_are_refused(gguf: Maker, tmp_path: Path) -> None:
    copy = shutil.copytree(gguf("qwen2", "q4_0"), tmp_path / "model")
    shutil.copy(copy / "model.gguf", copy / "model-00002-of-00002.gguf")
    with pytest.raises(model_folder.BadModelFolderError, match="holds 2 GGUF files"):
        model_folder.read(copy)


def test_one_part_of_a_split_file_is_refused(gguf: Maker, tmp_path: Path) -> None:
    copy = shutil.copytree(gguf("qwen2", "q4_0"), tmp_path / "model")
    (copy / "model.gguf").rename(copy / "model-00001-of-00002.gguf")
    with pytest.raises(model_folder.BadModelFolderError, match="one part of several"):
        model_folder.read(copy)


def test_what_cannot_be_written_as_gguf_is_refused(tiny: Path, tmp_path: Path) -> None:
    source = random_decoder.write(tmp_path / "source", "qwen2", tiny)
    for change, message in (
        ({"model_type": "gemma3"}, "none of llama"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotation is scaled"),
        ({"use_sliding_window": True}, "attention slides"),
    ):
        (source / "config.json").write_text(json.dumps(random_decoder.config("qwen2") | change))
        with pytest.raises(export_gguf.UnsupportedError, match=message):
            export_gguf.export(source, tmp_path / "out", "q4_0")
    assert not (tmp_path / "out/model.gguf").exists()


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel"}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": QWEN2}}, PLAIN], "qwen2"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}}, PLAIN], "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": r"\p{N}"}}, PLAIN], None),
        ([{"type": "Metaspace"}], None),
    ],
)
def test_how_text_is_cut_is_known_or_refused(steps: list[dict[str, object]], name: str | None) -> None:
    tokenizer = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    if name:
        assert export_gguf.split_name(tokenizer) == name
    else:
        with pytest.raises(export_gguf.UnsupportedError, match="its tokenizer"):
            export_gguf.split_name(tokenizer)


def test_a_library_with_other_records_is_refused() -> None:
    found = llama_library.load().call("llama_context_default_params")
    llama_library.check("llama_context_params", llama_library.CONTEXT_DEFAULTS, found)
    moved = llama_library.ContextParams.from_buffer_copy(bytes(8) + bytes(found)[:-8])
    with pytest.raises(EngineRefusedError, match=r"not as expected .*n_ctx"):
        llama_library.check("llama_context_params", llama_library.CONTEXT_DEFAULTS, moved)
    assert ctypes.sizeof(found) == len(bytes(moved))


def test_another_version_of_the_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library.importlib.metadata, "version", lambda name: "2031.1.1")
    with pytest.raises(EngineRefusedError, match=r"2031\.1\.1 is installed"):
        llama_library.load()


def test_a_machine_without_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library, "PACKAGE", "no-such-package")
    with pytest.raises(EngineRefusedError, match="extra llamacpp"):
        llama_library.load()


def test_a_cpu_that_the_wheel_cannot_run_on_is_known() -> None:
    assert llama_library.missing_instructions("flags\t: fma avx avx2 f16c bmi2\n") == set()
    assert llama_library.missing_instructions("flags\t: fma avx f16c\n") == {"avx2", "bmi2"}


def test_the_cache_that_does_not_fit_is_refused_with_the_numbers(gguf: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose.cgroup, "memory_limit", lambda: llamacpp.RUNTIME_BYTES + (1 << 20))
    with pytest.raises(choose.DoesNotFitError, match="200 slots x 512 tokens"):
        choose.load(model_folder.read(gguf("qwen2", "q4_0")), choose.EngineOptions(threads=1, slots=200))


@pytest.mark.parametrize("slots", [0, 1])
def test_the_second_row_of_a_lone_slot_is_planned_too(gguf: Maker, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """It is filled at start like the others: a pod that was planned with one row is killed there."""
    folder = model_folder.read(gguf("qwen2", "q4_0"))
    base, row = folder.model_bytes + llamacpp.RUNTIME_BYTES, folder.kv_bytes(512, llamacpp.KV_BYTES)
    options = choose.EngineOptions(threads=1, slots=slots)
    monkeypatch.setattr(choose.cgroup, "memory_limit", lambda: base + 2 * row - 1)
    with pytest.raises(choose.DoesNotFitError, match=r"2 rows \(the engine has no fewer\) x 512 tokens"):
        choose.load(folder, options)
    monkeypatch.setattr(choose.cgroup, "memory_limit", lambda: base + 2 * row)
    assert choose.load(folder, options).info.slots == (slots or 2)


def test_a_server_on_it_does_what_the_others_do(start: Callable[..., Server], gguf: Maker) -> None:
    server = start("--slots", "2", "--max-queue", "64", model=gguf("qwen2", "q4_0"))
    check_sampling_formats_and_leaving(server)
