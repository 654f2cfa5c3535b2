"""The engines on a real model: the same tokens alone and in any company, and from engines with the same arithmetic."""

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import random_decoder

from slmops_server import model_folder
from slmops_server.engines import choose, kernels, slots
from slmops_server.engines.adapters import BASE
from slmops_server.engines.base import Engine, EngineRefusedError, Job, Sampling, Token
from slmops_server.engines.sampler import Logits, scores
from slmops_trainer import export_gguf

GREEDY = Sampling(temperature=0.0)
Load = Callable[..., Engine]
ADAPTERS = ("", "all", "few")
KEEPING = [
    "onnxruntime",
    "onnxruntime int4 adapters",
    "onnxruntime int4 adapters in two threads",
    "onnxruntime fp32 adapters",
    "onnxruntime without kernels",
    "onnxruntime int4 adapters without kernels",
    "openvino",
    "openvino over IR",
    "llamacpp",
    "llamacpp over f16",
]
by_engines_that_keep_rows = pytest.mark.parametrize("start", KEEPING, indirect=True)  # others continue no prompt


def load(path: Path, engine: str = "onnxruntime", ends: Sequence[int] = (), **more: object) -> Engine:
    folder = model_folder.read(path)
    folder = replace(folder, eos_ids=frozenset(ends) or folder.eos_ids)
    return choose.load(folder, choose.EngineOptions(**{"engine": engine, "threads": 1, **more}))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[*KEEPING, "genai"])
def start(request: pytest.FixtureRequest, tiny: Path, gguf: Callable[..., Path]) -> Iterator[Load]:
    """Loads the engine that the test is run for."""
    name, _, over = request.param.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if "without kernels" in over:  # as on a CPU that they are not for
            patch.setattr(kernels, "library", str)
        if name == "llamacpp":
            yield partial(load, gguf("qwen2", "f16" if over else "q4_0"), name)
        elif "adapters" in over:
            data = tiny.parent / "tiny-lora"
            named = [(adapter, str(data / adapter)) for adapter in ADAPTERS if adapter]
            yield partial(load, data / over.split()[0], name, adapters=named, threads=1 + ("threads" in over))
        else:
            yield partial(load, tiny.parent / "tiny-ir" if "IR" in over else tiny, name)


@pytest.fixture(scope="module")
def engine(start: Load) -> Engine:
    return start(slots=4, prefill_chunk=7)


@pytest.fixture(scope="module")
def guessing(start: Load) -> Engine:
    return start(slots=4, prefill_chunk=7, guesses=3)


def run(engine: Engine, jobs: list[Job]) -> dict[int, list[int]]:
    for job in jobs:
        engine.submit(job)
    return drain(engine, {job.id: [] for job in jobs})


def drain(engine: Engine, got: dict[int, list[int]]) -> dict[int, list[int]]:
    while engine.busy:
        for token in engine.step():
            got[token.job].append(token.token)
    return got


def job(number: int, prompt: list[int], count: int = 12, sampling: Sampling = GREEDY, ignore_eos: bool = True) -> Job:
    return Job(id=number, prompt=prompt, max_tokens=count, sampling=sampling, ignore_eos=ignore_eos)


def random_jobs(draw: random.Random, count: int) -> list[Job]:
    return [
        job(
            number,
            [draw.randrange(3, 512) for _ in range(draw.randrange(1, 40))],
            draw.randrange(1, 30),
            GREEDY if draw.random() < 0.5 else Sampling(temperature=0.8, top_p=0.9, seed=number),
        )
        for number in range(1, count + 1)
    ]


def mixed(engine: Engine, jobs: list[Job]) -> list[Job]:
    """The jobs, each with one of the engine's adapters or with none."""
    return [replace(one, adapter=engine.adapters.get(ADAPTERS[one.id % len(ADAPTERS)]) or BASE) for one in jobs]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_do_not_depend_on_company(engine: Engine, seed: int) -> None:
    compare_with_alone(engine, random_jobs(random.Random(seed), 14), seed)


@by_engines_that_keep_rows
@pytest.mark.parametrize("seed", range(4))
def test_tokens_that_are_guessed_ahead_do_not_depend_on_company(guessing: Engine, seed: int) -> None:
    """Answers of three tokens only repeat themselves, so guesses are often right, and often wrong."""
    three = ((5, 15.0), (6, 15.0), (7, 15.0))
    jobs = [
        replace(one, sampling=replace(one.sampling, logit_bias=three)) for one in random_jobs(random.Random(seed), 14)
    ]
    before = replace(guessing.drafted)
    compare_with_alone(guessing, jobs, seed)
    right = guessing.drafted.accepted - before.accepted
    assert 20 < right < guessing.drafted.tokens - before.tokens


@by_engines_that_keep_rows
def test_right_guesses_save_steps_and_change_nothing(engine: Engine, guessing: Engine) -> None:
    same = Sampling(temperature=0.0, logit_bias=((7, 100.0),))  # whatever the model: one token again and again
    asked = [job(1, [7, 8, 9] * 8, 60, same)]
    before = guessing.drafted.calls
    plain, steps = run(engine, asked)[1], 0
    guessing.submit(asked[0])
    got = []
    while guessing.busy:
        got += [token.token for token in guessing.step()]
        steps += 1
    assert guessing.drafted.calls > before
    assert got == plain
    assert steps < len(got)


def compare_with_alone(engine: Engine, jobs: Sequence[Job], seed: int) -> None:
    """Random arrivals, lengths and cancels: who stays gets the tokens that it gets alone."""
    draw = random.Random(f"{seed} arrivals")
    jobs = mixed(engine, list(jobs))
    alone = {one.id: run(engine, [one])[one.id] for one in jobs}
    got: dict[int, list[int]] = {one.id: [] for one in jobs}
    waiting, cancelled = list(jobs), set()
    while waiting or engine.busy:
        while waiting and draw.random() < 0.4:
            engine.submit(waiting.pop(0))
        if draw.random() < 0.03:
            number = draw.randrange(1, 15)
            cancelled.add(number)
            engine.cancel(number)
            waiting = [one for one in waiting if one.id != number]
        for token in engine.step():
            got[token.job].append(token.token)
    for number, tokens in got.items():
        if number in cancelled:
            assert tokens == alone[number][: len(tokens)]
        else:
            assert tokens == alone[number]
    assert engine.running == 0


def test_both_engines_over_onnxruntime_give_the_same_greedy_tokens(tiny: Path) -> None:
    engine, genai = load(tiny, slots=4, prefill_chunk=7), load(tiny, "genai", slots=2, prefill_chunk=16)
    jobs = [replace(one, sampling=GREEDY) for one in random_jobs(random.Random(9), 8)]
    assert run(genai, jobs) == run(engine, jobs)
    assert genai.info.name == "genai"


def test_genai_computes_and_scores_prompts_in_parts(tiny: Path) -> None:
    """A whole prompt's scores are gigabytes for a large vocabulary, and others wait for a step's end."""
    genai = load(tiny, "genai", slots=2, prefill_chunk=7)
    prompt = [random.Random(4).randrange(3, 512) for _ in range(60)]
    scored = Job(id=1, prompt=prompt, max_tokens=1, sampling=replace(GREEDY, logprobs=2), score_prompt=True)
    genai.submit(scored)
    steps = [genai.step() for _ in range(4)]  # of 16, 16, 16 and 12 tokens
    assert [len(tokens) for tokens in steps] == [0, 0, 0, 1]
    whole = genai._forward.score(1, prompt, 0)  # type: ignore[attr-defined]
    assert steps[-1][0].prompt_scores == [
        (token, scores(row, token, 2)) for row, token in zip(whole, prompt[1:], strict=False)
    ]
    check_that_others_move(genai)


def test_a_long_prompt_does_not_stop_the_answers_that_run(engine: Engine) -> None:
    check_that_others_move(engine)


def check_that_others_move(engine: Engine) -> None:
    """While a prompt of 15 chunks of 7 tokens is computed."""
    engine.submit(job(1, [5, 6], 40))
    while not engine.step():
        pass
    engine.submit(job(2, list(range(3, 103)), 3))
    during = 0
    while True:
        tokens = engine.step()
        if any(t.job == 2 for t in tokens):
            break
        during += any(t.job == 1 for t in tokens)
    assert during >= 14
    drain(engine, {1: [], 2: []})


def test_chunks_do_not_change_the_answer(engine: Engine, start: Load) -> None:
    whole = start(slots=1, prefill_chunk=256)
    jobs = [job(1, list(range(3, 150)), 20)]
    assert run(whole, jobs) == run(engine, jobs)


def test_an_answer_ends_at_the_end_token_unless_told_otherwise(engine: Engine, start: Load) -> None:
    tokens = run(engine, [job(1, [40, 41], 30)])[1]
    wanted = next(t for t in tokens[2:] if t not in tokens[:2])
    special = start(ends=[wanted])
    special.submit(job(1, [40, 41], 30, ignore_eos=False))
    last = None
    while special.busy:
        for token in special.step():
            last = token
    assert last is not None
    assert (last.token, last.finish) == (wanted, "stop")
    assert run(special, [job(2, [40, 41], 30)])[2] == tokens


def test_the_last_token_of_the_context_can_be_used(engine: Engine) -> None:
    assert len(run(engine, [job(1, list(range(3, 503)) + [7] * 2, 10)])[1]) == 10


def test_a_model_that_the_slot_engine_refuses_goes_to_genai(tiny: Path) -> None:
    folder = replace(model_folder.read(tiny), share_buffer=False)
    with pytest.raises(EngineRefusedError, match="shared"):
        choose.load(folder, choose.EngineOptions(engine="onnxruntime", threads=1))
    fallen_back = choose.load(folder, choose.EngineOptions(threads=1, slots=1))
    assert (fallen_back.info.name, "shared" in fallen_back.info.notes["reason"]) == ("genai", True)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "llamacpp", "genai"])
def test_of_a_model_that_computes_no_numbers_the_warm_up_tells(
    tiny: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are not taken for different ones because NaN differs from itself."""
    if engine == "llamacpp":
        weights = {name: array * np.float32("nan") for name, array in random_decoder.weights("qwen2").items()}
        monkeypatch.setattr(random_decoder, "weights", lambda _: weights)
        damaged = tmp_path / "damaged"
        export_gguf.export(random_decoder.write(tmp_path / "source", "qwen2", tiny), damaged, "f32")
    else:
        damaged = shutil.copytree(tiny, tmp_path / "damaged")
        data = damaged / "model.onnx.data"
        data.write_bytes(b"\xff" * data.stat().st_size)
    loaded = load(damaged, engine, slots=3)
    with pytest.raises(RuntimeError, match=r"no answer at warm-up \(error\)"):
        choose.warm(loaded, [5, 6, 7])


class Recorder(slots.Sampler):
    """Keeps the logits that a job saw, by the job's seed."""

    seen: ClassVar[dict[int, list[Logits]]] = {}

    def __init__(self, how: Sampling, prompt: Sequence[int], vocab: int, ends: frozenset[int], guide: None) -> None:
        super().__init__(how, prompt, vocab, ends, guide)
        self._kept = self.seen.setdefault(how.seed, [])
        self._kept.clear()

    def pick(self, logits: Logits) -> int:
        self._kept.append(logits.copy())
        return super().pick(logits)


def furthest(ones: list[Logits], others: list[Logits]) -> float:
    """The largest difference of two logits."""
    return max(float(np.abs(one - other).max()) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_every_logit_is_the_same_in_any_company_and_after_any_past(
    engine: Engine, start: Load, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Bit for bit: lone rows, micro-batches, chunks of any size, prompts that begin like others, running or ended.

    With openvino near only: its products round by the number of tokens in a call.
    """
    monkeypatch.setattr(slots, "Sampler", Recorder)
    draw = random.Random(100 + seed)
    begin = [draw.randrange(3, 512) for _ in range(60)]
    jobs = [
        replace(
            one,
            prompt=begin[: draw.randrange(61)] + one.prompt if draw.random() < 0.7 else one.prompt,
            sampling=replace(one.sampling, seed=one.id),
        )
        for one in random_jobs(draw, 16)
    ]
    alone: dict[int, list[Logits]] = {}
    single = start(slots=1, prefill_chunk=256)
    for one in jobs:
        run(single, mixed(single, [one]))
        alone[one.id] = list(Recorder.seen[one.id])
    turns = [
        replace(
            one,
            id=300 + one.id,  # 300: so that it has the same adapter
            prompt=[*one.prompt, *run(single, mixed(single, [one]))[one.id], 5, 6],
            sampling=replace(one.sampling, seed=300 + one.id),
        )
        for one in jobs[::2]
    ]
    for one in turns:
        run(single, mixed(single, [one]))
        alone[one.id] = list(Recorder.seen[one.id])
    jobs += turns
    waiting, cached = mixed(engine, jobs), 0
    while waiting or engine.busy:
        while waiting and draw.random() < 0.3:
            engine.submit(waiting.pop(0))
        cached += sum(token.cached for token in engine.step())
    assert (cached > 0) is (engine.info.name != "genai")
    within = 1e-2 if engine.info.name == "openvino" else 0.0
    different = [one for one in jobs if furthest(Recorder.seen[one.id], alone[one.id]) > within]
    assert not different, [
        (one.id, len(one.prompt), furthest(Recorder.seen[one.id], alone[one.id])) for one in different
    ]


@by_engines_that_keep_rows
def test_a_prompt_that_begins_like_an_ended_one_continues_from_there(engine: Engine) -> None:
    begin = [11, 400, 37, 255, 18] * 20
    run(engine, [job(1, [*begin, 7, 8, 9], 5)])
    assert first(engine, job(2, [*begin, 7, 8, 9], 5)).cached == 101  # two tokens are always computed
    assert first(engine, job(3, [*begin, 10, 11], 5)).cached == 100
    assert first(engine, job(4, [12, *begin], 5)).cached == 0


@by_engines_that_keep_rows
def test_the_next_turn_continues_behind_the_answer_where_it_is_computed_like_a_prompt(engine: Engine) -> None:
    turn = [19, 410, 35, 251, 16] * 9
    answer = run(engine, [job(1, turn, 30)])[1]
    uniform = engine.info.name == "onnxruntime" and "without_kernels" not in engine.info.notes
    after = first(engine, job(2, [*turn, *answer, 5, 6, 7], 5))
    assert after.cached == len(turn) + (29 if uniform else 0)  # the last one was never computed


@by_engines_that_keep_rows
def test_a_prompt_that_begins_like_a_running_one_copies_from_it(engine: Engine) -> None:
    begin = [21, 300, 47, 155, 28] * 20
    engine.submit(job(1, [*begin, 5], 200))
    while not engine.step():
        pass
    engine.submit(job(2, [*begin, 6], 3))
    tokens = [t for _ in range(8) for t in engine.step() if t.job == 2]
    assert tokens[0].cached == 99
    engine.cancel(1)
    drain(engine, {2: []})


def first(engine: Engine, one: Job) -> Token:
    """The job's first token; the job runs to its end."""
    engine.submit(one)
    tokens = []
    while engine.busy:
        tokens += engine.step()
    return tokens[0]


@pytest.mark.parametrize("max_len", [2, 3, 5])
def test_a_context_of_a_few_tokens_is_served(start: Load, max_len: int) -> None:
    small = start(slots=3, max_model_len=max_len, prefill_chunk=1)
    got = run(small, [job(number, [5] * (max_len - 1), 1) for number in (1, 2, 3, 4)])
    assert {len(tokens) for tokens in got.values()} == {1}


def test_a_context_of_one_token_is_refused(start: Load) -> None:
    with pytest.raises(choose.DoesNotFitError, match="--max-model-len to 2"):
        start(max_model_len=1)
