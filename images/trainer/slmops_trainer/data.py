"""Datasets: JSONL from an artifact or a ConfigMap -> examples, with every fault named by file and line."""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slmops.api.meta import Columns, Dataset
from slmops.api.run import CONFIGMAP_ROOT, Input
from slmops_artifacts import Parent, pinned
from slmops_trainer.failure import RunFailure

if TYPE_CHECKING:
    from slmops_trainer.context import Context

Role = Literal["training", "evaluation", "prompts"]
Format = Literal["messages", "prompt-completion"]

Question = tuple[str, str]  # a hash of the turns up to it, the system's aside, and the system's text, "" without one

ROLES = ("system", "user", "assistant")
# What would be left out in silence: of a turn, with what to do about it, and of a conversation.
UNREAD = {
    **dict.fromkeys(
        ("tool_calls", "function_call"),
        "Calls are not trained: leave the conversation out, or write them into content.",
    ),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "Write the thoughts into content, in front, as the model's chat template does, or remove them.",
    ),
}
TOOLS = ("tools", "functions")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user or assistant; an answer of `weight` 0 is shown and not learned."""

    role: str
    content: str
    weight: int = 1

    def wire(self) -> dict[str, str]:
        """The turn as chat templates and the OpenAI API take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Example:
    """One line of a dataset.

    messages  the turns before the answer; the last one is the user's (a plain prompt is one user turn)
    answer    the wanted answer; None only in sets of prompts
    line      its line in the file, from 1
    weight    0: the answer is shown and not learned
    """

    messages: tuple[Message, ...]
    answer: str | None
    line: int = 0
    weight: int = 1

    @property
    def turns(self) -> list[dict[str, str]]:
        """All turns with the answer last, as chat templates take them."""
        tail = [] if self.answer is None else [{"role": "assistant", "content": self.answer}]
        return [message.wire() for message in self.messages] + tail

    @property
    def weights(self) -> list[int]:
        """Of every answer, in order: 1, or 0 where it is not learned."""
        tail = [] if self.answer is None else [self.weight]
        return [message.weight for message in self.messages if message.role == "assistant"] + tail

    @property
    def row(self) -> dict[str, Any]:
        """The example as a line of a `messages` dataset."""
        weights = iter(self.weights)
        unlearned = [turn["role"] == "assistant" and not next(weights) for turn in self.turns]
        return {
            "messages": [
                {**turn, **({"weight": 0} if no else {})} for turn, no in zip(self.turns, unlearned, strict=True)
            ]
        }

    @property
    def questions(self) -> list[Question]:
        """What it teaches answers to, its own question last: of a conversation, every answer is trained on.

        Equal for questions that differ in case, white space or composition alone.
        """
        talk, system = hashlib.sha256(), ""
        found: list[Question] = []
        for message in self.messages:
            text = " ".join(composed(message.content.casefold()).split())
            if message.role == "system":
                system = text
                continue
            talk.update(json.dumps([message.role, text]).encode())
            if message.role == "user":
                found.append((talk.hexdigest(), system))
        return found


@dataclass(frozen=True, slots=True)
class Examples:
    """A loaded dataset. `source` names it to people; `parent` is its row in the lineage, with its content's digest."""

    items: tuple[Example, ...]
    format: Format
    source: str
    parent: Parent

    @property
    def digest(self) -> str:
        """sha256:... of the content."""
        return self.parent.digest

    @property
    def references(self) -> list[str]:
        """The wanted answers, in order; prompts without one give an empty text."""
        return [item.answer or "" for item in self.items]


def composed(text: str) -> str:
    """The text as Unicode's NFC has it: two that differ in composition alone read alike, to most tokenizers as well.

    For comparisons only: what is trained on and asked stays as it is given.
    """
    return unicodedata.normalize("NFC", text)


def load(ctx: "Context", dataset: Dataset, role: Role) -> Examples:
    """Fetch and read a dataset. Only `prompts` may lack answers; what answers they have is kept.

    Raises RunFailure(BadDataset) for what is wrong in it, and the failures of Context.pull.
    """
    if dataset.config_map is not None:
        path = Path(CONFIGMAP_ROOT) / dataset.config_map.name / dataset.config_map.key
        source = f"ConfigMap {dataset.config_map.name}, key {dataset.config_map.key}"
        if not path.is_file():
            raise RunFailure("SourceNotFound", f"{source} is not there. Create the key, or correct the reference.")
        digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        uri = f"configmap://{dataset.config_map.name}/{dataset.config_map.key}"
    else:
        assert dataset.uri is not None  # the CRD demands one of the two
        secret = dataset.secret_ref.name if dataset.secret_ref else None
        try:
            folder, manifest = ctx.pull(
                Input(uri=dataset.uri, secret=secret),
                f"data-{role}",
                f"Pulling {role} data",
                choose=lambda paths: [_pick(paths, dataset.file, dataset.uri or "")],
            )
        except RunFailure as failure:
            if failure.reason != "UnsupportedModel":
                raise
            raise RunFailure("BadDataset", failure.message) from failure
        [path] = (path for path in folder.rglob("*.jsonl") if path.is_file())
        source, digest, uri = (
            f"{dataset.uri}, file {path.relative_to(folder)}",
            manifest.digest,
            pinned(dataset.uri, manifest),
        )
    items, fmt = read(path, dataset, role, source)
    return Examples(items, fmt, source, Parent(kind="dataset", uri=uri, digest=digest))


def read(path: Path, dataset: Dataset, role: Role, source: str = "") -> tuple[tuple[Example, ...], Format]:
    """Read one JSONL file. Raises RunFailure(BadDataset) with the line number."""
    source = source or path.name
    columns = dataset.columns or Columns()
    fmt: Format | None = None if dataset.format == "auto" else dataset.format
    items: list[Example] = []
    for number, row in _rows(path, source):
        where = f"{source}, line {number}"
        if fmt is None:
            fmt = _detect(row, columns, role, where)
        parse = _chat if fmt == "messages" else _pair
        items.append(parse(row, columns, role, number, where))
        if dataset.limit is not None and len(items) >= dataset.limit:
            break
    if not items or fmt is None:
        raise RunFailure("BadDataset", f"{source} holds no example. Write one JSON object a line.")
    return tuple(items), fmt


def leaks(training: Sequence[Example], evaluation: Sequence[Example]) -> list[tuple[int, int]]:
    """(line in training, line in evaluation) of every held-out question that also occurs in training."""
    first: dict[Question, int] = {}
    for at, question in taught(training, evaluation):
        first.setdefault(question, training[at].line)
    asked = ((item.questions[-1], item.line) for item in evaluation)
    return [(first[question], line) for question, line in asked if question in first]


def taught(examples: Sequence[Example], held_out: Sequence[Example]) -> Iterator[tuple[int, Question]]:
    """The position of every example that teaches a held-out question's answer, and that question.

    Two system texts make two tasks of one question; without one on one of the sides it is the same task: the system
    text may be put before it later, as DistillationJobs do.
    """
    known: dict[str, set[str]] = {}
    for example in held_out:
        talk, system = example.questions[-1]
        known.setdefault(talk, set()).add(system)
    for at, example in enumerate(examples):
        for talk, system in example.questions:
            for other in known.get(talk, ()):
                if not system or not other or system == other:
                    yield at, (talk, other)


def refuse_leaks(training: Examples, evaluation: Examples) -> None:
    """Raise RunFailure(BadDataset) if a held-out question occurs in training: its score would say nothing."""
    found = leaks(training.items, evaluation.items)
    if not found:
        return
    first, held_out = found[0]
    raise RunFailure(
        "BadDataset",
        f"{len(found)} of {len(evaluation.items)} held-out examples also occur in training; the first: line {held_out} "
        f"of {evaluation.source} is line {first} of {training.source}. Remove them from one of the two.",
    )


def _rows(path: Path, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{source}, line {number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RunFailure(
                    "BadDataset", f"{where} is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8."
                ) from error
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                # A plain ValueError is a number with more digits than Python reads.
                what = {RecursionError: "nested too deeply", ValueError: "a number is too long"}.get(type(error))
                what = what or getattr(error, "msg", "")
                raise RunFailure(
                    "BadDataset", f"{where} is not JSON ({what}). Write one JSON object a line (JSONL)."
                ) from error
            if not isinstance(row, dict):
                raise RunFailure(
                    "BadDataset",
                    f"{where} is a JSON {_kind(row)}, not an object. Write one JSON object a line (JSONL).",
                )
            yield number, row


def _detect(row: dict[str, Any], columns: Columns, role: Role, where: str) -> Format:
    """Tell the format by the first row's columns."""
    if (columns.messages or "messages") in row:
        return "messages"
    prompt, completion = columns.prompt or "prompt", columns.completion or "completion"
    if prompt in row and (role == "prompts" or completion in row):
        return "prompt-completion"
    raise RunFailure(
        "BadDataset",
        f"{where} has neither {columns.messages or 'messages'!r} nor {prompt!r}"
        f"{'' if role == 'prompts' else f' and {completion!r}'}; it has {_list(row)}. "
        "Name the columns in dataset.columns.",
    )


def _cell(row: dict[str, Any], name: str, field: str, where: str) -> Any:
    if name not in row:
        raise RunFailure(
            "BadDataset",
            f"{where} has no column {name!r}; it has {_list(row)}. Name the column in dataset.columns.{field}.",
        )
    return row[name]


def _pair(row: dict[str, Any], columns: Columns, role: Role, line: int, where: str) -> Example:
    name, wanted = columns.prompt or "prompt", columns.completion or "completion"
    prompt = _text(_cell(row, name, "prompt", where), name, where)
    if role == "prompts" and row.get(wanted) is None:
        return Example((Message("user", prompt),), None, line)
    return Example((Message("user", prompt),), _text(_cell(row, wanted, "completion", where), wanted, where), line)


def _chat(row: dict[str, Any], columns: Columns, role: Role, line: int, where: str) -> Example:
    name = columns.messages or "messages"
    turns = _cell(row, name, "messages", where)
    if not isinstance(turns, list) or not turns:
        raise RunFailure("BadDataset", f"{where}: {name!r} must be a list of turns {{role, content}}, not empty.")
    for key in TOOLS:
        if row.get(key):
            raise RunFailure(
                "BadDataset", f"{where} has {key!r}, which the model would not be shown. Remove the column."
            )
    messages = [_turn(turn, f"{where}, turn {index}") for index, turn in enumerate(turns, 1)]
    _check_order(messages, where)
    if role == "evaluation":
        # The last answer is held out. The turns before it may well be trained on, and would hide what it costs.
        messages = [replace(message, weight=0) if message.role == "assistant" else message for message in messages]
    if messages[-1].role == "assistant":
        # What is held out or asked for again is asked whatever its weight.
        weight = messages[-1].weight if role == "training" else 1
        return Example(tuple(messages[:-1]), messages[-1].content, line, weight)
    if role != "prompts":
        raise RunFailure(
            "BadDataset", f"{where}: the last turn must be the assistant's, it is the {messages[-1].role}'s."
        )
    return Example(tuple(messages), None, line)


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise RunFailure("BadDataset", f"{where} must be an object with role and content.")
    if turn["role"] not in ROLES:
        raise RunFailure("BadDataset", f"{where} has the role {turn['role']!r}; known are {', '.join(ROLES)}.")
    for key, remedy in UNREAD.items():
        if turn.get(key):
            raise RunFailure("BadDataset", f"{where} has {key!r}, which would be left out. {remedy}")
    answers, weight = turn["role"] == "assistant", turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1) or (weight and not answers)):
        raise RunFailure(
            "BadDataset", f"{where} has the weight {json.dumps(weight)}; an assistant's turn may have 0 or 1, others 0."
        )
    return Message(turn["role"], _text(turn["content"], "content", where), 0 if answers and weight == 0 else 1)


def _check_order(messages: Sequence[Message], where: str) -> None:
    """One system turn at most, first; then user and assistant in turn, the user first."""
    talk = messages[1:] if messages[0].role == "system" else messages
    for index, message in enumerate(talk):
        wanted = "assistant" if index % 2 else "user"
        if message.role != wanted:
            at = index + 1 + len(messages) - len(talk)
            raise RunFailure(
                "BadDataset",
                f"{where}, turn {at} is the {message.role}'s, expected the {wanted}'s: "
                "after an optional system turn, user and assistant take turns.",
            )
    if not talk:
        raise RunFailure("BadDataset", f"{where} has no user turn.")


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise RunFailure("BadDataset", f"{where}: {name!r} must be text, it is a JSON {_kind(value)}.")
    if not value.strip():
        raise RunFailure("BadDataset", f"{where}: {name!r} is empty.")
    # A lone surrogate (from "\ud800") is valid JSON and no text: tokenizers cannot take it.
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise RunFailure("BadDataset", f"{where}: {name!r} holds half a surrogate pair. Save the text as UTF-8.")
    return value


def _pick(paths: Sequence[str], file: str | None, uri: str) -> str:
    """The one file of a dataset that is read; nothing else of it is fetched."""
    found = sorted(path for path in paths if path.endswith(".jsonl"))
    names = ", ".join(found[:10]) or "none"
    if file is not None:
        if file in found:
            return file
        raise RunFailure("BadDataset", f"{uri} has no file {file!r}. Its .jsonl files: {names}. Correct dataset.file.")
    if len(found) == 1:
        return found[0]
    raise RunFailure(
        "BadDataset",
        f"{uri} holds {len(found)} .jsonl files: {names}. "
        + ("Name one in dataset.file." if found else "Write one JSON object a line into a .jsonl file."),
    )


def _kind(value: Any) -> str:
    names = {list: "array", dict: "object", bool: "boolean", int: "number", float: "number", str: "string"}
    return "null" if value is None else names[type(value)]


def _list(row: dict[str, Any]) -> str:
    names = [repr(name[:40]) for name in row]
    return (", ".join(names[:12]) + (", ..." if len(names) > 12 else "")) or "no column"
