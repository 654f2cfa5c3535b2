"""Datasets: what is read, and what each fault is called."""
# ruff: noqa: E501  # tables: one row a line

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.api.meta import Dataset
from slmops_artifacts import Manifest, read_manifest
from slmops_trainer import data
from slmops_trainer.context import read_secret
from slmops_trainer.data import Example, Message
from slmops_trainer.failure import RunFailure

GOOD = '{"prompt": "p", "completion": "c"}\n'
CHAT = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


def read(tmp_path: Path, content: str | bytes, role: data.Role = "training", **dataset: Any) -> tuple[Example, ...]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return data.read(path, Dataset.model_validate({"uri": "pvc://data/x", **dataset}), role)[0]


FAULTS: list[tuple[str, str | bytes, dict[str, Any], str]] = [
    ("empty", "", {}, r"rows.jsonl holds no example"),
    ("blank", "\n  \n", {}, r"rows.jsonl holds no example"),
    ("not JSON", GOOD + "{prompt: 1}\n", {}, r"rows.jsonl, line 2 is not JSON \(Expecting property name"),
    ("cut off", GOOD + '{"prompt": "x', {}, r"line 2 is not JSON \(Unterminated string"),
    ("one array", '[{"prompt": "p"}]', {}, r"line 1 is a JSON array, not an object.*JSONL"),
    ("bare number", "12", {}, r"line 1 is a JSON number, not an object"),
    ("not UTF-8", GOOD.encode() + b'{"prompt": "\xff"}\n', {}, r"line 2 is not UTF-8 \(byte 13\)"),
    ("utf-16", GOOD.encode("utf-16"), {}, r"line 1 is not UTF-8 \(byte 1\)"),
    ("deep", "[" * 100_000, {}, r"line 1 is not JSON"),
    ("endless number", '{"prompt": ' + "1" * 5000 + "}", {}, r"line 1 is not JSON \(a number is too long\)"),
    ("a number for text", '{"prompt": 7, "completion": "c"}', {}, r"line 1: 'prompt' must be text, it is a JSON number"),
    ("mark of UTF-8 in the middle", GOOD.encode() + b"\xef\xbb\xbf" + GOOD.encode(), {}, r"line 2 is not JSON \(Unexpected UTF-8 BOM"),
    ("no known columns", '{"input": "p", "output": "c"}', {}, r"line 1 has neither 'messages' nor 'prompt' and 'completion'; it has 'input', 'output'.*dataset.columns"),
    ("prompt alone", '{"prompt": "p"}', {}, r"it has 'prompt'"),
    ("named column is missing", GOOD, {"columns": {"completion": "wanted"}, "format": "prompt-completion"}, r"line 1 has no column 'wanted'; it has 'prompt', 'completion'.*dataset.columns.completion"),
    ("column is missing later", GOOD + '{"prompt": "p"}', {}, r"line 2 has no column 'completion'; it has 'prompt'"),
    ("messages are missing", GOOD, {"format": "messages"}, r"line 1 has no column 'messages'"),
    ("completion is no text", '{"prompt": "p", "completion": {"a": 1}}', {}, r"'completion' must be text, it is a JSON object"),
    ("completion is null", '{"prompt": "p", "completion": null}', {}, r"'completion' must be text, it is a JSON null"),
    ("completion is empty", '{"prompt": "p", "completion": " "}', {}, r"line 1: 'completion' is empty"),
    ("half a surrogate", r'{"prompt": "\ud800", "completion": "c"}', {}, r"half a surrogate pair"),
    ("messages is text", '{"messages": "hello"}', {}, r"'messages' must be a list of turns"),
    ("messages is empty", '{"messages": []}', {}, r"'messages' must be a list of turns"),
    ("turn without content", '{"messages": [{"role": "user"}]}', {}, r"line 1, turn 1 must be an object with role and content"),
    ("sharegpt roles", '{"messages": [{"role": "human", "content": "q"}]}', {}, r"turn 1 has the role 'human'; known are system, user, assistant"),
    ("calls a tool", CHAT.replace('"a"', '"a", "tool_calls": [{"id": "1"}]'), {}, r"line 1, turn 2 has 'tool_calls', which would be left out"),
    ("calls a tool and says nothing", CHAT.replace('"a"', 'null, "tool_calls": [{"id": "1"}]'), {}, r"turn 2 has 'tool_calls'"),
    ("calls a function", CHAT.replace('"a"', '"a", "function_call": {"name": "f"}'), {}, r"turn 2 has 'function_call'"),
    ("thoughts aside", CHAT.replace('"a"', '"a", "reasoning_content": "hm"'), {}, r"turn 2 has 'reasoning_content', which would be left out. Write the thoughts into content"),
    ("thinks aside", CHAT.replace('"a"', '"a", "thinking": "hm"'), {}, r"turn 2 has 'thinking'"),
    ("reasons aside", CHAT.replace('"a"', '"a", "reasoning": "hm"'), {}, r"turn 2 has 'reasoning'"),
    ("tools", CHAT[:-2] + ', "tools": [{"type": "function"}]}', {}, r"line 1 has 'tools', which the model would not be shown. Remove the column"),
    ("functions", CHAT[:-2] + ', "functions": [{"name": "f"}]}', {}, r"line 1 has 'functions'"),
    ("half a weight", CHAT.replace('"a"', '"a", "weight": 0.5'), {}, r"turn 2 has the weight 0.5; an assistant's turn may have 0 or 1"),
    ("true for a weight", CHAT.replace('"a"', '"a", "weight": true'), {}, r"turn 2 has the weight true"),
    ("a table for a weight", CHAT.replace('"a"', '"a", "weight": {}'), {}, r"turn 2 has the weight {}"),
    ("a question of weight 1", CHAT.replace('"q"', '"q", "weight": 1'), {}, r"turn 1 has the weight 1; .*, others 0"),
    ("no answer", '{"messages": [{"role": "user", "content": "q"}]}', {}, r"the last turn must be the assistant's, it is the user's"),
    ("answers itself", '{"messages": [{"role": "assistant", "content": "a"}]}', {}, r"turn 1 is the assistant's, expected the user's"),
    ("late system turn", CHAT[:-3] + ', {"role": "system", "content": "s"}]}', {}, r"turn 3 is the system's, expected the user's"),
    ("system alone", '{"messages": [{"role": "system", "content": "s"}]}', {}, r"has no user turn"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "dataset", "message"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_faults_are_named_with_their_line(
    tmp_path: Path, content: str | bytes, dataset: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunFailure, match=message) as caught:
        read(tmp_path, content, **dataset)
    assert caught.value.reason == "BadDataset"
    assert not caught.value.retryable


def test_both_formats_are_told_by_their_columns(tmp_path: Path) -> None:
    pair = Example((Message("user", "p"),), "c", 1)
    assert read(tmp_path, GOOD) == (pair,)
    assert read(tmp_path, CHAT) == (Example((Message("user", "q"),), "a", 1),)
    renamed = '{"in": "p", "out": "c", "prompt": 1}'
    assert read(tmp_path, renamed, columns={"prompt": "in", "completion": "out"}) == (pair,)


def test_a_conversation_keeps_its_turns(tmp_path: Path) -> None:
    row = (
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q1"}, '
        '{"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]}'
    )
    (example,) = read(tmp_path, row)
    assert [turn["content"] for turn in example.turns] == ["s", "q1", "a1", "q2", "a2"]
    assert example.answer == "a2"


def test_weights_are_kept_and_what_is_empty_is_not_there(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "q1", "weight": 0, "tool_calls": None},
        {"role": "assistant", "content": "a1", "weight": 0, "tool_calls": [], "reasoning_content": ""},
        {"role": "user", "content": "q2", "weight": None},
        {"role": "assistant", "content": "a2", "weight": 1},
        {"role": "user", "content": "q3"},
        {"role": "assistant", "content": "a3", "weight": 0},
    ]
    row = json.dumps({"messages": turns, "tools": None})
    (example,) = read(tmp_path, row)
    assert example.weights == [0, 1, 0]
    assert read(tmp_path, json.dumps(example.row)) == (Example(example.messages, "a3", 1, 0),)
    # What is held out or asked anew counts, whatever its weight; of what is held out, nothing else does.
    roles: tuple[data.Role, ...] = ("evaluation", "prompts")
    assert [read(tmp_path, row, role)[0].weights for role in roles] == [[0, 0, 1], [0, 1, 1]]


def test_prompts_need_no_answers(tmp_path: Path) -> None:
    assert read(tmp_path, '{"prompt": "p"}\n' + GOOD, "prompts") == (
        Example((Message("user", "p"),), None, 1),
        Example((Message("user", "p"),), "c", 2),
    )
    assert read(tmp_path, '{"messages": [{"role": "user", "content": "q"}]}', "prompts")[0].answer is None


def test_what_editors_leave_behind_does_no_harm(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"\r\n\r\n" + GOOD.strip().encode()
    assert [example.line for example in read(tmp_path, content)] == [1, 4]


def test_limit_stops_reading(tmp_path: Path) -> None:
    assert len(read(tmp_path, GOOD * 3 + "broken", limit=2)) == 2


def test_leaks_are_found_over_case_white_space_and_composition() -> None:
    def ask(text: str, line: int) -> Example:
        return Example((Message("user", text),), "a", line)

    training = [ask("one", 1), ask("Two  words", 2), ask("two words", 3), ask("\u00c9t\u00e9", 4)]
    assert data.leaks(training, [ask("three", 1), ask(" TWO words", 2), ask("e\u0301te\u0301", 3)]) == [(2, 2), (4, 3)]
    assert training[3].messages[0].content == "\u00c9t\u00e9"  # it is trained on as it is given


@pytest.mark.parametrize(
    ("training", "held_out", "leaked"),
    [
        ("u1 a1 u2", "u1", True),  # the answer to an earlier turn is trained on as well
        ("u1 a1 u2", "U1 A1  U2", True),
        ("u1 a1 u2", "u1 a2 u2", False),
        ("u1 a1 u2", "u2", False),
        ("u1", "u1 a1 u2", False),  # what is held out is the last answer
        ("u1", "s1 u1", True),
        ("s1 u1", "u1", True),
        ("s1 u1", "S1 u1", True),
        ("s1 u1", "s2 u1", False),  # another system text makes another task of it
        ("s1 u1 a1 u2", "u1", True),
        ("s1 u1 a1 u2", "s2 u1", False),
    ],
)
def test_leaks_are_found_in_conversations(training: str, held_out: str, leaked: bool) -> None:
    roles = {"s": "system", "u": "user", "a": "assistant"}

    def talk(turns: str, line: int) -> Example:
        return Example(tuple(Message(roles[turn[0].lower()], turn) for turn in turns.split()), "a", line)

    others = talk("u8", 1), talk("s1 u9 a9 u8", 2)
    rows = [*others, talk(training, 3), talk(training, 4)]
    asked = [talk("s1 u7", 1), talk(held_out, 2), talk("u6", 3), talk(held_out, 4)]
    assert data.leaks(rows, asked) == ([(3, 2), (3, 4)] if leaked else [])


@pytest.mark.parametrize(
    ("files", "file", "message"),
    [
        (["a.jsonl", "b.jsonl"], None, r"holds 2 .jsonl files: a.jsonl, b.jsonl. Name one in dataset.file"),
        (["a.json"], None, r"holds 0 .jsonl files: none. Write one JSON object a line"),
        (["a.jsonl"], "b.jsonl", r"has no file 'b.jsonl'. Its .jsonl files: a.jsonl"),
    ],
)
def test_the_file_must_be_clear(
    tmp_path: Path, make_run: Any, files: list[str], file: str | None, message: str
) -> None:
    folder = tmp_path / "data/several"
    folder.mkdir()
    for name in files:
        (folder / name).write_text(GOOD)
    dataset = Dataset.model_validate({"uri": "pvc://data/several", "file": file})
    ctx = make_run()
    with pytest.raises(RunFailure, match=message):
        data.load(ctx, dataset, "training")
    assert not (ctx.work / "data-training").exists()  # it is said before anything is fetched


def test_of_several_files_the_one_that_is_read_is_fetched(tmp_path: Path, make_run: Any) -> None:
    folder = tmp_path / "data/several"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "deep/b.jsonl", "c.parquet"):
        (folder / name).write_text(GOOD)
    whole = read_manifest("pvc://data/several")
    assert whole is not None
    ctx = make_run()
    found = data.load(ctx, Dataset.model_validate({"uri": "pvc://data/several", "file": "deep/b.jsonl"}), "training")
    assert found.digest == whole.digest
    assert [path.name for path in (ctx.work / "data-training").rglob("*.*") if path.name[0] != "."] == ["b.jsonl"]


def test_an_artifact_that_is_refused_is_a_bad_dataset_and_no_model(tmp_path: Path, make_run: Any) -> None:
    folder = tmp_path / "data/pickled"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(GOOD)
    (folder / "rows.pkl").write_bytes(b"x")
    with pytest.raises(RunFailure, match=r"refused because of rows\.pkl") as caught:
        data.load(make_run(), Dataset.model_validate({"uri": "pvc://data/pickled"}), "training")
    assert caught.value.reason == "BadDataset"


def test_a_config_map_is_a_dataset(tmp_path: Path, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CONFIGMAP_ROOT", str(tmp_path))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.jsonl").write_text(GOOD)
    dataset = Dataset.model_validate({"configMap": {"name": "rows", "key": "train.jsonl"}})
    examples = data.load(make_run(), dataset, "training")
    assert len(examples.items) == 1
    assert examples.parent.uri == "configmap://rows/train.jsonl"
    assert examples.digest.startswith("sha256:")
    missing = Dataset.model_validate({"configMap": {"name": "rows", "key": "other"}})
    with pytest.raises(RunFailure, match="ConfigMap rows, key other is not there"):
        data.load(make_run(), missing, "training")


def test_a_lineage_names_the_commit_and_not_the_branch(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "hf://datasets/org/rows@" + "0" * 40
    ctx = make_run()

    def pulled(*_: object, **__: object) -> tuple[Path, Manifest]:
        (tmp_path / "rows.jsonl").write_text(GOOD)
        source = {"dev.slmops.source": commit}
        return tmp_path, Manifest(kind="dataset", digest="sha256:" + "1" * 64, annotations=source)

    monkeypatch.setattr(ctx, "pull", pulled)
    found = data.load(ctx, Dataset.model_validate({"uri": "hf://datasets/org/rows@main"}), "training")
    assert found.parent.uri == commit


def test_a_secret_that_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/HF_TOKEN").write_bytes(b"\xff\xfe")
    monkeypatch.setattr("slmops_trainer.context.SECRET_ROOT", str(tmp_path))
    with pytest.raises(RunFailure, match="Secret keys holds a value that is not text") as caught:
        read_secret("keys")
    assert caught.value.reason == "AccessDenied"


def test_an_artifact_is_a_dataset(make_run: Any, jsonl: Any) -> None:
    uri = jsonl([{"prompt": "p", "completion": "c"}])
    examples = data.load(make_run(), Dataset.model_validate({"uri": uri}), "training")
    assert examples.source == f"{uri}, file rows.jsonl"
    assert examples.parent.uri == uri
    with pytest.raises(RunFailure) as caught:
        data.load(make_run(), Dataset.model_validate({"uri": "pvc://data/none"}), "training")
    assert caught.value.reason == "SourceNotFound"
