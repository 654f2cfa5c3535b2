"""Wire bytes, API keys, settings, cgroup limits, the model folder, the sampler: pure tables."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from slmops_server import cgroup, model_folder, settings
from slmops_server.engines.base import Sampling
from slmops_server.engines.choose import DoesNotFitError, plan_slots
from slmops_server.engines.sampler import Sampler
from slmops_server.errors import ApiError
from slmops_server.keys import ApiKeys
from slmops_server.wire import Frames

V1_NONE = str((1 << 63) - 4096)


def test_a_chat_stream_byte_by_byte() -> None:
    frames = Frames("chat", "m", include_usage=True)
    frames._head = b'data: {"id":"x"'
    out = frames.role() + frames.text('a"\n') + frames.end("stop", 3, 2)
    head, tail = b'data: {"id":"x","choices":[', b'],"usage":null}\n\n'
    counts = b'{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":0}}'
    assert out == b"".join(
        [
            head,
            b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}',
            tail,
            head,
            b'{"index":0,"delta":{"content":"a\\"\\n"},"logprobs":null,"finish_reason":null}',
            tail,
            head,
            b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}',
            tail,
            head,
            b'],"usage":' + counts + b"}\n\n",
            b"data: [DONE]\n\n",
        ]
    )


def test_a_completion_stream_without_usage() -> None:
    frames = Frames("completions", "m")
    out = (frames.role() + frames.text("a") + frames.end("length", 3, 2)).split(b"\n\n")
    assert [json.loads(o[6:])["choices"][0] for o in out[:2]] == [
        {"index": 0, "text": "a", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"},
    ]
    assert out[2:] == [b"data: [DONE]", b""]
    assert "usage" not in json.loads(out[0][6:])


def test_keys_are_read_again_and_fail_closed(tmp_path: Path) -> None:
    clock = [0.0]
    keys = ApiKeys(tmp_path, clock=lambda: clock[0])

    def allowed(key: bytes | None) -> bool:
        clock[0] += 2
        try:
            keys.check(key)
        except ApiError as error:
            return error.code != "invalid_api_key"
        return True

    assert not allowed(b"Bearer one")  # no key at all
    (tmp_path / "team-a").write_text("one\n\ntwo\n")
    (tmp_path / "..data").mkdir()
    assert allowed(b"Bearer one")
    assert allowed(b"bearer two")
    assert not any(allowed(k) for k in (None, b"one", b"Basic one", b"Bearer ", b"Bearer three", b"Bearer \xff"))
    (tmp_path / "team-a").write_text("three\n")
    assert allowed(b"Bearer three")
    assert not allowed(b"Bearer one")
    (tmp_path / "team-a").unlink()
    assert not allowed(b"Bearer three")


def test_no_keys_folder_means_no_keys() -> None:
    ApiKeys(None).check(None)


def test_flags_win_over_the_environment() -> None:
    env = {
        "SLMOPS_SERVER_MODEL": "/m",
        "SLMOPS_SERVER_PORT": "9",
        "SLMOPS_SERVER_MAX_QUEUE": "3",
        "SLMOPS_SERVER_SERVED_NAME": "a, b",
    }
    got = settings.parse(["--port", "10"], env)
    assert (got.model, got.port, got.max_queue, got.served_names) == (Path("/m"), 10, 3, ("a", "b"))


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        ([], {}),
        (["--model", "m", "--port", "70000"], {}),
        (["--model", "m", "--slots", "-1"], {}),
        (["--model", "m"], {"SLMOPS_SERVER_ENGINE": "magic"}),
        (["--model", "m", "--drain-grace", "nan"], {}),
    ],
)
def test_bad_settings_exit_with_usage(argv: list[str], env: dict[str, str]) -> None:
    with pytest.raises(SystemExit) as caught:
        settings.parse(argv, env)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("files", "cpus", "memory"),
    [
        ({"cpu.max": "50000 100000", "memory.max": "1048576"}, 0.5, 1 << 20),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        (
            {
                "cpu/cpu.cfs_quota_us": "100000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "4096",
            },
            1.0,
            4096,
        ),
        (
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": V1_NONE,
            },
            None,
            None,
        ),
        ({}, None, None),
    ],
)
def test_limits_of_both_cgroup_versions(
    tmp_path: Path, files: dict[str, str], cpus: float | None, memory: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    machine = tmp_path / "none"
    assert cgroup.cpu_limit(tmp_path) == (cpus or cgroup.cpu_limit(machine))
    assert cgroup.memory_limit(tmp_path) == (memory or cgroup.memory_limit(machine))
    assert cgroup.threads(tmp_path) >= 1


def test_the_folder_is_read(tiny: Path) -> None:
    folder = model_folder.read(tiny)
    assert (folder.context_length, folder.vocab_size, folder.layers, folder.eos_ids) == (512, 512, 2, {2})
    assert folder.special_tokens["eos_token"] == "<|im_end|>"
    assert folder.kv_bytes(10) == 2 * 2 * 2 * 16 * 10 * 4


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda p: (p / "genai_config.json").unlink(), "genai_config.json is missing"),
        (lambda p: (p / "genai_config.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "genai_config.json").write_text('{"model": {}}'), "decoder-only"),
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda p: (p / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda p: shutil.rmtree(p), "is not a folder"),
    ],
)
def test_folders_that_cannot_be_served(tiny: Path, tmp_path: Path, breaking: object, message: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    breaking(copy)  # type: ignore[operator]
    with pytest.raises(model_folder.BadModelFolderError, match=message):
        model_folder.read(copy)


def test_slots_are_planned_from_memory(tiny: Path) -> None:
    folder = model_folder.read(tiny)
    row = folder.kv_bytes(512)
    base = folder.model_bytes + (200 << 20)
    assert plan_slots(folder, 512, 0, base + 100 * row) == 8
    assert plan_slots(folder, 512, 0, base + 3 * row) == 3
    with pytest.raises(DoesNotFitError, match="Raise the memory limit"):
        plan_slots(folder, 512, 5, base + 3 * row)
    with pytest.raises(DoesNotFitError):
        plan_slots(folder, 512, 0, base)


def logits(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def draws(sampling: Sampling, row: np.ndarray, count: int = 2000) -> dict[int, float]:
    sampler = Sampler(sampling, [], row.size)
    got = [sampler.pick(row.copy()) for _ in range(count)]
    return {t: got.count(t) / count for t in sorted(set(got))}


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    assert draws(Sampling(temperature=0), logits(1, 3, 3, 2), 3) == {1: 1.0}


def test_sampling_follows_the_probabilities() -> None:
    got = draws(Sampling(seed=1), np.log(logits(0.1, 0.2, 0.7)))
    assert got == pytest.approx({0: 0.1, 1: 0.2, 2: 0.7}, abs=0.03)


def test_temperature_sharpens() -> None:
    got = draws(Sampling(seed=1, temperature=0.5), np.log(logits(0.25, 0.75)))
    assert got == pytest.approx({0: 0.1, 1: 0.9}, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(seed=1, top_k=2), {2, 3}),
        (Sampling(seed=1, top_p=0.69), {2, 3}),
        (Sampling(seed=1, top_p=0.39), {3}),
        (Sampling(seed=1, top_p=1e-9), {3}),
        (Sampling(seed=1, min_p=0.6), {2, 3}),
        (Sampling(seed=1, top_k=3, top_p=0.75), {2, 3}),
    ],
)
def test_filters_keep_exactly_the_right_tokens(sampling: Sampling, kept: set[int]) -> None:
    assert set(draws(sampling, np.log(logits(0.1, 0.2, 0.3, 0.4)))) == kept


def test_a_seed_gives_the_same_tokens_again_and_another_seed_does_not() -> None:
    row = np.zeros(100, np.float32)
    one, again, other = (
        [s.pick(row.copy()) for _ in range(20)] for s in (Sampler(Sampling(seed=x), [], 100) for x in (-5, -5, 6))
    )
    assert one == again != other


def test_penalties() -> None:
    repeat = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [1], 3)
    assert [repeat.pick(logits(1, 3, 2)) for _ in range(3)] == [2, 1, 1]
    frequent = Sampler(Sampling(temperature=0, frequency_penalty=1.5), [1], 3)  # the prompt does not count here
    assert [frequent.pick(logits(1, 3, 2)) for _ in range(3)] == [1, 2, 1]


def test_nan_is_an_error_and_not_an_answer() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN"):
            Sampler(Sampling(temperature=temperature), [], 2).pick(logits(1, float("nan")))
