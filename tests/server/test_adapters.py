"""LoRA adapters in the engine: the tokens of transformers and peft, what is refused, and how long one lives."""

import gc
import json
import random
import resource
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from slmops_server import model_folder
from slmops_server.engines import adapters, choose, kernels
from slmops_server.engines.adapters import BASE, BadAdapterError, Shelf, Tensors
from slmops_server.engines.base import Engine, EngineRefusedError, Job, Sampling

NAMES = ("all", "few")
Change = Callable[[Tensors], object]


@pytest.fixture(scope="module")
def data(tiny: Path) -> Path:
    return tiny.parent / "tiny-lora"


def load(data: Path, precision: str = "fp32", **options: Any) -> Engine:
    named = [(name, str(data / name)) for name in NAMES]
    given = {"engine": "onnxruntime", "threads": 1, "slots": 3, "adapters": named, **options}
    return choose.load(model_folder.read(data / precision), choose.EngineOptions(**given))


def run(engine: Engine, jobs: list[Job]) -> dict[int, list[int]]:
    got: dict[int, list[int]] = {job.id: [] for job in jobs}
    for job in jobs:
        engine.submit(job)
    while engine.busy:
        for token in engine.step():
            got[token.job].append(token.token)
    return got


def job(engine: Engine, number: int, prompt: list[int], name: str, tokens: int = 24) -> Job:
    adapter = engine.adapters.get(name)
    assert adapter is not None
    return Job(number, prompt, tokens, Sampling(temperature=0.0), ignore_eos=True, adapter=adapter)


def test_the_tokens_are_those_of_transformers_and_peft(data: Path) -> None:
    told = json.loads((data / "answers.json").read_text())
    engine = load(data, prefill_chunk=16)
    jobs, wanted = [], {}
    for name, answers in told["answers"].items():
        for prompt, answer in zip(told["prompts"], answers, strict=True):
            jobs.append(job(engine, len(jobs), prompt, name, len(answer)))
            wanted[jobs[-1].id] = answer
    random.Random(1).shuffle(jobs)
    assert run(engine, jobs) == wanted
    assert len({str(answers) for answers in told["answers"].values()}) == 3


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_no_adapter_is_an_adapter_of_zeros(data: Path, precision: str) -> None:
    engine = load(data, precision)
    forward = engine._forward  # type: ignore[attr-defined]
    prompt = list(range(3, 40))
    plain = forward.score(0, prompt, 0, BASE).copy()
    zeros = adapters.Adapter({i.name: zero(i, 5) for i in forward.lora.values()})
    assert np.array_equal(forward.score(1, prompt, 0, zeros), plain)


def zero(one: adapters.Input, rank: int) -> np.ndarray:
    return np.zeros((one.size, rank) if ".lora_A." in one.name else (rank, one.size), one.kind)


def test_a_prompt_continues_only_where_its_own_adapter_began(data: Path) -> None:
    engine = load(data)
    begin = [11, 400, 37, 255, 18] * 10

    def cached(number: int, name: str) -> int:
        engine.submit(job(engine, number, [*begin, number], name, 2))
        told = []
        while engine.busy:
            told += engine.step()
        return told[0].cached

    assert [cached(5, name) for name in ("all", "few", "")] == [0, 0, 0]
    assert [cached(6, name) for name in ("all", "few", "")] == [49, 49, 49]
    engine.adapters.load("all", data / "few")
    assert cached(7, "all") == 0


def test_an_answer_keeps_its_adapter_after_the_name_is_gone_and_frees_it_at_its_end(data: Path) -> None:
    engine = load(data)
    wanted = run(engine, [job(engine, 1, [5, 6, 7], "few", 30)])[1]
    one = job(engine, 2, [5, 6, 7], "few", 30)
    alive = weakref.ref(one.adapter)
    engine.submit(one)
    del one
    got = [token.token for token in engine.step()]
    engine.adapters.unload("few")
    assert engine.adapters.get("few") is None
    engine.adapters.load("few", data / "all")  # the name may be another's now
    while engine.busy:
        got += [token.token for token in engine.step()]
    assert got == wanted
    gc.collect()
    assert alive() is None


def test_adapters_fit_into_the_memory_that_is_left(data: Path) -> None:
    wanted = load(data)._forward.lora  # type: ignore[attr-defined]
    size = (data / "all" / "weights.onnx_adapter").stat().st_size
    shelf = Shelf(wanted, int(size * 1.5))
    shelf.load("all", data / "all")
    held = shelf.get("all")
    shelf.unload("all")
    with pytest.raises(BadAdapterError, match="memory limit leaves"):  # an answer still has it
        shelf.load("again", data / "all")
    del held
    shelf.load("again", data / "all")


def test_all_decode_calls_share_one_buffer_of_logits(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows there are, and adapters: nobody counts more of them against the memory limit."""
    monkeypatch.setattr(kernels, "library", str)  # with the server's operators there is but one binding an adapter
    engine = load(data, slots=8, adapters=[*((name, str(data / name)) for name in NAMES), ("again", str(data / "all"))])
    forward = engine._forward  # type: ignore[attr-defined]
    seen = []
    for name in ("", "again", *NAMES):
        adapter = engine.adapters.get(name)
        for rows in range(1, 9):
            for first in range(9 - rows):
                seen.append(forward.decode(first, [5] * rows, [0] * rows, adapter))
                assert seen[-1].shape == (rows, 512)
    assert len(seen) == 4 * 36
    assert all(np.shares_memory(logits, seen[0]) for logits in seen)


def rewritten(source: Path, folder: Path, change: Change) -> Path:
    held = ort.AdapterFormat.read_adapter(str(source))
    tensors = {name: value.numpy().copy() for name, value in held.get_parameters().items()}
    change(tensors)
    out = ort.AdapterFormat()
    out.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in tensors.items()})
    folder.mkdir()
    out.export_adapter(str(folder / "weights.onnx_adapter"))
    return folder


Q_A, Q_B = "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q_A), "has only one of"),
        (lambda t: t.update({Q_A: t[Q_A][:-1]}), r"is \[63, 4\], where the graph wants \[64, rank\]"),
        (lambda t: t.update({Q_B: np.ones((4, 65), np.float32)}), r"wants \[rank, 64\].*another base"),
        (lambda t: t.update({Q_A: t[Q_A][:, :2]}), "different ranks"),
        (lambda t: t.update({Q_A.replace(".0.", ".2."): t.pop(Q_A)}), "in 2 layers.*another base"),
        (lambda t: t.update({Q_A.replace("q_proj", "qkv"): t.pop(Q_A)}), "has no place in the graph"),
        (lambda t: t.update({"model.embed_tokens.weight": t[Q_A]}), "is no float LoRA weight"),
        (lambda t: t.update({Q_A: t[Q_A] * np.float32("nan")}), "no finite numbers"),
        (lambda t: t.update({Q_A: t[Q_A].astype(np.int64)}), "no finite numbers"),
        (lambda t: t.update({Q_A.replace("self_attn", "attn"): t[Q_A]}), "twice"),
        (lambda t: t.clear(), "no weights"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(
    data: Path, tmp_path: Path, change: Change, words: str
) -> None:
    engine = load(data, adapters=[("all", str(data / "all"))])
    bad = rewritten(data / "all" / "weights.onnx_adapter", tmp_path / "bad", change)
    with pytest.raises(BadAdapterError, match=words):
        engine.adapters.load("bad", bad)
    assert engine.adapters.get("bad") is None
    with pytest.raises(EngineRefusedError, match=f"--adapter bad: .*{words}"):
        load(data, adapters=[("bad", str(bad))])


def test_all_matrices_of_an_adapter_are_of_one_rank(data: Path, tmp_path: Path) -> None:
    """onnxruntime lets products with the same dimensions by name share memory; ranks and modules may differ."""
    engine = load(data)
    change = {Q_A: lambda a: np.hstack([a] * 2), Q_B: lambda b: np.vstack([b / 2] * 2)}
    ranks = rewritten(
        data / "all" / "weights.onnx_adapter",
        tmp_path / "ranks",
        lambda t: t.update({name: how(t[name]).astype(np.float32) for name, how in change.items()}),
    )
    engine.adapters.load("ranks", ranks)
    for name, rank in (("all", 4), ("few", 3), ("ranks", 8)):
        made = engine.adapters.get(name)
        assert made is not None
        assert {t.shape[1 if ".lora_A." in name else 0] for name, t in made.tensors.items()} == {rank}
        assert len(made.tensors) == 2 * 2 * 7
        assert made.bytes == sum(t.nbytes for t in made.tensors.values() if t.any()) + (
            0 if name != "few" else 4 * 3 * 128
        )
    got = run(engine, [job(engine, 1, [5, 6, 7], "ranks"), job(engine, 2, [5, 6, 7], "all")])
    assert got[1] == got[2]


def test_an_adapter_of_rank_one_does_not_depend_on_how_a_prompt_is_cut(data: Path, tmp_path: Path) -> None:
    engine = load(data)
    one = rewritten(
        data / "all" / "weights.onnx_adapter",
        tmp_path / "one",
        lambda t: t.update({name: v[:, :1] if ".lora_A." in name else v[:1] for name, v in t.items()}),
    )
    engine.adapters.load("one", one)
    forward, adapter = engine._forward, engine.adapters.get("one")  # type: ignore[attr-defined]
    prompt = list(range(3, 40))
    whole = forward.prefill(0, prompt, 0, adapter).copy()
    for cut in range(2, 35):
        forward.prefill(1, prompt[:cut], 0, adapter)
        assert np.array_equal(forward.prefill(1, prompt[cut:], cut, adapter), whole), cut


def test_an_adapter_in_half_precision_is_taken(data: Path, tmp_path: Path) -> None:
    engine = load(data)
    half = rewritten(
        data / "all" / "weights.onnx_adapter",
        tmp_path / "half",
        lambda t: t.update({name: value.astype(np.float16) for name, value in t.items()}),
    )
    engine.adapters.load("half", half)
    made = engine.adapters.get("half")
    assert made is not None
    assert {tensor.dtype for tensor in made.tensors.values()} == {np.dtype(np.float32)}


def of_ranks(data: Path, folder: Path, rank: int, first: int) -> Path:
    """An adapter of all modules with that rank, the first one with another."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            count = first if name in (Q_A, Q_B) else rank
            shape = (tensor.shape[0], count) if ".lora_A." in name else (count, tensor.shape[1])
            tensors[name] = np.full(shape, 0.01, np.float32)

    return rewritten(data / "all" / "weights.onnx_adapter", folder, change)


def test_what_an_adapter_would_take_is_known_before_it_is_taken(data: Path, tmp_path: Path) -> None:
    """A small file may become large, because all of its modules get the largest rank."""
    shelf = Shelf(load(data)._forward.lora, 4 << 20)  # type: ignore[attr-defined]
    folder = of_ranks(data, tmp_path / "mixed", 1, 4096)
    tracemalloc.start()
    with pytest.raises(BadAdapterError, match=r"needs 32\.0 MiB; the memory limit leaves 4\.0 MiB"):
        shelf.load("mixed", folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * (folder / "weights.onnx_adapter").stat().st_size


def test_an_adapter_is_not_there_twice_while_it_is_loaded(data: Path, tmp_path: Path) -> None:
    shelf = Shelf(load(data)._forward.lora, 1 << 30)  # type: ignore[attr-defined]
    folder = of_ranks(data, tmp_path / "large", 512, 512)
    tracemalloc.start()
    shelf.load("large", folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    made = shelf.get("large")
    assert made is not None
    assert peak < 1.4 * made.bytes


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_of_an_adapter_is_told_to_the_byte(data: Path, tmp_path: Path, name: str) -> None:
    """In half precision, which the graph wants in twice as many bytes."""
    wanted = load(data)._forward.lora  # type: ignore[attr-defined]
    half = rewritten(
        data / name / "weights.onnx_adapter",
        tmp_path / "half",
        lambda t: t.update({tensor: value.astype(np.float16) for tensor, value in t.items()}),
    )
    shelf = Shelf(wanted, 1 << 20)
    shelf.load("half", half)
    made = shelf.get("half")
    assert made is not None
    Shelf(wanted, made.bytes).load("half", half)
    with pytest.raises(BadAdapterError, match="memory limit leaves"):
        Shelf(wanted, made.bytes - 1).load("half", half)


@pytest.mark.parametrize("own", [True, False], ids=["with kernels", "without"])
def test_what_was_bound_for_one_adapter_makes_room_for_the_next(
    data: Path, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a KB for each input of each group of rows: without an end it is more than the adapters themselves."""
    if not own:
        monkeypatch.setattr(kernels, "library", str)
    forward = load(data, slots=8)._forward  # type: ignore[attr-defined]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def decode_all(adapter: adapters.Adapter) -> None:
        for rows in range(1, 9):
            for first in range(9 - rows):
                if hasattr(forward, "compute"):
                    forward.compute(range(first, first + rows), [[5]] * rows, [0] * rows, range(rows), adapter)
                else:
                    forward.decode(first, [5] * rows, [0] * rows, adapter)

    many = [adapters.Adapter({one.name: zero(one, 1) for one in forward.lora.values()}) for _ in range(25)]
    for adapter in many[:5]:
        decode_all(adapter)
    before = resident()
    for adapter in many[5:]:
        decode_all(adapter)
    assert resident() - before < 5 << 20


Limit = Callable[[int], None]


@pytest.fixture
def memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Sets the memory limit: bytes beside the model and the runtime."""
    base = model_folder.read(data / "fp32").model_bytes + choose.RUNTIME_BYTES

    def limit(left: int) -> None:
        monkeypatch.setattr(choose.cgroup, "memory_limit", lambda: base + left)

    return limit


def test_an_adapter_that_grew_since_it_was_loaded_is_lost_and_does_not_keep_the_engine_from_starting(
    data: Path, tmp_path: Path, memory: Limit, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_folder.read(data / "fp32")
    grown = of_ranks(data, tmp_path / "grown", 512, 512)
    memory(3 * folder.kv_bytes(folder.context_length, 4) + (1 << 20))
    loaded = [("grown", str(grown)), ("kept", str(data / "all"))]
    engine = load(data, adapters=[("few", str(data / "few"))], loaded=loaded)
    assert (engine.info.slots, engine.adapters.names) == (3, ["few", "kept"])
    assert "Lost an adapter name='grown' problem=" in caplog.text
    with pytest.raises(EngineRefusedError, match=r"--adapter grown: .*memory limit leaves"):
        load(data, adapters=[("grown", str(grown))])


@pytest.mark.parametrize("how", ["adapters", "loaded"])
def test_slots_that_are_not_asked_for_leave_the_adapters_their_place(
    data: Path, tmp_path: Path, memory: Limit, how: str
) -> None:
    """By what they take when they are served; all but the first slot make room."""
    half = rewritten(
        data / "all" / "weights.onnx_adapter",
        tmp_path / "half",
        lambda t: t.update({name: value.astype(np.float16) for name, value in t.items()}),
    )
    options = {"slots": 0, "max_model_len": 16, "adapters": [], "loaded": [], how: [("half", str(half))]}
    wide = load(data, **options)
    made = wide.adapters.get("half")
    assert made is not None
    row = model_folder.read(data / "fp32").kv_bytes(16, 4)
    for slots, left in ((8, 99 * row), (3, 3 * row), (2, 3 * row - 1), (1, row)):
        memory(made.bytes + left)
        engine = load(data, **options)
        assert (engine.info.slots, engine.adapters.names) == (slots, ["half"])
        assert engine.adapters.room - engine.adapters.used == left - slots * row
        jobs = [("half" if number % 2 else "", number) for number in range(5)]
        told = [run(one, [job(one, n, [5, 6, n], name, 9) for name, n in jobs]) for one in (engine, wide)]
        assert told[0] == told[1]
    memory(made.bytes + row - 1)
    if how == "loaded":
        assert load(data, **options).adapters.names == []
    else:
        with pytest.raises(EngineRefusedError, match=r"--adapter half: .*memory limit leaves"):
            load(data, **options)


def test_damaged_files_are_refused(data: Path, tmp_path: Path) -> None:
    """Any damage is told or does no harm: the engine process is not the one to find out."""
    shelf = Shelf(load(data)._forward.lora, 1 << 30)  # type: ignore[attr-defined]
    whole = (data / "few" / "weights.onnx_adapter").read_bytes()
    file = tmp_path / "a.onnx_adapter"
    draw, refused = random.Random(3), 0
    for _ in range(200):
        broken = bytearray(whole)
        if draw.random() < 0.5:
            del broken[draw.randrange(len(broken)) :]
        else:
            for _ in range(draw.randrange(1, 9)):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
        file.write_bytes(broken)
        try:
            shelf.load("x", tmp_path)
        except BadAdapterError:
            refused += 1
    assert refused >= 80


def test_a_folder_without_one_adapter_is_refused(data: Path, tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "none", "is not a folder"), (tmp_path, "has 0 .*onnx_adapter")):
        with pytest.raises(EngineRefusedError, match=words):
            load(data, adapters=[("x", str(folder))])
    for name in ("a", "b"):
        (tmp_path / f"{name}.onnx_adapter").write_bytes(b"")
    with pytest.raises(EngineRefusedError, match="has 2"):
        load(data, adapters=[("x", str(tmp_path))])


@pytest.mark.parametrize("more", [True, False])
def test_what_cannot_take_adapters_says_so(data: Path, tiny: Path, more: bool) -> None:
    named = [] if more else [("all", str(data / "all"))]
    options = {"threads": 1, "slots": 1, "adapters": named, "loaded": [] if more else None}

    def refused(folder: model_folder.ModelFolder, engine: str) -> str:
        with pytest.raises(EngineRefusedError) as told:
            choose.load(folder, choose.EngineOptions(engine=engine, **options))  # type: ignore[arg-type]
        return str(told.value)

    for engine in ("genai", "openvino"):
        assert refused(model_folder.read(data / "fp32"), engine).startswith(f"the engine {engine} takes no adapters")
    assert "openvino takes no adapters" in refused(model_folder.read(tiny.parent / "tiny-ir"), "auto")
    plain = refused(model_folder.read(tiny), "auto")
    assert "ExtractAdapters" in plain
    assert "genai" not in plain
    unfit = replace(model_folder.read(data / "fp32"), share_buffer=False)
    assert "need the engine onnxruntime, which refuses the model: the graph has no shared" in refused(unfit, "auto")
