"""Scores, against values worked out by hand."""

import unicodedata

import pytest

from slmops_trainer import evaluate
from slmops_trainer.failure import RunFailure

TABLE: list[tuple[str, str, str, float]] = [
    ("exactMatch", "yes", "yes", 1),
    ("exactMatch", " yes\n", "yes", 1),
    ("exactMatch", "Yes", "yes", 0),
    ("exactMatch", "", "yes", 0),
    *[("exactMatch", unicodedata.normalize("NFC", text), text, 1) for text in ("e\u0301", "\u09df", "\u212b")],
    ("exactMatch", "e\u0301", "e", 0),
    ("jsonValid", '{"a": 1}', "", 1),
    ("jsonValid", " [1]\n", "", 1),
    ("jsonValid", '{"a": 1} and more', "", 0),
    ("jsonValid", "{'a': 1}", "", 0),
    ("jsonValid", "NaN", "", 0),
    ("jsonValid", "", "", 0),
    ("jsonValid", "[" * 100_000, "", 0),
    ("fieldMatch", '{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 1),
    ("fieldMatch", '{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 1 / 2),
    ("fieldMatch", '{"a": 1}', '{"a": 1, "b": 2}', 1 / 2),
    ("fieldMatch", '{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 2}', 2 / 3),
    ("fieldMatch", '{"a": null}', '{"b": null}', 0),
    ("fieldMatch", '{"a": true}', '{"a": 1}', 0),
    ("fieldMatch", '{"a": 1.0}', '{"a": 1}', 1),
    ("fieldMatch", '{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 2]}}', 1),
    ("fieldMatch", '{"a": {"b": 10.0}}', '{"a": {"b": 10}}', 1),
    ("fieldMatch", '{"a": [1, {"b": 2.0}], "c": 0.5}', '{"a": [1.0, {"b": 2}], "c": 0.5}', 1),
    ("fieldMatch", '{"a": [true]}', '{"a": [1]}', 0),
    ("fieldMatch", '{"a": [1, 2]}', '{"a": [2, 1]}', 0),
    ("fieldMatch", '{"a": "1.0"}', '{"a": "1"}', 0),
    ("fieldMatch", '{"a": 1e999}', '{"a": 1}', 0),
    ("fieldMatch", '{"e\u0301": ["\u09af\u09bc"]}', '{"\u00e9": ["\\u09df"]}', 1),
    ("fieldMatch", '{"a": {"e\u0301": 1, "f": 2}}', '{"a": {"\u00e9": 1, "f": 2}}', 1),
    ("fieldMatch", "no idea", '{"a": 1}', 0),
    ("fieldMatch", "[1]", '{"a": 1}', 0),
    ("fieldMatch", "{}", "{}", 1),
    ("tokenF1", "the red door", "a red door", 2 / 3),
    ("tokenF1", "Red, RED!", "red", 2 / 3),
    ("tokenF1", "blue", "red", 0),
    ("tokenF1", "", "red", 0),
    ("tokenF1", "", "", 1),
    ("tokenF1", "größe", "Größe", 1),
    ("tokenF1", "वह की", "वह का", 1 / 2),
    ("tokenF1", "มี", "มิ", 0),
    ("tokenF1", "Cafe\u0301", "café", 1),
    ("tokenF1", "cafe", "café", 0),
    ("tokenF1", "می\u200cخواهم", "می", 0),
    ("tokenF1", "well ❤\ufe0f done 👩\u200d🚀", "Well, done.", 1),  # what belongs to no word
    ("rougeL", "नहीं दे", "नहीं दो", 1 / 2),
    ("rougeL", "the cat sat on the mat", "the cat is on the mat", 2 * 5 / 12),
    ("rougeL", "mat the on cat", "cat on the mat", 2 * 1 / 8),
    ("rougeL", "police killed the gunman", "police kill the gunman", 2 * 3 / 8),
    ("rougeL", "", "x", 0),
    ("rougeL", "...", "!!!", 1),
]


@pytest.mark.parametrize(("metric", "answer", "reference", "score"), TABLE)
def test_score(metric: str, answer: str, reference: str, score: float) -> None:
    assert evaluate.evaluate([answer], [reference], [metric])[metric] == pytest.approx(score)


def test_scores_are_means_and_perplexity_is_not_among_them() -> None:
    assert evaluate.evaluate(["a", "b", "c"], ["a", "x", "c"], ["exactMatch", "perplexity"]) == {
        "exactMatch": pytest.approx(2 / 3)
    }


def test_field_match_of_plain_text_is_refused() -> None:
    with pytest.raises(RunFailure, match="fieldMatch compares JSON objects; this wanted answer is none: 'hello'"):
        evaluate.evaluate(["{}"], ["hello"], ["fieldMatch"])


def test_what_cannot_be_measured_is_known_before_anything_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring long references is slow, and ends for no pod that is asked to stop."""
    monkeypatch.setattr(evaluate, "SCORES", {})
    evaluate.check(["hello"], ["rougeL", "exactMatch", "perplexity"])
    with pytest.raises(RunFailure, match="this wanted answer is none: 'hello'"):
        evaluate.check(["{}", "hello"], ["rougeL", "fieldMatch"])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="1 answers to 2 references"):
        evaluate.evaluate(["a"], ["a", "b"], ["exactMatch"])


@pytest.mark.parametrize(
    ("values", "thresholds", "missed"),
    [
        ({"exactMatch": 0.9}, None, []),
        ({"exactMatch": 0.9}, {"exactMatch": 0.9}, []),
        ({"exactMatch": 0.89}, {"exactMatch": 0.9}, ["exactMatch 0.89 is below 0.9"]),
        ({"perplexity": 3.0}, {"perplexity": 2.5}, ["perplexity 3 is above 2.5"]),
        ({"perplexity": 2.0}, {"perplexity": 2.5}, []),
        ({"perplexity": float("nan")}, {"perplexity": 2.5}, ["perplexity nan is above 2.5"]),
        ({}, {"rougeL": 0.1}, ["rougeL was not measured"]),
    ],
)
def test_thresholds(values: dict[str, float], thresholds: dict[str, float] | None, missed: list[str]) -> None:
    assert evaluate.below(values, thresholds) == missed
