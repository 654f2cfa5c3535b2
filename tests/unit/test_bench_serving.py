"""The serving benchmark's arithmetic."""

import argparse
import shutil
import sysconfig
from pathlib import Path

import pytest

from kit import asking, bench_serving_front, serving_models
from kit.bench_serving import LEAST, Measured, known, quantile, requests
from kit.bench_serving_memory import slope
from kit.serving_servers import KINDS, Start, environment


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 3.0), (0.95, 4.0), (1.0, 4.0)])
def test_quantiles(share: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == value


def test_every_server_gets_the_same_requests_and_no_cache_helps() -> None:
    assert requests(4, 2, 1, 32000) == requests(4, 2, 1, 32000)
    assert [len(requests(streams, 2, 1, 32000)) for streams in (1, 4, 16)] == [LEAST, 8, 32]
    assert len(requests(4, 6, 1, 32000)) == 24
    rounds = [requests(streams, 2, number, 32000) for streams, number in ((4, 1), (4, 2), (8, 1))]
    others = [one for work in rounds for one in work]
    assert len({tuple(one.prompt[:2]) for one in others}) == len(others)
    assert all(32 <= len(one.prompt) <= 512 and 32 <= one.tokens <= 128 for one in others)


def test_times_of_an_answer_become_waits_and_gaps() -> None:
    measured = Measured()
    measured.note([[10.0, 10.5, 11.0, 13.0], [20.0, 21.0]])
    assert (measured.first, measured.gaps) == ([0.5, 1.0], [0.5, 2.0])


def test_a_row_holds_totals_and_the_range_of_the_rounds() -> None:
    measured = Measured(300, 3.0, first=[0.2, 0.1], gaps=[0.01, 0.03, 0.02], speeds=[90.0, 110.0], rss=7)
    assert measured.report() == {
        "tokens_per_second": 100.0,
        "tokens_per_second_min": 90.0,
        "tokens_per_second_max": 110.0,
        "ttft_p50": 0.2,
        "ttft_p95": 0.2,
        "itl_p50": 0.02,
        "itl_p99": 0.03,
        "rss_bytes": 7,
    }


def test_growth_is_that_of_the_second_half() -> None:
    assert slope([(1, 0), (2, 900), (3, 1000), (4, 1010)]) == pytest.approx(10)
    assert slope([(1, 0), (2, 900), (3, 1000), (4, 1000)]) == 0


def test_a_server_that_is_not_there_is_refused_with_those_that_are() -> None:
    assert known("openvino-bare,genai-static") == ["openvino-bare", "genai-static"]
    with pytest.raises(argparse.ArgumentTypeError, match="no such server: vllm; there are slmops-onnxruntime"):
        known("genai-static,vllm")


@pytest.mark.parametrize("name", KINDS)
def test_every_server_gets_the_same_threads_and_slots_and_its_own_port(name: str, tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text('{"max_position_embeddings": 1000}')
    tmp_path.joinpath("model.gguf").touch()
    command = KINDS[name].command(Start(Path("/p"), tmp_path, 8123, 21, 37))
    assert {"8123", "21", "37"} <= set(command)
    assert {str(tmp_path), str(tmp_path / "model.gguf")} & set(command)


@pytest.mark.skipif(
    sysconfig.get_platform() != "linux-x86_64" or not shutil.which("cc"), reason="needs a C compiler for x86-64"
)
def test_the_operators_are_compiled_once_for_each_state_of_their_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    shutil.copy(serving_models.KERNELS / "build.py", sources)
    header = sources / "a.h"
    header.write_text("int answer(void);\n")
    sources.joinpath("a.c").write_text('#include "a.h"\nint answer(void) { return 42; }\n')
    monkeypatch.setattr(serving_models, "KERNELS", sources)
    monkeypatch.setattr(serving_models, "LOCAL", tmp_path)
    monkeypatch.setattr(serving_models.packages, "ensure", lambda _: None)

    def compiled() -> Path:
        return Path(environment()["PYTHONPATH"].split(":")[-1]) / "slmops_kernels.so"

    first, made = compiled(), compiled().stat().st_mtime_ns
    assert (compiled(), first.stat().st_mtime_ns) == (first, made)
    header.write_text("int answer(void); // the same\n")
    assert compiled() != first


def test_the_cost_of_the_front_is_that_of_pairs_of_the_same_requests() -> None:
    assert bench_serving_front.requests(8, 1) == bench_serving_front.requests(8, 1)
    assert bench_serving_front.requests(8, 1) != bench_serving_front.requests(8, 2)
    speeds = {"bare": [100.0, 50.0, 80.0], "server": [98.0, 40.0, 79.2], "client": [1e-5, 3e-5, 2e-5]}
    line = bench_serving_front.line("onnxruntime", 8, speeds)
    assert line.endswith("server / bare 0.980 (0.890-0.985); client 20 us a token")
    one = bench_serving_front.line("x", 1, {"bare": [2.0], "server": [1.0], "client": [1e-6]})
    assert one.endswith("server / bare 0.500 (0.500-0.500); client 1 us a token")


HEAD = b'HTTP/1.1 200 OK\r\nx: "finish_reason":null\r\n\r\n'
FRAMES = HEAD + b'10\r\ndata: {"t":"a","finish_reason":null}\n\n\r\n' * 3


@pytest.mark.parametrize("size", [1, 7, 20, 50, 1000])
def test_tokens_are_counted_however_the_stream_is_cut(size: int) -> None:
    stream = FRAMES + b'9\r\ndata: {"t":"","finish_reason":"length"}\n\n\r\n'
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert sum(asking.tokens(pieces, frames=True)) == 3


def test_a_bare_answer_has_a_byte_for_each_token() -> None:
    pieces = [b"HTTP/1.0 200 OK\r\nserver: x\r\n", b"\r\n.", b"..", b"."]
    assert list(asking.tokens(pieces, frames=False)) == [1, 2, 1]


def test_a_refusal_ends_the_benchmark_with_what_the_server_says() -> None:
    with pytest.raises(SystemExit, match=r"HTTP/1\.1 503 Busy later"):
        list(asking.tokens([b"HTTP/1.1 503 Busy\r\nx: y\r\n\r\nlater"], frames=True))
