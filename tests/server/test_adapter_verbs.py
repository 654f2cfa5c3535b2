"""LoRA adapters by the API: chosen by `model`, listed, loaded and unloaded as vLLM does it."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from server_harness import Server, wait_for
from tokenizers import Tokenizer

from slmops_server import settings
from slmops_server.detok import DetokenizerFactory

Start = Callable[..., Server]
DATA = Path(__file__).parent / "data" / "tiny-lora"
ANSWERS = json.loads((DATA / "answers.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that may be loaded, one that is damaged, and ways out."""
    root = tmp_path_factory.mktemp("root")
    for name in ("all", "few"):
        shutil.copytree(DATA / name, root / name)
    (root / "inner").symlink_to(root / "all")
    (root / "out").symlink_to(DATA / "all")
    (root / "file-out").mkdir()
    (root / "file-out" / "weights.onnx_adapter").symlink_to(DATA / "all" / "weights.onnx_adapter")
    (root / "damaged").mkdir()
    (root / "damaged" / "weights.onnx_adapter").write_bytes((DATA / "all" / "weights.onnx_adapter").read_bytes()[:999])
    (root / "empty").mkdir()
    (root / "latin-\udcff").mkdir()  # a byte that is not UTF-8
    (root / "odd").symlink_to(root / "latin-\udcff")
    return root


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Server]:
    """With one adapter from the start; others come and go."""
    log = tmp_path_factory.mktemp("served") / "log"
    arguments = ["--adapter", f"few={DATA / 'few'}", "--adapter-root", str(root), "--slots", "4"]
    running = Server(log, *arguments, model=DATA / "fp32")
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing that a test loaded stays."""
    yield
    if "served" in request.fixturenames:
        server = request.getfixturevalue("served")
        for name in set(models(server)) - {"tiny", "few"}:
            assert unload(server, name).status_code == 200


def load(server: Server, name: object, path: object, **fields: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path if isinstance(path, str | int) else str(path), **fields}
    return server.http.post("/v1/load_lora_adapter", content=json.dumps(body))


def unload(server: Server, name: str) -> httpx.Response:
    return server.http.post("/v1/unload_lora_adapter", content=json.dumps({"lora_name": name}))


def models(server: Server) -> dict[str, dict[str, object]]:
    return {card["id"]: card for card in server.http.get("/v1/models").json()["data"]}


def text(server: Server, model: str, number: int = 2, **fields: object) -> str:
    response = server.complete(model=model, prompt=ANSWERS["prompts"][number], max_tokens=16, ignore_eos=True, **fields)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def told(name: str, number: int = 2) -> str:
    """What transformers and peft answered, as the server spells it."""

    pieces = DetokenizerFactory(Tokenizer.from_file(str(DATA / "fp32" / "tokenizer.json"))).new()
    return "".join(pieces.feed(token) for token in ANSWERS["answers"][name][number][:16])


def test_the_model_field_chooses(served: Server) -> None:
    for model, name in (("tiny", ""), ("few", "few")):
        answer = text(served, model)
        assert answer.rstrip("\ufffd") == told(name).rstrip("\ufffd")
    whole = served.complete(model="few").json()
    assert whole["model"] == "few"
    assert served.chat(model="few").status_code == 200
    assert served.complete(model="other").status_code == 404
    assert "tiny, few" in served.complete(model="other").json()["error"]["message"]


def test_adapters_are_listed_with_their_base(served: Server) -> None:
    cards = models(served)
    assert list(cards) == ["tiny", "few"]
    assert (cards["tiny"]["parent"], cards["few"]["parent"]) == (None, "tiny")
    assert cards["few"]["root"] == str(DATA / "few")
    assert served.http.get("/v1/models/few").json() == cards["few"]


@pytest.mark.parametrize("path", ["all", "inner", "./all", "absolute"])
def test_loaded_used_and_unloaded(served: Server, root: Path, path: str) -> None:
    loaded = load(served, "more/one", root / "all" if path == "absolute" else path)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'more/one' added successfully.")
    assert text(served, "more/one").rstrip("\ufffd") == told("all").rstrip("\ufffd")
    assert models(served)["more/one"]["parent"] == "tiny"
    assert served.http.get("/v1/models/more/one").json()["root"] == str(root / "all")
    gone = unload(served, "more/one")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'more/one' removed successfully.")
    assert served.complete(model="more/one").status_code == 404
    assert "more/one" not in models(served)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("../all", 400, "leads out"),
        ("all/../all", 400, "leads out"),
        ("out", 400, "leads out"),
        ("file-out", 400, "leads out"),
        ("/etc", 400, "leads out"),
        ("/no/such/folder", 400, "leads out"),
        ("missing", 404, "No adapter found for 'missing'"),
        ("all/weights.onnx_adapter", 404, "No adapter found"),
        ("nul\0", 404, "No adapter found"),
        ("x" * 5000, 404, "No adapter found"),
        ("odd", 404, "No adapter found for 'odd'"),
        ("empty", 400, "has 0 *.onnx_adapter files"),
        ("damaged", 400, "may be damaged"),
        ("", 400, "must be provided"),
        (7, 400, "must be provided"),
    ],
)
def test_paths_that_are_refused(served: Server, path: object, status: int, words: str) -> None:
    refused = load(served, "x", path)
    assert refused.status_code == status
    assert words in refused.json()["error"]["message"]
    assert list(models(served)) == ["tiny", "few"]


def test_names_that_are_refused(served: Server) -> None:
    for name, words in (
        ("tiny", "base model's"),
        ("few", "has already been loaded"),
        ("", "provided"),
        (3, "provided"),
        ("one,other", "a comma"),
        ("x" * 257, "257 characters"),
    ):
        refused = load(served, name, "all")
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]
    assert unload(served, "tiny").status_code == 404
    assert unload(served, "no").json()["error"]["message"] == "The lora adapter 'no' cannot be found."
    assert served.http.post("/v1/unload_lora_adapter", content=b"{}").status_code == 400
    assert load(served, "x", "all", scale=2).json()["error"]["code"] == "unknown_parameter"
    assert load(served, "x", "all", load_inplace=1).status_code == 400
    assert served.http.post("/v1/load_lora_adapter", content=b"{").json()["error"]["code"] == "invalid_json"
    assert served.http.get("/v1/load_lora_adapter").status_code == 405


def test_a_name_may_be_given_another_adapter_in_place(served: Server) -> None:
    assert load(served, "one", "all").status_code == 200
    assert load(served, "one", "damaged", load_inplace=True).status_code == 400
    assert text(served, "one").rstrip("\ufffd") == told("all").rstrip("\ufffd")
    assert load(served, "one", "few", load_inplace=True).status_code == 200
    assert text(served, "one").rstrip("\ufffd") == told("few").rstrip("\ufffd")


def test_of_two_that_load_one_name_one_is_told_that_it_is_taken(served: Server) -> None:
    seen: list[int] = []
    clients = [threading.Thread(target=lambda: seen.append(load(served, "one", "all").status_code)) for _ in range(6)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert sorted(seen) == [200] + [400] * 5


def test_a_stream_keeps_its_adapter_when_it_is_unloaded(served: Server) -> None:
    assert load(served, "one", "all").status_code == 200
    body = {"model": "one", "prompt": [5, 6, 7], "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    wanted = served.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    got = ""
    with served.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = stream.iter_lines()
        got += json.loads(next(lines)[6:])["choices"][0]["text"]
        assert unload(served, "one").status_code == 200
        assert load(served, "one", "few").status_code == 200
        for line in lines:
            if line.startswith("data: {"):
                got += json.loads(line[6:])["choices"][0]["text"]
    assert got == wanted


def test_answers_of_all_adapters_side_by_side_are_those_of_each_alone(served: Server) -> None:
    assert load(served, "all", "all").status_code == 200
    wanted = {(name, n): text(served, name, n) for name in ("tiny", "few", "all") for n in range(4)}
    got: dict[tuple[str, int], str] = {}

    def ask(key: tuple[str, int]) -> None:
        got[key] = text(served, *key)

    clients = [threading.Thread(target=ask, args=(key,)) for key in wanted]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert got == wanted
    assert len({got[name, 2] for name in ("tiny", "few", "all")}) == 3


def test_routers_see_which_adapters_run_and_wait(start: Start) -> None:
    server = start("--adapter", f"few={DATA / 'few'}", "--slots", "1", model=DATA / "fp32")

    def told(**labels: str) -> bool:
        return server.metric("vllm:lora_requests_info", max_lora="1", **labels) > 0

    assert told(running_lora_adapters="", waiting_lora_adapters="")
    body = {"prompt": [5], "max_tokens": 500, "temperature": 0, "ignore_eos": True, "stream": True, "n": 20}
    with (
        server.http.stream("POST", "/v1/completions", json={**body, "model": "tiny"}) as running,
        httpx.Client(base_url=server.url, timeout=30) as other,
    ):
        lines = running.iter_lines()  # the stream is closed with it
        next(lines)
        client = threading.Thread(target=lambda: other.post("/v1/completions", json={**body, "model": "few"}).read())
        client.start()
        wait_for(lambda: told(running_lora_adapters="", waiting_lora_adapters="few"), "the adapter waits")
        running.close()
        wait_for(lambda: told(running_lora_adapters="few", waiting_lora_adapters="few"), "the adapter runs")
        client.join()


def test_series_of_an_adapter_end_with_it(served: Server) -> None:
    """Or their number grew with that of all that ever were."""
    assert load(served, "passing", "all").status_code == 200
    assert served.complete(model="passing").status_code == 200
    assert served.complete(model="passing", prompt=[4] * 10_000).status_code == 400
    count = "gen_ai_server_request_duration_seconds_count"
    kept = served.metric(count, gen_ai_request_model="tiny")
    assert served.metric(count, gen_ai_request_model="passing", error_type="") == 1
    assert served.metric(count, gen_ai_request_model="passing", error_type="context_length_exceeded") == 1
    assert unload(served, "passing").status_code == 200
    assert "passing" not in served.http.get("/metrics").text
    assert served.complete(model="tiny").status_code == 200
    assert served.metric(count, gen_ai_request_model="tiny") == kept + 1


def test_adapters_outlive_the_engine(start: Start, root: Path, tmp_path: Path) -> None:
    """A new engine has those that were there, but one whose folder has gone, and none that was unloaded."""
    copy = tmp_path / "root"
    shutil.copytree(root, copy, symlinks=True)
    arguments = ["--adapter", f"few={DATA / 'few'}", "--adapter", f"first={DATA / 'few'}", "--adapter-root", str(copy)]
    server = start(*arguments, "--slots", "2", model=DATA / "fp32")
    assert load(server, "one", "all").status_code == 200
    assert load(server, "lost", "few").status_code == 200
    assert unload(server, "first").status_code == 200
    shutil.rmtree(copy / "few")
    wanted = {name: text(server, name) for name in ("tiny", "few", "one")}
    pid = server.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.engine_pid not in (None, pid) and server.probe("readyz") == 200, "a new engine is ready")
    assert list(models(server)) == ["tiny", "few", "one"]
    assert {name: text(server, name) for name in wanted} == wanted
    assert server.complete(model="lost").status_code == 404
    assert "Lost an adapter name='lost'" in server.log.read_text()


def test_without_a_root_the_verbs_are_off(start: Start) -> None:
    server = start("--adapter", f"few={DATA / 'few'}", "--slots", "1", model=DATA / "int4")
    assert text(server, "few") != text(server, "tiny")
    for answer in (load(server, "x", str(DATA / "all")), unload(server, "few")):
        assert answer.status_code == 404
        assert "--adapter-root DIR" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter", "x=/no/such"], "--adapter x: /no/such is not a folder"),
        (["--adapter-root", "/no/such"], "--adapter-root /no/such is not a folder"),
        (["--adapter", f"x={DATA / 'all'}", "--engine", "genai"], "the engine genai takes no adapters"),
    ],
)
def test_a_server_that_cannot_have_its_adapters_ends_with_the_reason(
    start: Start, arguments: list[str], words: str
) -> None:
    server = start(*arguments, "--slots", "1", model=DATA / "fp32", ready=False)
    assert server.process.wait(60) == 1
    log = server.log.read_text()
    assert words in log
    assert "Traceback" not in log


def test_names_and_folders_from_flags_and_from_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    env = {"SLMOPS_SERVER_ADAPTER": "a=/x,b=/y=z"}
    given = ["--model", "/m", "--served-name", "base,other"]
    assert settings.parse(given, env).adapters == (("a", Path("/x")), ("b", Path("/y=z")))
    assert settings.parse([*given, "--adapter", "c=/z"], env).adapters == (("c", Path("/z")),)
    for bad, words in (
        (["--adapter", "c"], "'c' is not NAME=DIR"),
        (["--adapter", "=/x"], "is not NAME=DIR"),
        (["--adapter", "a,b=/x"], "the name 'a,b' has a comma"),
        (["--adapter", f"{'x' * 257}=/x"], "has 257 characters, 256 are allowed"),
        (["--adapter", "a=/x", "--adapter", "a=/y"], "--adapter a: the name is taken"),
        (["--adapter", "other=/x"], "--adapter other: the name is taken"),
    ):
        with pytest.raises(SystemExit):
            settings.parse([*given, *bad], {})
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        settings.parse(given, {"SLMOPS_SERVER_ADAPTER": "a"})
    assert "SLMOPS_SERVER_ADAPTER: 'a' is not NAME=DIR" in capsys.readouterr().err
