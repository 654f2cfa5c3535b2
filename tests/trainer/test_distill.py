"""Whole distillation runs: a real HTTP teacher, a tiny student, the store."""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from fake_teacher import FakeTeacher, Fault, answer
from tiny import CHATML, EMPTY_THOUGHTS, chat, task, write_model
from transformers import AutoTokenizer

from slmops.api.run import EXIT_INTERRUPTED
from slmops_artifacts import read_manifest
from slmops_trainer import answers, chat_text, distill, teacher, train
from slmops_trainer.context import Context
from slmops_trainer.data import Example, Message
from slmops_trainer.failure import RunFailure

RIGHT = {question: answer for question, answer in task() if "kitchen" in question or "lab" in question}
GOLD = [(f"{question}!", answer) for question, answer in RIGHT.items()]  # other words for what is taught
TEACHER_DIGEST = "sha256:" + "7" * 64
BASE_DIGEST = "sha256:" + "8" * 64


def knows(question: str) -> str:
    """The teacher: right about everything but heaters."""
    return RIGHT[question.rstrip("!")].replace("heater", "oven")


@pytest.fixture
def job(jsonl: Callable[..., str]) -> Callable[..., dict[str, Any]]:
    """A spec; `data`, `training` and `evaluation` are merged into what it has."""
    prompts = jsonl([{"prompt": question} for question in RIGHT], "prompts")
    gold = jsonl([chat(*row) for row in GOLD], "gold")

    def make(fake: FakeTeacher, **more: Any) -> dict[str, Any]:
        spec = {
            "teacher": {"deploymentRef": {"name": "big"}},
            "student": {"uri": "pvc://models/tiny"},
            "taskType": "extraction",
            "data": {"prompts": {"uri": prompts}, **more.pop("data", {})},
            "training": {"maxSteps": 2, "learningRate": 5e-3, "batchSize": 8, **more.pop("training", {})},
            "evaluation": {
                "dataset": {"uri": gold},
                "metrics": ["exactMatch", "fieldMatch", "perplexity"],
                "maxTokens": 40,
                **more.pop("evaluation", {}),
            },
            **more,
        }
        teacher = {
            "url": fake.url,
            "model": "big",
            "name": "ModelDeployment/big",
            "lineage": [
                {"kind": "model", "uri": "oci://r/big:1", "digest": TEACHER_DIGEST, "name": "QuantizedModel/big"},
                {"kind": "model", "uri": "hf://o/base@1", "digest": BASE_DIGEST},
            ],
        }
        return {"distill": spec, "teacher": teacher, "name": "student", "uid": "0123abcd-4567"}

    return make


def test_a_student_learns_from_its_teacher_and_both_are_measured(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with FakeTeacher(knows) as fake:
        spec = job(fake, training={"maxSteps": 100, "seed": 7, "batchSize": 16, "learningRate": 1e-2})
        spec["teacher"]["url"] += "?key=s3cret"
        ctx = make_run(**spec)
        result = distill.run(ctx)
    assert result.succeeded
    left = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert left == []
    assert result.format == "safetensors"
    found = result.metrics
    share = sum("heater" not in question for question, _ in GOLD) / len(GOLD)
    assert found["teacher_exactMatch"] == pytest.approx(share)  # it is wrong about heaters, and so is its student
    assert found["base_exactMatch"] == 0
    assert found["teacher_share_fieldMatch"] == pytest.approx(found["fieldMatch"] / found["teacher_fieldMatch"])
    assert found["fieldMatch"] > 0.5
    assert "teacher_perplexity" not in found  # an endpoint that gives no logits has none
    assert found["perplexity"] < found["base_perplexity"] / 10
    assert (found["prompts"], found["answers"], found["kept"], found["teacher_tokens"]) == (16, 16, 16, 16 * 7)
    assert list(found)[:6] == ["exactMatch", "fieldMatch", "perplexity", "teacher_exactMatch", "teacher_fieldMatch",
                               "teacher_share_exactMatch"]  # fmt: skip
    greedy = [request for request in fake.requests if request["temperature"] == 0]
    assert len(greedy) == len(GOLD)
    assert not any("seed" in request for request in greedy)
    assert ctx.board.progress.percent >= 95
    _check_lineage(tmp_path, result.lineage)


def _check_lineage(tmp_path: Path, lineage: list[Any]) -> None:
    data = read_manifest("pvc://store/out-data-0123abcd")
    assert data is not None
    assert (data.kind, data.format) == ("dataset", "jsonl")
    assert [row.digest for row in data.parents][1] == TEACHER_DIGEST
    assert data.metrics["kept"] == 16
    assert data.recipe["teacher"]["model"] == "big"
    assert data.recipe["teacher"]["url"].endswith("/v1")
    first = json.loads((tmp_path / "store/out-data-0123abcd/train.jsonl").read_text().splitlines()[0])
    assert first == chat(*next(iter(RIGHT.items())))
    student = read_manifest("pvc://store/out")
    assert student is not None
    assert student.dataset_digest == data.digest
    assert [row.kind for row in student.parents] == ["model", "dataset"]
    digests = [row.digest for row in lineage]
    assert digests[1] == data.digest
    assert {TEACHER_DIGEST, BASE_DIGEST} <= set(digests)
    assert "teacher_exactMatch" in (tmp_path / "store/out/README.md").read_text()


def test_a_pod_lost_in_training_goes_on_in_training(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTeacher(knows) as fake:
        spec = job(fake, training={"maxSteps": 6})
        first = make_run(**spec)
        one_step = train._Run.one_step

        def stop_after_three(run: Any) -> None:
            one_step(run)
            if run.counters.step == 3:
                first.stop.set()

        monkeypatch.setattr(train._Run, "one_step", stop_after_three)
        with pytest.raises(RunFailure) as caught:
            distill.run(first)
        assert caught.value.exit_code == EXIT_INTERRUPTED
        requests = len(fake.requests)
        assert requests == 16 + len(GOLD)
        monkeypatch.setattr(train._Run, "one_step", one_step)
        steps: list[int] = []
        monkeypatch.setattr(train._Run, "one_step", lambda run: (steps.append(run.counters.step), one_step(run))[1])
        result = distill.run(make_run(**spec))
        assert steps == [3, 4, 5]
        assert len(fake.requests) == requests  # the teacher heard nothing of it
        assert result.metrics["kept"] == 16
        assert result.metrics["teacher_exactMatch"] > 0.8
        assert distill.run(make_run(**spec)) == result  # a third pod finds the work done
        assert len(fake.requests) == requests


def test_a_teacher_that_left_a_question_open_is_not_needed_in_training(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = lambda _, question, __: Fault(400, "flagged") if question == GOLD[0][0] else None  # noqa: E731
    with FakeTeacher(knows, refuse) as fake:
        spec = job(fake)
        first = make_run(**spec)
        one_step = train._Run.one_step
        monkeypatch.setattr(train._Run, "one_step", lambda run: (one_step(run), first.stop.set())[0])
        with pytest.raises(RunFailure, match="Stopped after step 1"):
            distill.run(first)
    monkeypatch.setattr(train._Run, "one_step", one_step)
    monkeypatch.setenv(teacher.ENV_PATIENCE, "0")  # nobody is there any more
    result = distill.run(make_run(**spec))
    assert result.metrics["teacher_exactMatch"] == first.metrics["teacher_exactMatch"] > 0.5


@pytest.mark.parametrize("part", ["prompts", "gold"])
def test_data_that_are_mended_after_a_missed_threshold_are_asked_and_trained_on(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], tmp_path: Path, part: str
) -> None:
    with FakeTeacher(lambda question: knows(question) if question.rstrip("!") in RIGHT else "{}") as fake:
        spec = job(fake, evaluation={"thresholds": {"exactMatch": 0.99}})
        sets: list[str | None] = []
        for mended in ({"prompt": "a mended one", "completion": "{}"}, {"prompt": "one more", "completion": "{}"}):
            for _ in range(2):  # the second pod finds what the first one left
                with pytest.raises(RunFailure, match="is below"):
                    distill.run(make_run(**spec))
            left = read_manifest("pvc://store/out-rejected")
            assert left is not None
            sets.append(left.digest if part == "gold" else left.dataset_digest)
            path = tmp_path / f"data/{part}/rows.jsonl"
            if part == "gold":
                mended = chat(mended["prompt"], mended["completion"])
            with path.open("a") as stream:
                stream.write(json.dumps(mended) + "\n")
    assert len(set(sets)) == 2
    assert fake.asked["a mended one"] == 1
    assert set(fake.asked.values()) == {1}  # nothing is paid for twice


def test_a_prompt_that_comes_to_be_held_out_is_not_trained_on(
    make_run: Callable[..., Context],
    job: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaked, wanted = next(iter(RIGHT.items()))
    with FakeTeacher(knows) as fake:
        spec = job(fake)
        first = make_run(**spec)
        push = first.push
        monkeypatch.setattr(first, "push", lambda *args, **more: (push(*args, **more), first.stop.set())[0])
        with pytest.raises(RunFailure) as caught:
            distill.run(first)
        assert caught.value.exit_code == EXIT_INTERRUPTED
        published = tmp_path / "store/out-data-0123abcd/train.jsonl"
        assert leaked in published.read_text()
        with (tmp_path / "data/gold/rows.jsonl").open("a") as stream:
            stream.write(json.dumps(chat(leaked, wanted)) + "\n")
        result = distill.run(make_run(**spec))
    assert leaked not in [json.loads(line)["messages"][0]["content"] for line in published.read_text().splitlines()]
    assert (result.metrics["dropped_decontaminate"], result.metrics["kept"]) == (1, 15)


def test_training_holds_neither_answers_nor_prompts_in_memory(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: list[weakref.ref[answers.Answers]] = []
    alive: list[bool] = []
    questions: set[str] = set()

    class Watched(answers.Answers):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            stores.append(weakref.ref(self))

    def looking(*arguments: Any, **more: Any) -> train.TrainReport:
        gc.collect()
        alive.extend(store() is not None for store in stores)
        questions.update(found.messages[-1].content for found in gc.get_objects() if type(found) is Example)
        return train.train(*arguments, **more)

    monkeypatch.setattr(answers, "Answers", Watched)
    monkeypatch.setattr(distill, "train", looking)
    with FakeTeacher(knows) as fake:
        assert distill.run(make_run(**job(fake))).succeeded
    assert alive == [False]
    assert questions & set(RIGHT) == set()
    assert {question for question, _ in GOLD} <= questions  # they are asked once more, of the student


def test_the_system_prompt_is_asked_with_and_trained_on_and_thoughts_are_neither(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    thinking = lambda question: f"<think>{question}?</think>\n{knows(question)}"  # noqa: E731
    with FakeTeacher(thinking) as fake:
        spec = job(fake)
        spec["distill"]["data"]["generation"] = {
            "systemPrompt": "Answer in JSON.", "chainOfThought": True, "maxTokens": 200, "samplesPerPrompt": 2
        }  # fmt: skip
        result = distill.run(make_run(**spec))
    system = fake.requests[0]["messages"][0]
    assert system["role"] == "system"
    assert system["content"].startswith("Answer in JSON.\n\nThink step by step")
    rows = [json.loads(line) for line in (tmp_path / "store/out-data-0123abcd/train.jsonl").read_text().splitlines()]
    assert [turn["role"] for turn in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert rows[0]["messages"][0]["content"] == "Answer in JSON."
    assert rows[0]["messages"][2]["content"] == next(iter(RIGHT.values()))
    assert len(rows) == 16  # the second sample of each said the same
    assert result.metrics["dropped_dedupe"] == 16
    assert result.metrics["teacher_exactMatch"] > 0.8  # its thoughts are cut out before it is scored
    assert {request["max_tokens"] for request in fake.requests} == {200}


def test_a_teacher_that_thinks_aside_has_room_to_answer_what_is_held_out(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]]
) -> None:
    """Its thoughts count as tokens of the answer, and are not a part of it."""

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        return Fault(body=answer(None, "length")) if body["max_tokens"] < 1000 else None

    with FakeTeacher(knows, script) as fake:
        found = distill.run(make_run(**job(fake, data={"generation": {"maxTokens": 1000}}))).metrics
    assert found["teacher_exactMatch"] > 0.8


def test_what_the_filters_drop_is_reported_and_held_out_prompts_are_not_asked(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], jsonl: Callable[..., str]
) -> None:
    questions = list(RIGHT)
    leaked = [question.upper() for question, _ in GOLD[:3]]
    prompts = jsonl([{"prompt": text} for text in (*questions[:10], *leaked)], "some")

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | str | None:
        cut = Fault(body=answer("{", "length"))
        return {questions[1]: cut, questions[2]: "no json", questions[3]: '{"a": 1}' * 99}.get(question)

    with FakeTeacher(knows, script) as fake:
        spec = job(fake)
        spec["distill"]["data"] |= {"prompts": {"uri": prompts}, "filters": {"validJson": True, "maxCharacters": 99}}
        found = distill.run(make_run(**spec)).metrics
        assert not set(leaked) & set(fake.asked)
    assert {name: value for name, value in found.items() if name.startswith("dropped_") and value} == {
        "dropped_decontaminate": 3, "dropped_truncated": 1, "dropped_validJson": 1, "dropped_maxCharacters": 1
    }  # fmt: skip
    assert (found["prompts"], found["answers"], found["unanswered"], found["kept"]) == (13, 10, 0, 7)


def test_nothing_left_says_why(make_run: Callable[..., Context], job: Callable[..., dict[str, Any]]) -> None:
    with FakeTeacher(lambda _: "I am sorry") as fake:
        spec = job(fake)
        spec["distill"]["data"]["filters"] = {"validJson": True}
        ctx = make_run(**spec)
        with pytest.raises(RunFailure, match="16 dropped by validJson") as caught:
            distill.run(ctx)
    assert caught.value.reason == "NothingToTrain"
    assert ctx.metrics["dropped_validJson"] == 16


def test_an_object_that_corrects_another_asks_nothing_again(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]]
) -> None:
    with FakeTeacher(lambda question: "I am sorry" if question.endswith("!") else f"it is: {knows(question)}") as fake:
        strict = job(fake)
        strict["distill"]["data"]["filters"] = {"validJson": True}
        with pytest.raises(RunFailure, match="16 dropped by validJson"):
            distill.run(make_run(**strict))
        assert len(fake.requests) == 16
        loose = {**job(fake), "uid": "another"}
        result = distill.run(make_run(**loose))
        assert (result.metrics["kept"], result.metrics["answers_reused"]) == (16, 16)
        assert len(fake.requests) == 16 + len(GOLD)
        for change in ({"training": {"seed": 1}}, {"data": {"generation": {"temperature": 0.1}}}):
            before = len(fake.requests)
            other = {**job(fake, **change), "uid": f"uid {before}"}
            other["distill"]["data"]["filters"] = {"validJson": True}
            with pytest.raises(RunFailure, match="16 dropped by validJson"):
                distill.run(make_run(**other))
            assert len(fake.requests) == before + 16


def test_an_object_that_allows_longer_answers_asks_again_for_those_that_were_cut(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]]
) -> None:
    cut = set(list(RIGHT)[:3])

    def script(number: int, question: str, body: dict[str, Any]) -> Fault | None:
        short = question in cut and body["max_tokens"] < 100
        return Fault(body=answer("{", "length", 20)) if short else None

    with FakeTeacher(knows, script) as fake:
        for number, (limit, asked) in enumerate(((20, 16), (100, 3), (50, 0), (6, 16), (100, 0))):
            before = len(fake.requests)
            spec = job(fake, data={"generation": {"maxTokens": limit}}, training={"seed": 1, "maxSteps": 1})
            result = distill.run(make_run(**spec | {"uid": f"{number:08}"}))
            training = [body for body in fake.requests[before:] if body["temperature"]]
            assert (len(training), result.metrics["answers_reused"]) == (asked, 16 - asked), limit


def test_a_greedy_teacher_is_asked_each_prompt_once(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], jsonl: Callable[..., str]
) -> None:
    """Its requests would be equal, byte for byte."""
    greedy = {"temperature": 0, "samplesPerPrompt": 4}
    with FakeTeacher(knows) as fake:
        spec = job(fake, data={"generation": greedy})
        leaky = jsonl([{"prompt": question} for question in (*RIGHT, GOLD[0][0])], "leaky")
        spec["distill"]["data"]["prompts"] = {"uri": leaky}
        found = distill.run(make_run(**spec)).metrics
        assert set(fake.asked.values()) == {1}
    assert (found["answers"], found["kept"], found["dropped_dedupe"], found["dropped_decontaminate"]) == (16, 16, 0, 1)


def test_prompts_that_cannot_be_trained_on_are_not_asked(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], jsonl: Callable[..., str]
) -> None:
    long = "the kitchen " * 200
    prompts = jsonl([{"prompt": question} for question in (*list(RIGHT)[:3], long)], "some")
    with FakeTeacher(knows) as fake:
        spec = job(fake, data={"prompts": {"uri": prompts}})
        found = distill.run(make_run(**spec)).metrics
        assert long not in fake.asked
    assert (found["prompts"], found["answers"], found["dropped_maxLength"]) == (4, 3, 1)


def test_a_conversation_that_the_template_cannot_take_costs_no_request(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], jsonl: Callable[..., str], tmp_path: Path
) -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    model = write_model(tmp_path / "strict", no_system)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the lamp in the lab is broken"}]
    prompts = jsonl([{"messages": [{"role": "user", "content": next(iter(RIGHT))}]}, {"messages": talk}], "some")
    answered = {"messages": [*talk, {"role": "assistant", "content": "{}"}]}
    gold = jsonl([chat(*GOLD[0]), answered], "gold-talk")
    with FakeTeacher(knows) as fake:
        asked = job(fake, data={"prompts": {"uri": prompts}})
        held_out = job(fake, evaluation={"dataset": {"uri": gold}})
        for spec in (asked, held_out):
            with pytest.raises(RunFailure, match="refuses the conversation of line 2: no system turns") as caught:
                distill.run(make_run(model=model, **spec))
            assert caught.value.reason == "BadDataset"
        assert not fake.requests


def test_an_answer_with_a_token_that_the_student_lacks_is_dropped(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Gemma 3 for text alone has no weights for that of images."""
    model = write_model(tmp_path / "blind", CHATML)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([*(f"<unused{number}>" for number in range(len(tokenizer), 1024)), "<image>"])
    tokenizer.save_pretrained(model)
    first = next(iter(RIGHT))
    with FakeTeacher(knows, lambda number, question, _: "see <image>" if question == first else None) as fake:
        found = distill.run(make_run(model=model, **job(fake))).metrics
    assert (found["answers"], found["kept"], found["dropped_unknownToken"], found["examples"]) == (16, 15, 1, 15)


def test_a_teacher_is_not_asked_what_is_held_out_where_no_metric_reads_its_answers(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]]
) -> None:
    with FakeTeacher(knows) as fake:
        spec = job(fake, training={"maxSteps": 1}, evaluation={"metrics": ["perplexity"]})
        found = distill.run(make_run(**spec)).metrics
    assert set(fake.asked) == set(RIGHT)
    assert {"perplexity", "base_perplexity"} <= set(found)


@pytest.mark.parametrize("where", ["prompts", "gold"])
def test_a_student_that_was_tuned_without_thoughts_takes_conversations_with_them(
    make_run: Callable[..., Context],
    job: Callable[..., dict[str, Any]],
    jsonl: Callable[..., str],
    tmp_path: Path,
    where: str,
) -> None:
    model = write_model(tmp_path / "tuned", EMPTY_THOUGHTS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat_text.complete(tokenizer, [Example((Message("user", "x"),), "y")])
    assert chat_text.COMPLETED in tokenizer.chat_template
    tokenizer.save_pretrained(model)
    question, right = GOLD[0]
    before = [{"role": "user", "content": "Room?"}, {"role": "assistant", "content": "<think>\nbulb\n</think>\n\nlab"}]
    with FakeTeacher(knows) as fake:
        spec = job(fake, training={"maxSteps": 1}, evaluation={"metrics": ["perplexity"]})
        if where == "prompts":
            asked = {"role": "user", "content": question.rstrip("!")}
            spec["distill"]["data"]["prompts"] = {"uri": jsonl([{"messages": [*before, asked]}], "talks")}
        else:
            told = cast("list[Any]", chat(question, right)["messages"])
            spec["distill"]["evaluation"]["dataset"] = {"uri": jsonl([{"messages": [*before, *told]}], "gold-talks")}
        found = distill.run(make_run(model=model, **spec)).metrics
    assert found["kept"] == found["prompts"]


def test_faults_of_the_spec_cost_no_request(
    make_run: Callable[..., Context],
    job: Callable[..., dict[str, Any]],
    jsonl: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "secrets/blank").mkdir(parents=True)
    (tmp_path / "secrets/blank/token").write_text(" \n")
    monkeypatch.setattr("slmops_trainer.context.SECRET_ROOT", str(tmp_path / "secrets"))
    with FakeTeacher(knows) as fake:
        leaky = job(fake)
        leaky["distill"]["data"] |= {
            "prompts": {"uri": jsonl([{"prompt": GOLD[0][0]}], "leaky")}, "filters": {"decontaminate": False}
        }  # fmt: skip
        broken = job(fake)
        (tmp_path / "model").mkdir()
        broken["model"] = tmp_path / "model"
        (tmp_path / "model/config.json").write_text("{}")
        schema = job(fake)
        schema["distill"]["data"]["filters"] = {"jsonSchema": {"name": "none", "key": "schema.json"}}
        prose = job(fake)
        prose["distill"]["evaluation"]["dataset"]["uri"] = jsonl([chat("a", "prose")], "prose")
        endless = job(fake, training={"earlyStopping": {"patience": 1, "everySteps": 1}, "maxLength": 60})
        endless["distill"]["evaluation"]["dataset"]["uri"] = jsonl([chat("lamp " * 100, "{}")], "long")
        keyless = job(fake)
        keyless["teacher"] |= {"secret": "absent", "key": "token"}
        blank = job(fake)
        blank["teacher"] |= {"secret": "blank", "key": "token"}
        for spec, reason, message in (
            (leaky, "BadDataset", "1 of 16 held-out examples also occur"),
            (broken, "UnsupportedModel", "names no architecture"),
            (schema, "SourceNotFound", "ConfigMap none, key schema.json"),
            (prose, "BadDataset", "fieldMatch compares JSON objects"),
            (endless, "BadDataset", "All 1 examples are longer than 60"),
            (keyless, "BadSpec", "Secret absent is not mounted"),
            (blank, "AccessDenied", "Secret blank, key token, holds no usable API key"),
        ):
            with pytest.raises(RunFailure, match=message) as caught:
                distill.run(make_run(**spec))
            assert caught.value.reason == reason
        assert not fake.requests


def test_a_student_below_its_threshold_is_kept_aside(
    make_run: Callable[..., Context], job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with FakeTeacher(knows) as fake:
        spec = job(fake, evaluation={"thresholds": {"exactMatch": 0.99}})
        with pytest.raises(RunFailure, match=r"exactMatch 0 is below 0.99.*pvc://store/out-rejected") as caught:
            distill.run(make_run(**spec))
    assert caught.value.reason == "QualityBelowThreshold"
    assert not (tmp_path / "store/out").exists()
    assert (tmp_path / "store/out-rejected/model.safetensors").is_file()
