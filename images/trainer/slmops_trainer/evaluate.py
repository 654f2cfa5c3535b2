"""How good answers are: pure scores of texts. Generating the answers is generate.py's."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from slmops_trainer.data import composed
from slmops_trainer.failure import RunFailure

SCORING = 2  # raise it when models are measured otherwise: what an older trainer measured is then measured anew

_WORD = re.compile(r"\w\S*")
_JOINERS = "\u200c\u200d"  # within words of Persian and of India


def evaluate(answers: Sequence[str], references: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
    """Mean of each metric over all answers, each 0 to 1. `perplexity` is not a matter of texts: see perplexity.py.

    Raises RunFailure(BadDataset) when a metric cannot be taken of these references.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers to {len(references)} references")
    return {name: sum(map(SCORES[name], answers, references)) / len(references) for name in of_answers(metrics)}


def of_answers(metrics: Sequence[str]) -> list[str]:
    """Those of the metrics for which questions are asked; perplexity needs none."""
    return [name for name in metrics if name in SCORES]


def check(references: Sequence[str], metrics: Sequence[str]) -> None:
    """Raise RunFailure(BadDataset) when a metric cannot be taken of these references, whatever the answers."""
    if "fieldMatch" in metrics:
        for reference in references:
            _fields(reference)


def exact_match(answer: str, reference: str) -> float:
    """1 if the texts are equal but for white space around them and for composition."""
    return float(composed(answer.strip()) == composed(reference.strip()))


def json_valid(answer: str, reference: str) -> float:  # noqa: ARG001  # one signature for all scores
    """1 if the answer is one JSON value."""
    return float(_parse(answer) is not _INVALID)


def field_match(answer: str, reference: str) -> float:
    """Share of equal fields of two JSON objects; missing and surplus fields count as unequal."""
    wanted, given = _fields(reference), _parse(answer)
    if not isinstance(given, dict):
        return 0.0
    names = wanted.keys() | given.keys()
    if not names:
        return 1.0
    equal = sum(1 for name in names if name in wanted and name in given and _same(wanted[name], given[name]))
    return equal / len(names)


def token_f1(answer: str, reference: str) -> float:
    """F1 of the bags of lower-case words, as SQuAD counts it (without its dropping of articles)."""
    given, wanted = words(answer), words(reference)
    if not given or not wanted:
        return float(given == wanted)
    return _f1((Counter(given) & Counter(wanted)).total(), len(given), len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-case words (Lin 2004), without stemming."""
    given, wanted = words(answer), words(reference)
    if not given or not wanted:
        return float(given == wanted)
    row = [0] * (len(wanted) + 1)
    for left in given:
        diagonal = 0
        for index, right in enumerate(wanted, 1):
            diagonal, row[index] = row[index], diagonal + 1 if left == right else max(row[index], row[index - 1])
    return _f1(row[-1], len(given), len(wanted))


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, with their marks: the vowels of Hindi and Thai, for example."""
    kept = (char if _in_word(char) else " " for char in composed(text.lower()))
    return _WORD.findall("".join(kept))


def below(values: dict[str, float], thresholds: dict[str, float] | None) -> list[str]:
    """One phrase for each threshold that is missed: at least for scores, at most for perplexity."""
    missed: list[str] = []
    for name, bar in (thresholds or {}).items():
        if name not in values:
            missed.append(f"{name} was not measured")
        # Written so that NaN misses.
        elif not (values[name] <= bar if name == "perplexity" else values[name] >= bar):
            side = "above" if name == "perplexity" else "below"
            missed.append(f"{name} {values[name]:.4g} is {side} {bar:.4g}")
    return missed


def _in_word(char: str) -> bool:
    return char.isalnum() or char == "_" or char in _JOINERS or unicodedata.category(char).startswith("M")


def _fields(reference: str) -> dict[str, Any]:
    wanted = _parse(reference)
    if not isinstance(wanted, dict):
        raise RunFailure(
            "BadDataset",
            f"fieldMatch compares JSON objects; this wanted answer is none: {reference[:80]!r}. "
            "Use exactMatch, tokenF1 or rougeL, or correct the evaluation set.",
        )
    return wanted


def _f1(common: int, given: int, wanted: int) -> float:
    return 2 * common / (given + wanted) if common else 0.0


def _same(left: Any, right: Any) -> bool:
    """JSON equality: true is not 1."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _number(text: str) -> int | float:
    """10.0 is 10, however deep it stands."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _parse(text: str) -> Any:
    try:
        return _composed(json.loads(text, parse_float=_number, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return _INVALID


def _composed(value: Any) -> Any:
    """The same JSON value with all its texts composed, also those that were written as escapes."""
    if isinstance(value, str):
        return composed(value)
    if isinstance(value, list):
        return [_composed(item) for item in value]
    if isinstance(value, dict):
        return {composed(name): _composed(item) for name, item in value.items()}
    return value


_INVALID = object()

SCORES: dict[str, Callable[[str, str], float]] = {
    "exactMatch": exact_match,
    "fieldMatch": field_match,
    "jsonValid": json_valid,
    "tokenF1": token_f1,
    "rougeL": rouge_l,
}
