"""What of the teacher's answers is not trained on. Pure: rows in, rows and a drop report out."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonschema import exceptions, validators
from jsonschema.protocols import Validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from slmops.api.distillation import Filters
from slmops.api.run import CONFIGMAP_ROOT
from slmops_trainer.data import Example, Message, taught
from slmops_trainer.failure import RunFailure
from slmops_trainer.replies import CUT_OFF

NAMES = (
    "decontaminate", "maxLength", "noAnswer", "truncated", "minCharacters", "maxCharacters", "validJson", "jsonSchema",
    "dedupe", "unknownToken",
)  # fmt: skip

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Row:
    """One answer of the teacher. `example` is the prompt, `text` the answer as it came, `finish` its finish_reason."""

    example: Example
    text: str
    finish: str


def contaminated(prompts: Sequence[Example], held_out: Sequence[Example]) -> set[int]:
    """Positions of the prompts that also occur in the evaluation set (see data.taught)."""
    return {index for index, _ in taught(prompts, held_out)}


def apply(
    rows: Sequence[Row], filters: Filters, schema: Validator | None, *, thoughts: bool, check: Callable[[], None]
) -> tuple[list[Example], Counter[str]]:
    """What is trained on, in order, and how many rows each filter dropped. A row is counted once, by the first filter.

    `thoughts`: the teacher was asked to reason in <think></think>, which is cut out first.
    `check()` is called before each row and may raise: a schema may take long.
    """
    drops: Counter[str] = Counter()
    kept: list[Example] = []
    seen: set[tuple[tuple[Message, ...], str]] = set()
    for row in rows:
        check()
        answer = after_thoughts(row.text) if thoughts else row.text.strip()
        reason = _reason(row, answer, filters, schema)
        if reason is None and answer is not None:
            identity = (row.example.messages, answer)
            if not (filters.dedupe and identity in seen):
                seen.add(identity)
                kept.append(replace(row.example, answer=answer))
                continue
            reason = "dedupe"
        drops[reason or "noAnswer"] += 1
    return kept, drops


def after_thoughts(text: str) -> str | None:
    """The answer behind <think>...</think>; the whole text if there are no thoughts; None if they never end."""
    before, found, answer = text.rpartition(_CLOSE)
    if found:
        return answer.strip()
    return None if _OPEN in before + answer else text.strip()


def load_schema(name: str, key: str) -> Validator:
    """The JSON Schema in a mounted ConfigMap. Raises RunFailure(SourceNotFound, BadSpec)."""
    path = Path(CONFIGMAP_ROOT) / name / key
    where = f"ConfigMap {name}, key {key} (data.filters.jsonSchema)"
    if not path.is_file():
        raise RunFailure("SourceNotFound", f"{where} is not there. Create the key, or correct the reference.")
    return schema_of(path.read_text(encoding="utf-8"), where)


def schema_of(text: str, where: str) -> Validator:
    """A validator that fetches nothing from anywhere. Raises RunFailure(BadSpec)."""
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise RunFailure("BadSpec", f"{where} is no JSON Schema: it has to be an object.")
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        kind.check_schema(schema)
        validator: Validator = kind(schema, registry=Registry())
        validator.is_valid(None)  # a $ref that leads nowhere shows now, or at the first answer that reaches it
    except (ValueError, RecursionError) as error:
        raise RunFailure("BadSpec", f"{where} is not JSON: {error}.") from error
    except exceptions.SchemaError as error:
        raise RunFailure("BadSpec", f"{where} is no JSON Schema: {error.json_path}: {error.message[:200]}.") from error
    except Unresolvable as error:
        raise _unresolvable(where, error) from error
    return validator


def _reason(row: Row, answer: str | None, filters: Filters, schema: Validator | None) -> str | None:
    """The first filter that drops the row, None if all let it pass."""
    if filters.drop_truncated and row.finish in CUT_OFF:
        return "truncated"
    if not answer:
        return "noAnswer"
    if len(answer) < filters.min_characters:
        return "minCharacters"
    if filters.max_characters is not None and len(answer) > filters.max_characters:
        return "maxCharacters"
    if not filters.valid_json and schema is None:
        return None
    try:
        value = json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return "validJson" if filters.valid_json else "jsonSchema"
    if schema is not None and not _fits(schema, value):
        return "jsonSchema"
    return None


def _fits(schema: Validator, value: Any) -> bool:
    check: Callable[[Any], bool] = schema.is_valid
    try:
        return check(value)
    except RecursionError:
        return False
    except Unresolvable as error:
        raise _unresolvable("data.filters.jsonSchema", error) from error


def _unresolvable(where: str, error: Exception) -> RunFailure:
    what = f"{where} has a $ref that leads nowhere ({error})"
    return RunFailure("BadSpec", f"{what}. Put the definition into the schema.")


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
