"""Wire bytes, API keys, settings, cgroup limits, the model folder: pure tables."""

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from server_harness import TINY

from slmops_server import cgroup, model_folder, settings
from slmops_server.engines.choose import DoesNotFitError, plan_slots
from slmops_server.errors import ApiError
from slmops_server.keys import ApiKeys
from slmops_server.schema import parse
from slmops_server.service import Service
from slmops_server.template import ChatTemplate
from slmops_server.tools import Call
from slmops_server.wire import Frames, TextLogprobs, chat_logprobs, error_frame

V1_NONE = str((1 << 63) - 4096)


def test_a_chat_stream_byte_by_byte() -> None:
    frames = Frames("chat", "m", include_usage=True)
    frames._head = b'data: {"id":"x"'
    out = frames.role() + frames.text('a"\n') + frames.finish("stop") + frames.end(3, 2, 1)
    head, tail = b'data: {"id":"x","choices":[', b'],"usage":null}\n\n'
    counts = b'{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":1}}'
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
    out = (frames.role() + frames.text("a") + frames.finish("length") + frames.end(3, 2, 0)).split(b"\n\n")
    assert [json.loads(o[6:])["choices"][0] for o in out[:2]] == [
        {"index": 0, "text": "a", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"},
    ]
    assert out[2:] == [b"data: [DONE]", b""]
    assert "usage" not in json.loads(out[0][6:])


def test_a_frame_is_one_line_for_everybody_and_says_the_same() -> None:
    """httpx cuts lines as str.splitlines does, at more than SSE's ends."""
    text = "a\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\u00c2\u0685\\\u2028b"
    named = Frames("chat", text)
    score = [text[:3].encode().decode("latin-1"), -0.5, []]
    made = [
        (Frames("completions", "m").text(text), lambda told: told["choices"][0]["text"]),
        (Frames("chat", "m").text(text), lambda told: told["choices"][0]["delta"]["content"]),
        (named.call(Call("x", "f", text), 0), _arguments),
        (named.finish("stop"), lambda told: told["model"]),
        (error_frame(ApiError(500, text).body()), lambda told: told["error"]["message"]),
    ]
    for frame, read in made:
        assert [line for line in frame.decode().splitlines() if line] == [frame.decode()[:-2]]
        assert read(json.loads(frame[6:])) == text
    scored = Frames("chat", "m").text("x", logprobs=chat_logprobs([score]))
    assert len(scored.decode().splitlines()) == 2
    assert json.loads(scored[6:])["choices"][0]["logprobs"]["content"][0]["token"] == text[:3]


def _arguments(told: Any) -> str:
    [call] = told["choices"][0]["delta"]["tool_calls"]
    return str(call["function"]["arguments"])


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
        (["--model", "m", "--speculate", "17"], {}),
        (["--model", "m"], {"SLMOPS_SERVER_ENGINE": "magic"}),
        (["--model", "m"], {"SLMOPS_SERVER_LOG_LEVEL": "loud"}),
        (["--model", "m", "--log-level", "INFO"], {}),
        (["--model", "m", "--slots", str(1 << 63)], {}),
        (["--model", "m", "--slots", "1" * 5000], {}),
        (["--model", ""], {}),
        (["--model", "m"], {"SLMOPS_SERVER_API_KEYS_DIR": ""}),
        (["--model", "\udcff"], {}),  # what os.environ and sys.argv make of bytes that are not UTF-8
        (["--model", "m", "--served-name", "a,\udcff"], {}),
        (["--model", "m", "--adapter-root", "\udcff"], {}),
        (["--model", "m", "--adapter", "\udcff=/x"], {}),
        (["--model", "m"], {"SLMOPS_SERVER_ADAPTER": "a=\udcff"}),
        (["--model", "m", "--drain-grace", "nan"], {}),
        (["--model", "m", "--step-timeout", "0"], {}),
        (["--model", "m", "--allowed-origins", "https://chat.example.com/"], {}),  # a browser sends none with a slash
        (["--model", "m", "--allowed-origins", "https://Chat.example.com"], {}),  # nor one like the next three
        (["--model", "m", "--allowed-origins", "https://chat.example.com:443"], {}),
        (["--model", "m", "--allowed-origins", "http://[::1]:80"], {}),
        (["--model", "m", "--allowed-origins", "https://*.example.com"], {}),
        (["--model", "m", "--allowed-origins", "*, chat.example.com"], {}),
        (["--model", "m", "--por", "1"], {}),  # abbreviations would get around what an operator reserves
    ],
)
def test_bad_settings_exit_with_usage(argv: list[str], env: dict[str, str]) -> None:
    with pytest.raises(SystemExit) as caught:
        settings.parse(argv, env)
    assert caught.value.code == 2


def test_origins_as_browsers_send_them() -> None:
    origins = ("https://chat.example.com:80", "http://[::80]", "http://localhost:443", "app://Some.page", "http://a_b")
    got = settings.parse(["--model", "m", "--allowed-origins", ", ".join(origins)], {})
    assert got.allowed_origins == origins


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


@pytest.mark.parametrize(
    ("own", "files", "cpus", "memory"),
    [
        (
            "0::/system.slice/slm.service",
            {
                "system.slice/slm.service/cpu.max": "max 100000",
                "system.slice/slm.service/memory.max": "8192",
                "system.slice/cpu.max": "25000 100000",
                "system.slice/memory.max": "1048576",
                "other.slice/memory.max": "1",
            },
            0.25,
            8192,
        ),
        ("0::/user.slice", {"user.slice/memory.max": "8192", "memory.max": "4096"}, None, 4096),
        (
            "4:memory:/docker/one\n3:cpu,cpuacct:/docker/two\n0::/docker/three",
            {
                "memory/docker/one/memory.limit_in_bytes": "8192",
                "memory/memory.limit_in_bytes": V1_NONE,
                "memory/docker/two/memory.limit_in_bytes": "1",
                "cpu/docker/two/cpu.cfs_quota_us": "50000",
                "cpu/docker/two/cpu.cfs_period_us": "100000",
            },
            0.5,
            8192,
        ),
        ("0::/../other", {"memory.max": "8192"}, None, 8192),  # moved out of its namespace
    ],
)
def test_limits_of_groups_that_are_not_the_root(
    tmp_path: Path, own: str, files: dict[str, str], cpus: float | None, memory: int
) -> None:
    """As of a systemd unit, and of containers that see the machine's groups."""
    root = tmp_path / "root"
    for name, text in {**files, "../other/memory.max": "1"}.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert cgroup.cpu_limit(root, tmp_path / "own") == (cpus or cgroup.cpu_limit(tmp_path / "none"))
    assert cgroup.memory_limit(root, tmp_path / "own") == memory


def test_the_folder_is_read(tiny: Path) -> None:
    folder = model_folder.read(tiny)
    assert (folder.context_length, folder.vocab_size, folder.layers, folder.eos_ids) == (512, 512, 2, {2})
    assert folder.special_tokens["eos_token"] == "<|im_end|>"
    assert folder.kv_bytes(10, 4) == 2 * 2 * 2 * 16 * 10 * 4


CONFIG = (TINY / "genai_config.json").read_text()
SHAPES = ("max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size")


def native(config: str) -> str:
    """Let a model in a pipeline bring a library."""
    told = json.loads(config)
    told["model"]["decoder"]["pipeline"] = [{"x": {"session_options": {"custom_ops_library": "weights.data"}}}]
    return json.dumps(told)


def hidden(config: str) -> str:
    """The same where Python's reader, which takes the last of two, would not see it."""
    return f'{config[:-1]}, "model": {json.dumps(json.loads(CONFIG)["model"])}}}'


def as_ir(folder: Path, more: dict[str, object]) -> None:
    """The files of an IR folder, as far as they are looked at before it is loaded."""
    (folder / "genai_config.json").unlink()
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (folder / name).touch()
    (folder / "config.json").write_text(json.dumps({"model_type": "x", **dict.fromkeys(SHAPES, 8), **more}))


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda p: (p / "genai_config.json").unlink(), "genai_config.json is missing"),
        (lambda p: (p / "genai_config.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "genai_config.json").write_text('{"model": {}}'), "decoder-only"),
        (lambda p: (p / "genai_config.json").write_text("[" * 99_999), "nested too deeply"),
        (lambda p: (p / "genai_config.json").write_text(CONFIG.replace("512", "1e999")), "decoder-only"),
        (
            lambda p: (p / "genai_config.json").write_text(native(CONFIG)),
            "genai_config.json is refused: custom_ops_lib",
        ),
        (lambda p: (p / "genai_config.json").write_text(hidden(native(CONFIG))), "custom_ops_library is set.*Remove"),
        (lambda p: (p / "genai_config.json").write_text(json.dumps(json.loads(CONFIG) | {"search": []})), "decoder"),
        (lambda p: (p / "genai_config.json").write_text(CONFIG.replace("eos_token_id", "x")), "no eos_token_id in"),
        (lambda p: as_ir(p, {"eos_token_id": 2, "attn_logit_softcapping": 50.0}), "optimum-intel leaves out"),
        (lambda p: as_ir(p, {"eos_token_id": None}), "no eos_token_id in .*: add the id of the token that ends an ans"),
        (lambda p: (p / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja cannot be read"),
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


@pytest.mark.parametrize(
    ("generation", "ids"),
    [({"eos_token_id": [3, 4]}, {3, 4}), ({"eos_token_id": 0}, {0}), ({"eos_token_id": None}, {7}), ({}, {7})],
)
def test_the_tokens_that_end_an_answer_are_found(
    tiny: Path, tmp_path: Path, generation: dict[str, object], ids: set[int]
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "model")
    as_ir(copy, {"eos_token_id": 7})
    (copy / "generation_config.json").write_text(json.dumps(generation))
    assert model_folder.read(copy).eos_ids == ids


LONG = {"max_position_embeddings": 64, "eos_token_id": 7}


@pytest.mark.parametrize(
    ("told", "context"),
    [
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 8}, 8),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 8}, 8),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8}}, 8),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64}, 64),
        ({"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8}}, 64),
        ({"rope_scaling": None}, 64),
    ],
)
@pytest.mark.parametrize("form", ["ir", "gguf"])
def test_other_forms_too_have_the_context_of_one_rotary_table(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, told: dict[str, object], context: int, form: str
) -> None:
    caplog.set_level("INFO")
    copy = shutil.copytree(tiny, tmp_path / "model")
    as_ir(copy, LONG | told)
    if form == "gguf":
        (copy / "openvino_model.xml").rename(copy / "model.gguf")
    assert model_folder.read(copy).context_length == context
    why = f"tokens={context} from=64: longer texts need rotary tables that are not used here, or not there"
    assert (why in caplog.text) == (context < 64)


def test_shapes_are_found_by_gpt_2s_names_too(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "model")
    as_ir(copy, {})
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 6, "n_positions": 1024, "vocab_size": 50257}
    (copy / "config.json").write_text(json.dumps(gpt2 | {"eos_token_id": 50256}))
    folder = model_folder.read(copy)
    assert (folder.layers, folder.kv_heads, folder.head_size, folder.context_length) == (6, 12, 64, 1024)


def test_a_template_that_is_no_text_is_none(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    (copy / "chat_template.jinja").unlink()
    for template, read in (("x", "x"), (["x"], None), ([{"name": "default", "template": "y"}], "y"), ({"a": 1}, None)):
        (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert model_folder.read(copy).chat_template == read


def test_requests_with_tools_may_have_a_template_of_their_own(tiny: Path, tmp_path: Path) -> None:
    """In either form that transformers writes and reads."""
    copy = shutil.copytree(tiny, tmp_path / "model")
    (copy / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    folder = model_folder.read(copy)
    assert (folder.chat_template, folder.tool_template) == ("a", "b")
    (copy / "chat_template.jinja").write_text("c")  # where the newer files are, the older field does not count
    folder = model_folder.read(copy)
    assert (folder.chat_template, folder.tool_template) == ("c", None)
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("d")
    folder = model_folder.read(copy)
    assert (folder.chat_template, folder.tool_template) == ("c", "d")


@pytest.mark.parametrize(("source", "warned"), [("{{ messages[0].content }}", False), ("{{ 1 / 0 }}", True)])
def test_a_template_that_renders_nothing_is_told_at_start(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, warned: bool
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "model")
    (copy / "chat_template.jinja").write_text(source)
    Service(settings.Settings(model=copy, served_names=("tiny",)))
    assert ("every chat is to be refused" in caplog.text) == warned
    assert ("ZeroDivisionError" in caplog.text) == warned


def test_slots_are_planned_from_memory(tiny: Path) -> None:
    folder = model_folder.read(tiny)
    row = folder.kv_bytes(512, 4)
    base = folder.model_bytes + (200 << 20)
    assert plan_slots(folder, 512, 0, base + 100 * row) == 8
    assert plan_slots(folder, 512, 0, base + 3 * row) == 3
    with pytest.raises(DoesNotFitError, match="Raise the memory limit"):
        plan_slots(folder, 512, 5, base + 3 * row)
    with pytest.raises(DoesNotFitError):
        plan_slots(folder, 512, 0, base)


WORDS = " ".join(str(number) for number in range(50_000))


@pytest.mark.parametrize("prompts", [[WORDS], [WORDS[:19_000]] * 8])  # of the latter none is long, all together are
def test_long_prompts_are_cut_beside_the_event_loop(tiny: Path, prompts: list[str]) -> None:
    service = Service(settings.Settings(model=tiny, served_names=("tiny",)))
    service.max_len = 1 << 30
    request = parse("completions", json.dumps({"model": "tiny", "prompt": prompts}).encode())

    async def cut() -> tuple[float, float]:
        """The longest time without a turn of the event loop, and the whole."""
        begin = last = time.monotonic()
        longest, cutting = 0.0, asyncio.ensure_future(service.prompts(request))
        while not cutting.done():
            await asyncio.sleep(0)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert len(await cutting) == len(prompts)
        return longest, last - begin

    longest, whole = asyncio.run(cut())
    assert longest < whole / 2


@pytest.mark.parametrize("length", [1, 30_000])  # of which the latter is cut beside the event loop
def test_half_a_character_in_a_prompt_is_a_400(tiny: Path, length: int) -> None:
    service = Service(settings.Settings(model=tiny, served_names=("tiny",)))
    service.template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.x }}", {})
    call = {"function": {"name": "f", "arguments": json.dumps({"x": "a" * length + "\ud83d"})}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    request = parse("chat", json.dumps({"model": "tiny", "messages": messages}).encode())
    with pytest.raises(ApiError, match="not valid Unicode") as caught:
        asyncio.run(service.prompts(request))
    assert caught.value.status == 400


def test_offsets_count_characters_though_tokens_share_them() -> None:
    tell, cut = TextLogprobs(), [piece.decode("latin-1") for piece in ("🤗".encode()[:2], "🤗".encode()[2:], b" a")]
    first = tell([[cut[0], -1.0, []]])
    then = tell([[piece, -1.0, []] for piece in cut[1:]])
    assert [first["text_offset"], then["text_offset"]] == [[0], [0, 1]]
