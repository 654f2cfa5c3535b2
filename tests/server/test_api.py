"""The API through OpenAI's own client, and the refusals it shows to a user."""

import asyncio
import concurrent.futures
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from server_harness import TINY, Server, wait_for
from tokenizers import Tokenizer

MESSAGES = [{"role": "user", "content": "The printer failed again"}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "slmops"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=20)  # type: ignore[arg-type]
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (20, whole.usage.prompt_tokens + 20)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            temperature=0,
            max_completion_tokens=20,
            stream=True,  # type: ignore[arg-type]
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.prompt_tokens_details
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 2
    assert (
        chunks[-1].usage.model_copy(update={"prompt_tokens_details": whole.usage.prompt_tokens_details}) == whole.usage
    )
    assert all(c.usage is None for c in chunks[:-1])


def test_completions_from_text_and_from_ids(client: openai.OpenAI) -> None:
    text = client.completions.create(model="tiny", prompt="The printer", temperature=0)
    assert text.usage
    assert text.usage.completion_tokens == 16
    streamed = client.completions.create(model="tiny", prompt="The printer", temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == text.choices[0].text
    assert client.completions.create(model="tiny", prompt=[40, 41, 42], max_tokens=1).usage


def test_many_async_streams_at_once_get_what_each_gets_alone(server: Server) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=[number + 3, 40], max_tokens=30, temperature=0.7, seed=number, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            alone = [await one(n) for n in range(10)]
            together = await asyncio.gather(*(one(n) for n in range(10)))
            assert together == alone
            assert len(set(alone)) > 5

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_every_chunk_tells_the_tokens_so_far_where_that_is_asked_for(server: Server, kind: str) -> None:
    ask = server.chat if kind == "chat" else server.complete
    whole = ask(max_tokens=12, ignore_eos=True).json()
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames = ask(max_tokens=12, ignore_eos=True, stream=True, stream_options=options).text.split("\n\n")
    chunks = [json.loads(frame[6:]) for frame in frames if frame.startswith("data: {")]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    told = [tuple(chunk["usage"][name] for name in names) for chunk in chunks]
    prompt = whole["usage"]["prompt_tokens"]
    assert all(one == (prompt, made, prompt + made) for one, made in zip(told, [t[1] for t in told], strict=True))
    assert [made for _, made, _ in told] == sorted(made for _, made, _ in told)
    assert (told[0][1], told[-2][1], told[-1]) == (1, 12, tuple(whole["usage"][name] for name in names))
    assert len({made for _, made, _ in told}) > 6  # they grow with the text, not at its end
    assert (chunks[-1]["choices"], frames[-2:]) == ([], ["data: [DONE]", ""])


SAVED: dict[str, Callable[[Tokenizer], None]] = {
    "truncation": lambda tokenizer: tokenizer.enable_truncation(max_length=8),
    "padding": lambda tokenizer: tokenizer.enable_padding(length=64),
}


@pytest.mark.parametrize("saved", SAVED)
def test_a_prompt_is_read_whole_whatever_a_training_run_left_in_its_tokenizer(
    server: Server, start: Callable[..., Server], tmp_path: Path, saved: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    SAVED[saved](tokenizer)
    tokenizer.save(str(model / "tokenizer.json"))
    other = start("--slots", "4", model=model)
    line = "The customer writes that the printer on floor three has failed again and asks for help before Friday. "
    for text in ("The printer", line):
        both = [(one.complete(prompt=text).json(), one.chat(text).json()) for one in (other, server)]
        for told, expected in zip(*both, strict=True):
            assert told["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
            assert told["choices"] == expected["choices"]
    long = line * 200  # is tokenized in a thread; the refusal counts its tokens
    assert other.complete(prompt=long).json() == server.complete(prompt=long).json()


def test_stop_strings(server: Server) -> None:
    text = server.complete(max_tokens=30).json()["choices"][0]["text"]
    stop = text[9:12]
    got = server.complete(max_tokens=30, stop=[stop, "never"]).json()
    assert got["choices"][0] == {
        "index": 0,
        "text": text[: text.index(stop)],
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert got["usage"]["completion_tokens"] < 30
    frames = server.complete(max_tokens=30, stop=stop, stream=True).text.split("\n\n")
    sent = "".join(json.loads(f[6:])["choices"][0]["text"] for f in frames if f.startswith("data: {"))
    assert sent == text[: text.index(stop)]
    late = server.complete(max_tokens=30, stop=stop, min_tokens=29).json()["choices"][0]
    assert late["text"].startswith(text[: text.index(stop) + len(stop)])
    assert frames[-2:] == ["data: [DONE]", ""]


def test_the_wire(server: Server) -> None:
    answer = server.complete(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"]
    assert server.http.get("/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"


REFUSALS = [
    ("POST", "/v1/completions", b'{"model":"other","prompt":"x"}', 404, "model_not_found"),
    ("POST", "/v1/completions", b'{"model":"tiny","prompt":""}', 400, None),
    ("POST", "/v1/completions", b'{"model":"tiny","prompt":[512]}', 400, None),
    ("POST", "/v1/completions", b'{"model":"tiny","prompt":[-1]}', 400, None),
    ("POST", "/v1/completions", b'{"model":"tiny","prompt":"x","max_tokens":512}', 400, "context_length_exceeded"),
    (
        "POST",
        "/v1/completions",
        json.dumps({"model": "tiny", "prompt": [5] * 512}).encode(),
        400,
        "context_length_exceeded",
    ),
    (
        "POST",
        "/v1/completions",
        json.dumps({"model": "tiny", "prompt": "x" * 30000}).encode(),
        400,
        "context_length_exceeded",
    ),
    ("POST", "/v1/completions", b'{"model":"tiny","prompt":"\\ud800"}', 400, "invalid_json"),
    ("POST", "/v1/completions", b"\xff\xfe\x00", 400, "invalid_json"),
    ("POST", "/v1/completions", b"", 400, "invalid_json"),
    ("POST", "/v1/completions", b"[" * 100000, 400, "invalid_json"),
    ("POST", "/v1/completions", b'{"model":"tiny","prompt":"' + b"x" * (5 << 20) + b'"}', 413, "body_too_large"),
    ("POST", "/v1/chat/completions", b'{"model":"tiny","messages":[],"tools":[]}', 400, None),
    ("POST", "/v1/embeddings", b"{}", 400, None),
    ("POST", "/v1/embeddings", b'{"model":"other","input":"x"}', 404, "model_not_found"),
    ("POST", "/v1/embeddings", b'{"model":"tiny","input":"x"}', 400, "unsupported_model"),
    ("GET", "/v1/completions", b"", 405, "method_not_allowed"),
    ("DELETE", "/v1/models", b"", 405, "method_not_allowed"),
    ("GET", "/nothing", b"", 404, "unknown_url"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"), REFUSALS, ids=[f"{r[1]}-{r[2][:40]!r}" for r in REFUSALS]
)
def test_refusals_have_openais_shape_and_leave_the_server_well(
    server: Server, method: str, path: str, body: bytes, status: int, code: str | None
) -> None:
    before = server.metric("slmops_http_requests_total", code=str(status))
    answer = server.http.request(method, path, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    if path.startswith("/v1/"):
        assert server.metric("slmops_http_requests_total", code=str(status)) == before + 1
    assert server.probe("readyz") == 200
    assert server.idle


def test_a_chunked_body_over_the_limit_is_cut_off(server: Server) -> None:
    answer = server.http.post("/v1/completions", content=(b"x" * (1 << 20) for _ in range(6)))
    assert answer.status_code == 413


def test_metrics_count_what_happened(server: Server) -> None:
    names = (
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:time_per_output_token_seconds_count",
        "gen_ai_server_request_duration_seconds_count",
        "vllm:request_max_num_generation_tokens_sum",
    )

    def read() -> list[float]:
        return [
            *(server.metric(n, model_name="tiny") for n in names),
            server.metric("vllm:request_success_total", finished_reason="length", model_name="tiny"),
        ]

    before = read()
    server.complete(prompt=[40, 41, 42], max_tokens=5)
    server.complete(prompt=[40, 41, 42], max_tokens=5, stream=True)
    expected = [6, 10, 2, 2, 8, 8, 2, 10, 2]
    wait_for(lambda: [a - b for a, b in zip(read(), before, strict=True)] == expected, "both answers counted")


def test_requests_that_fail_are_measured_by_their_error(server: Server) -> None:
    asked = {
        ("400", ""): {"max_tokens": "many"},
        ("model_not_found", ""): {"model": "none"},
        ("context_length_exceeded", "tiny"): {"prompt": [40] * 600},
        ("invalid_grammar", "tiny"): {"structured_outputs": {"regex": "("}},
        ("", "tiny"): {"n": 3},
    }

    def read() -> dict[tuple[str, str], float]:
        name = "gen_ai_server_request_duration_seconds_count"
        labels = {"gen_ai_operation_name": "text_completion", "gen_ai_provider_name": "slmops"}
        return {
            (error, model): server.metric(name, error_type=error, gen_ai_request_model=model, **labels)
            for error, model in asked
        }

    before = read()
    for fields in asked.values():
        server.complete(**fields)
    assert {key: count - before[key] for key, count in read().items()} == dict.fromkeys(asked, 1)


def test_the_cache_is_told_in_blocks_as_vllm_does(server: Server) -> None:
    told = server.http.get("/metrics").text
    labels = 'block_size="16",kv_cache_size_tokens="2048",model_name="tiny",num_gpu_blocks="128"'
    assert f"vllm:cache_config_info{{{labels}}} 1.0" in told
    assert 'vllm:num_preemptions_total{model_name="tiny"} 0.0' in told


@pytest.mark.parametrize("probe", ["livez", "readyz", "startupz", "health", "healthz"])
def test_probes(server: Server, probe: str) -> None:
    answer = server.http.get(f"/{probe}")
    assert (answer.status_code, answer.json()["phase"]) == (200, "ready")


def test_usage_and_metrics_tell_the_tokens_taken_from_the_cache(server: Server) -> None:
    prompt = [77, 78, 79, 80] * 25
    hits = server.metric("vllm:prefix_cache_hits_total")
    queries = server.metric("vllm:prefix_cache_queries_total")
    cached = [
        server.complete(prompt=prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)
    ]
    assert cached == [0, 98]
    assert server.metric("vllm:prefix_cache_hits_total") == hits + 98
    assert server.metric("vllm:prefix_cache_queries_total") == queries + 200


def test_the_phases_of_a_request_add_up(start: Callable[..., Server]) -> None:
    server = start("--slots", "1", "--max-queue", "100")
    server.complete(prompt=[40] * 300, max_tokens=100, n=20, ignore_eos=True)
    wait_for(lambda: server.metric("vllm:request_success_total") == 20, "counted")
    queue, prefill, decode, inference, whole = (
        server.metric(f"vllm:{name}_seconds_sum")
        for name in (
            "request_queue_time",
            "request_prefill_time",
            "request_decode_time",
            "request_inference_time",
            "e2e_request_latency",
        )
    )
    assert min(queue, prefill, decode) > 0
    assert prefill + decode == pytest.approx(inference)
    assert queue + inference == pytest.approx(whole)
    # one slot: what one waits for is the time of those before it, so of an even inference each second counts for 9.5 of
    # 20 that wait on average; on a busy machine it is not even
    assert inference < queue < inference * 19
    assert server.metric("vllm:request_queue_time_seconds_count") == 20
    assert server.metric("vllm:prompt_tokens_cached_total") == server.metric("vllm:prefix_cache_hits_total") > 0
    assert server.metric("vllm:request_params_n_sum") == 20
    assert server.metric("vllm:request_params_max_tokens_sum") == 100
    assert server.metric("vllm:request_max_num_generation_tokens_sum") == 100
    assert server.metric("gen_ai_server_time_to_first_token_seconds_count") == 20
    assert server.metric("gen_ai_server_request_duration_seconds_count") == 1
    wait_for(lambda: server.metric("slmops_engine_step_tokens_total") >= 2000, "the engine's own counts")
    assert 0 < server.metric("slmops_engine_step_seconds_total") < whole
    steps = server.metric("slmops_engine_steps_total")
    assert steps >= 1900
    read = 20 * 300 - server.metric("vllm:prompt_tokens_cached_total")
    assert server.metric("vllm:iteration_tokens_total_sum") == read + 2000
    assert 1900 <= server.metric("vllm:iteration_tokens_total_count") <= steps
    assert server.metric("vllm:iteration_tokens_total_bucket", le="1.0") >= 1900
    assert server.metric("vllm:iteration_tokens_total_bucket", le="+Inf") == server.metric(
        "vllm:iteration_tokens_total_count"
    )


@pytest.mark.parametrize("seed", [7, -1])
def test_a_prompt_of_a_list_is_answered_as_alone(server: Server, seed: int) -> None:
    asked = {"seed": seed, "temperature": 1, "max_tokens": 20}
    alone = server.complete(prompt=[9, 40], **asked).json()["choices"][0]["text"]
    together = server.complete(prompt=[[3, 40], [9, 40]], **asked).json()["choices"]
    assert together[1]["text"] == alone
    assert together[0]["text"] != alone


def test_equal_prompts_of_a_list_are_answered_alike_under_a_seed_only(server: Server) -> None:
    asked = {"prompt": [[9, 40]] * 3, "n": 2, "temperature": 1, "max_tokens": 20}
    for fields, count in (({"seed": 7}, 2), ({}, 6)):
        choices = server.complete(**asked, **fields).json()["choices"]
        assert len(choices) == 6
        assert len({choice["text"] for choice in choices}) == count


def test_kv_use_is_what_running_answers_hold(start: Callable[..., Server]) -> None:
    server = start("--slots", "2")
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    seen = threading.Event()

    def busy() -> None:
        """2 of 2 slots, however fast they are: the engine tells of itself once in a while."""
        while not seen.is_set():
            assert server.complete(prompt=[40] * 128, max_tokens=128, n=60, ignore_eos=True).status_code == 200

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        many = pool.submit(busy)
        try:
            wait_for(lambda: 0.25 <= server.metric("vllm:kv_cache_usage_perc") <= 0.5, "from 128 to 256 of 512 tokens")
        finally:
            seen.set()
        many.result()
    wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, "nothing runs")


def test_requests_that_cannot_be_served_are_counted_by_reason(server: Server) -> None:
    def rejected(reason: str) -> float:
        return server.metric("slmops_rejected_requests_total", reason=reason)

    before = rejected("body_too_large")
    assert server.http.post("/v1/completions", content=b"x" * (5 << 20)).status_code == 413
    assert rejected("body_too_large") == before + 1
    assert "queue_full" in server.http.get("/metrics").text  # a rate needs a zero to start from


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_scores_the_prompt_and_makes_nothing(server: Server, stream: bool) -> None:
    ask = {"prompt": [40, 41, 42, 300], "echo": True, "logprobs": 2}
    streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    longer = server.complete(**ask, max_tokens=1).json()["choices"][0]
    answer = server.complete(**ask, max_tokens=0, **streaming)
    assert answer.status_code == 200
    if stream:
        frames = [json.loads(f[6:]) for f in answer.text.split("\n\n") if f.startswith("data: {")]
        choice, usage = frames[0]["choices"][0], frames[-1]["usage"]
        assert [f["choices"][0]["finish_reason"] for f in frames[:-1]] == [None, "length"]
    else:
        choice, usage = answer.json()["choices"][0], answer.json()["usage"]
        assert choice["finish_reason"] == "length"
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 0)
    assert len(choice["logprobs"]["tokens"]) == 4
    for name, values in choice["logprobs"].items():
        assert values == longer["logprobs"][name][:4]
    assert longer["text"].startswith(choice["text"])


def test_max_tokens_0_needs_echo(server: Server) -> None:
    for answer in (server.complete(max_tokens=0), server.chat(max_tokens=0)):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")


def test_embeddings_are_refused_in_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no embeddings") as caught:
        client.embeddings.create(model="tiny", input="x")
    assert caught.value.code == "unsupported_model"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="x")
