"""Long random histories of the slot scheduler: every logit is bit for bit what one computation of its text gives.

With everything that changes what rows hold: prompts that begin alike or go on behind an answer, cancels, wrong
guesses, answers that fail, adapters that come, go and change under their name, more answers than one call takes.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from slmops_server import model_folder
from slmops_server.engines import choose, kernels, slots
from slmops_server.engines.adapters import BASE
from slmops_server.engines.base import Engine, Job, Sampling
from slmops_server.engines.sampler import Logits

JOBS = 60
THREE = ((5, 15.0), (6, 15.0), (7, 15.0))  # answers of these repeat themselves, so guesses are often right


class Recorder(slots.Sampler):
    """Keeps the logits of each answer by its seed; some answers fail at a token."""

    seen: ClassVar[dict[int, list[Logits]]] = {}
    failing: ClassVar[dict[int, int]] = {}

    def __init__(self, how: Sampling, prompt: Sequence[int], vocab: int, ends: frozenset[int], guide: None) -> None:
        super().__init__(how, prompt, vocab, ends, guide)
        self._kept = self.seen[how.seed] = []
        self._fails = self.failing.get(how.seed)

    def pick(self, logits: Logits) -> int:
        if len(self._kept) == self._fails:
            raise ValueError("no numbers")
        self._kept.append(logits.copy())
        return super().pick(logits)


def load(data: Path, model: str, named: Sequence[str], **more: object) -> Engine:
    given = [(name, str(data / "tiny-lora" / name)) for name in named]
    options = choose.EngineOptions(engine="onnxruntime", adapters=given, **more)  # type: ignore[arg-type]
    return choose.load(model_folder.read(data / model), options)


class History:
    """What is asked of an engine, and what it answers."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.draw = engine, random.Random(seed)
        self.jobs: dict[int, Job] = {}
        self.answers: dict[int, list[int]] = {}
        self.ended: list[list[int]] = []
        self.begins = [self.tokens(count) for count in (17, 48, 90)]
        self.cached = 0

    def tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(3, 512) for _ in range(count)]

    def prompt(self) -> list[int]:
        """Like a turn that has ended, to its end or less; like others; or like none."""
        draw = self.draw
        before = draw.choice([*self.ended[-9:], *self.begins, []])
        kept = len(before) if draw.random() < 0.5 else draw.randrange(len(before) + 1)
        return [*before[:kept][:350], *self.tokens(draw.randrange(1, 20))]

    def ask(self) -> None:
        draw, number = self.draw, len(self.jobs) + 1
        how = Sampling(temperature=draw.choice([0.0, 0.8]), seed=number, logit_bias=THREE if number % 3 else ())
        scored = draw.random() < 0.05
        job = Job(number, self.prompt(), draw.randrange(1, 60), replace(how, logprobs=1) if scored else how)
        adapter = self.engine.adapters.get(draw.choice(["", "all", "few"])) or BASE
        self.jobs[number] = replace(job, ignore_eos=True, adapter=adapter, score_prompt=scored)
        self.answers[number] = []
        self.engine.submit(self.jobs[number])

    def step(self) -> None:
        for token in self.engine.step():
            self.cached += token.cached
            self.answers[token.job] += [token.token] if token.finish != "error" else []
            if token.finish == "length":
                self.ended.append([*self.jobs[token.job].prompt, *self.answers[token.job]])


@pytest.mark.skipif(not kernels.library(), reason="this CPU has not what the operators need")
@pytest.mark.parametrize("model", ["tiny-int4", "tiny-lora/int4", "tiny-lora/fp32"])
@pytest.mark.parametrize(("guesses", "rows"), [(0, 4), (3, 3), (0, 40), (3, 18)])
def test_every_logit_is_that_of_its_text_after_any_history(
    tiny: Path, model: str, guesses: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "Sampler", Recorder)
    named = ["all", "few"] if "lora" in model else []
    more = {"loaded": []} if named else {}
    engine = load(tiny.parent, model, named, threads=2, slots=rows, prefill_chunk=7, guesses=guesses, **more)
    whole = load(tiny.parent, model, named, threads=1, slots=1)._forward  # type: ignore[attr-defined]
    assert "without_kernels" not in engine.info.notes
    cached = 0
    for seed in range(3):
        history = History(engine, seed)
        draw = history.draw
        Recorder.seen.clear()
        Recorder.failing = {draw.randrange(1, JOBS): draw.randrange(10) for _ in range(5)}
        while engine.busy or len(history.jobs) < JOBS:
            if len(history.jobs) < JOBS and draw.random() < (0.25 if rows < 16 else 0.6):
                history.ask()
            if draw.random() < 0.03:
                engine.cancel(draw.randrange(1, JOBS))
            if named and draw.random() < 0.03:
                engine.adapters.load(draw.choice(named), tiny.parent / "tiny-lora" / draw.choice(named))
            if named and draw.random() < 0.01:
                engine.adapters.unload(draw.choice(named))
            history.step()
        cached += history.cached
        for number, seen in Recorder.seen.items():
            job = history.jobs[number]
            text = [*job.prompt, *history.answers[number]][: len(job.prompt) + len(seen) - 1]
            if seen:
                told = whole.score(0, text, 0, job.adapter)[len(job.prompt) - 1 :]
                assert [np.array_equal(*pair) for pair in zip(seen, told, strict=True)] == [True] * len(seen), number
    assert cached > 200
    assert (engine.drafted.tokens > engine.drafted.accepted > 0) is (guesses > 0)
