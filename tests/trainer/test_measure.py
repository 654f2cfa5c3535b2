"""Evaluations that are not taken twice, and that end when the pod is asked to."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import task

from slmops.api.batch import Evaluation
from slmops_artifacts import Parent
from slmops_trainer import evaluate, generate, measure, models
from slmops_trainer.context import Context
from slmops_trainer.data import Example, Examples, Message
from slmops_trainer.failure import RunFailure

ASKED = Evaluation.model_validate(
    {"dataset": {"uri": "pvc://data/x"}, "metrics": ["tokenF1", "perplexity"], "maxTokens": 4}
)


def held_out(digit: str) -> Examples:
    items = tuple(Example((Message("user", question),), answer) for question, answer in task()[:3])
    parent = Parent(kind="dataset", uri="configmap://x/y", digest=f"sha256:{digit * 64}")
    return Examples(items, "prompt-completion", "gold", parent)


def test_a_base_is_measured_once_by_all_pods_but_anew_on_other_examples_and_when_its_tag_or_template_has_changed(
    make_run: Callable[..., Context], tiny_model: Path
) -> None:
    loaded = models.load(tiny_model, "tiny")
    first = make_run()
    values = measure.once(first, loaded, held_out("1"), ASKED, "Before", "sha256:a")
    assert first.board.progress.total_steps == 3  # perplexity shows how far it is, too
    first.checkpoints.save()
    second = make_run()
    second.stop.set()  # measuring anything would raise
    assert measure.once(second, loaded, held_out("1"), ASKED, "Before", "sha256:a") == values
    for examples, model in ((held_out("2"), "sha256:a"), (held_out("1"), "sha256:b")):
        with pytest.raises(RunFailure) as caught:
            measure.once(second, loaded, examples, ASKED, "Before", model)
        assert caught.value.reason == "Interrupted"
    loaded.tokenizer.chat_template += " "
    with pytest.raises(RunFailure) as caught:
        measure.once(second, loaded, held_out("1"), ASKED, "Before", "sha256:a")
    assert caught.value.reason == "Interrupted"


def test_what_an_older_trainer_measured_is_measured_anew(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words were others: no gate holds the number of one against that of the other."""
    loaded, first = models.load(tiny_model, "tiny"), make_run()
    values = measure.once(first, loaded, held_out("1"), ASKED, "Before", "sha256:a")
    path = first.checkpoints.folder / measure.PART / "Before.json"
    kept = json.loads(path.read_text())
    assert kept.pop("scoring") == evaluate.SCORING
    for version in ({}, {"scoring": evaluate.SCORING + 1}):  # the first ones said none; an upgrade may be taken back
        path.write_text(json.dumps({**kept, **version, "metrics": {"tokenF1": -1.0, "perplexity": -1.0}}))
        assert measure.once(first, loaded, held_out("1"), ASKED, "Before", "sha256:a") == values


def test_every_score_is_taken_once_for_each_answer(
    make_run: Callable[..., Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    monkeypatch.setitem(evaluate.SCORES, "tokenF1", lambda answer, reference: (scored.append(reference), 1.0)[1])
    measure.measure(make_run(), models.load(tiny_model, "tiny"), held_out("1"), ASKED, "Before")
    assert scored == held_out("1").references


def test_generation_ends_within_a_batch(tiny_model: Path) -> None:
    loaded = models.load(tiny_model, "tiny")
    tokens = 0

    def check() -> None:
        nonlocal tokens
        tokens += 1
        if tokens == 3:
            raise KeyError

    with pytest.raises(KeyError):
        generate.generate(loaded.model, loaded.tokenizer, held_out("1").items, 50, 8, check=check)
    assert tokens == 3
