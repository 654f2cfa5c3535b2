"""Examples -> token ids and labels: exactly the answers' tokens are trained, and the ids are those of inference.

A conversation is rendered by the tokenizer's chat template and cut at the borders of the assistant's turns; each
piece is tokenized alone. So what stands before an answer has the very ids that the server will give the model, also
where the tokenizer would merge characters across the border. Where the tokenizer puts a space before every text
(Llama 2, Mistral 7B), an answer has the ids that it has behind its question: alone it would get a second space. A
template that shows earlier answers otherwise than it showed them when they were given makes one text of each answer,
with all that stood before it then. Without a chat template a prompt and its completion are simply joined, with the
end-of-text token after them.
"""

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from slmops_trainer.data import Example, Message
from slmops_trainer.failure import RunFailure

COMPLETED = "{# SLMOps: what stands before an answer that is given #}"  # ends a model's own chat template
CLOCK = "strftime_now"  # what chat templates call, and where the tokenizer keeps it
ROWS = "slmops_rows"  # where the tokenizer keeps how many tokens its model has weights for
WORD = re.compile(r"<[^<>]+>|[^\s<>]+")
CALL_TAGS = ("<tool_call>", "</tool_call>")  # text, as at the server, even where a tokenizer calls them special
IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index

BATCH_CHARACTERS = 1 << 20  # that are tokenized together: a call takes some 150 bytes a token until it is over

LossOn = Literal["assistant", "all"]
Piece = tuple[str, bool]  # text, is it an answer to learn
Ids = tuple[list[int], bool]  # the same, tokenized


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example. `labels` is `input_ids` where the loss counts, IGNORED elsewhere; both have the same length.

    Arrays of 32 bits ("i"): all examples lie in memory throughout the training.
    """

    input_ids: "array[int]"
    labels: "array[int]"

    @property
    def trained(self) -> int:
        """Tokens that the loss counts: the first token of a text has no prediction, whatever its label."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """Encoded examples, in the order of the dataset, and how many of the examples were too long to be kept.

    A conversation may have become several: one for each of its answers.
    """

    items: tuple[Encoded, ...]
    too_long: int = 0


def encode(
    tokenizer: Any,
    examples: Sequence[Example],
    stop_ids: Sequence[int],
    loss_on: LossOn,
    max_length: int,
    source: str = "the set",
    check: Callable[[], None] | None = None,
) -> EncodedSet:
    """Encode examples with answers. Those above `max_length` or the model's context are left out and counted, not cut.

    `stop_ids`: the tokens at which generation ends (models.Loaded.stop_ids); every answer is made to end in one.
    `source` names the examples to people; `check()` is called before each of them and may raise.
    Raises RunFailure(BadDataset) when all are too long or one has a token that the model lacks,
    RunFailure(NothingToTrain) when the loss is on answers and none of them has a token but its end.
    """
    limit = min(max_length, tokenizer.model_max_length)
    kept: list[Encoded] = []
    lengths: list[int] = []  # of those that are too long
    first: Example | None = None  # of those that fit
    says = loss_on == "all"
    for example, texts in _tokenized(tokenizer, examples, loss_on, check):
        items = [_join(tokenizer, parts, stop_ids, loss_on) for parts in texts]
        length = max(len(item.input_ids) for item in items)
        if length > limit:
            lengths.append(length)
            continue
        for item in items:
            _check_ids(tokenizer, item.input_ids, example)
        kept += items
        first = first or example
        says = says or any(_says(parts, stop_ids) for parts in texts)
    if first is None and lengths:
        raise RunFailure(
            "BadDataset",
            f"All {len(examples)} examples are longer than {limit} tokens, the lesser of training.maxLength and the "
            f"model's context; the shortest has {min(lengths)}. Raise maxLength, or shorten them.",
        )
    if first is not None and not says:
        raise _nothing(tokenizer, first, source)
    return EncodedSet(tuple(kept), len(lengths))


def lengths(
    tokenizer: Any, examples: Sequence[Example], stop_ids: Sequence[int], check: Callable[[], None] | None = None
) -> Iterator[int]:
    """Of each example the tokens of the longest text that is made of it to learn its answers. Raises as `encode`."""
    for _, texts in _tokenized(tokenizer, examples, "assistant", check):
        yield max(len(_join(tokenizer, parts, stop_ids, "assistant").input_ids) for parts in texts)


def _tokenized(
    tokenizer: Any, examples: Sequence[Example], loss_on: LossOn, check: Callable[[], None] | None
) -> Iterator[tuple[Example, list[list[Ids]]]]:
    """Each example with its pieces' ids, by text. They go to the tokenizer many at a time: one by one is slow."""
    batch: list[tuple[Example, list[list[Piece]]]] = []
    characters = 0
    ends, behind = turn_end(tokenizer) is not None, _spaced(tokenizer)
    for example in examples:
        if check is not None:
            check()
        texts = _texts(tokenizer, example, loss_on, ends=ends)
        batch.append((example, texts))
        characters += sum(len(piece) for pieces in texts for piece, _ in pieces)
        if characters >= BATCH_CHARACTERS:
            yield from _tokenize(tokenizer, batch, behind=behind)
            batch, characters = [], 0
    if batch:
        yield from _tokenize(tokenizer, batch, behind=behind)


def _tokenize(
    tokenizer: Any, batch: Sequence[tuple[Example, list[list[Piece]]]], *, behind: bool
) -> Iterator[tuple[Example, list[list[Ids]]]]:
    """`behind`: an answer's ids are those that follow what stands before it, where that keeps its own."""
    texts = [[piece for piece, _ in pieces] for _, several in batch for pieces in several]
    ids = iter(_ids(tokenizer, [piece for pieces in texts for piece in pieces]))
    pairs = [before + answer for pieces in texts for before, answer in zip(pieces[::2], pieces[1::2], strict=False)]
    joined = iter(_ids(tokenizer, pairs) if behind else ())
    for example, several in batch:
        found = [[(next(ids), answer) for _, answer in pieces] for pieces in several]
        for parts in found:
            for at in range(1, len(parts), 2) if behind else ():
                before, both = parts[at - 1][0], next(joined)
                if both[: len(before)] == before:
                    parts[at] = (both[len(before) :], parts[at][1])
        yield example, found


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
    ids: list[list[int]] = found["input_ids"]
    return ids


def _spaced(tokenizer: Any) -> bool:
    """Whether an answer alone gets other ids than behind its question: Llama 2's puts a space before each text."""
    if not tokenizer.chat_template:
        return False
    probe = Example((Message("user", "x"),), "y")
    before = _render(tokenizer, probe.turns[:1], probe, prompt=True)[0]
    through = _render(tokenizer, probe.turns, probe)[0]
    if not through.startswith(before):
        return False
    asked, answer, both = _ids(tokenizer, [before, through[len(before) :], through])
    return asked + answer != both


def _says(parts: Sequence[Ids], stop_ids: Sequence[int]) -> bool:
    """Whether the example's answers have a token beside those that end them."""
    return any(len(piece) > (piece[-1] in stop_ids) for piece, answer in parts if answer and piece)


def _nothing(tokenizer: Any, example: Example, source: str) -> RunFailure:
    answer = example.answer or ""
    if not any(example.weights):
        remedy = "It has weight 0, as have all of its conversation: give the answers to learn weight 1, or none."
    elif tokenizer(answer, add_special_tokens=False)["input_ids"]:
        remedy = "The model's chat template leaves the assistant's content out: use a model with another template."
    else:
        remedy = (
            "The model's tokenizer leaves it out: write text that it knows into the column of the answers "
            "(completion, or the content of the assistant's turn), or use another model."
        )
    return RunFailure(
        "NothingToTrain",
        f"No answer of {source} has a token to train on; the first is that of line {example.line}, {answer[:80]!r}. "
        f"{remedy}",
    )


def date(tokenizer: Any, began: datetime) -> None:
    """Make chat templates that write the date or the time write this one, whenever they are rendered."""
    setattr(tokenizer, CLOCK, began.strftime)


def bound(tokenizer: Any, rows: int) -> None:
    """Refuse texts with a token that the model has no weights for: `rows` is the number of those that it has."""
    setattr(tokenizer, ROWS, rows)


def encode_prompt(tokenizer: Any, example: Example) -> list[int]:
    """The ids that the model is given to answer the example's question. Raises RunFailure(BadDataset)."""
    if tokenizer.chat_template:
        text, begin = _render(tokenizer, [turn.wire() for turn in example.messages], example, prompt=True)[0], []
    else:
        text, begin = _plain(example), _begin(tokenizer)
    found = begin + list(tokenizer(text, add_special_tokens=False)["input_ids"])
    _check_ids(tokenizer, found, example)
    return found


def _rows(tokenizer: Any) -> int:
    rows: int = getattr(tokenizer, ROWS, 1 << 62)  # without a model to it, as many as any text may need
    return rows


def _check_ids(tokenizer: Any, ids: Sequence[int], example: Example) -> None:
    highest = max(ids, default=0)
    if highest >= _rows(tokenizer):
        raise RunFailure(
            "BadDataset",
            f"Line {example.line} holds {tokenizer.convert_ids_to_tokens(highest)}: the tokenizer makes a token of it "
            "that the model has no weights for. Take it out of the text.",
        )


def lacking(tokenizer: Any, texts: Iterable[str], check: Callable[[], None]) -> set[int]:
    """Positions of the texts with a token that the model has no weights for.

    `check()` is called before each of them and may raise.
    """
    rows = _rows(tokenizer)
    if max(tokenizer.get_vocab().values()) < rows:
        return set()  # as for nearly all models: no text need be looked at
    found: set[int] = set()
    for at, text in enumerate(texts):
        check()
        if max(tokenizer(text, add_special_tokens=False)["input_ids"], default=0) >= rows:
            found.add(at)
    return found


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer's ids, without special tokens, to the letter: as it was trained, as the server gives it.

    Left to themselves, some tokenizers "clean up" spaces before punctuation, which the model wrote.
    """
    hidden = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in CALL_TAGS
    }
    shown = [number for number in ids if number not in hidden]
    text: str = tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def turn_end(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an answer, if it uses one.

    Base models of chat families declare another end of text than their template writes: both must stop generation.
    """
    ids = template_ids(tokenizer)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[-1] if ids and ids[-1] in special else None


def template_ids(tokenizer: Any) -> list[int]:
    """The ids of a short conversation up to its end, as the chat template writes it; none without a template."""
    if not tokenizer.chat_template:
        return []
    probe = Example((Message("user", "x"),), "y")
    # White space after the end of a turn is the template's, and generation never gets that far.
    text = _render(tokenizer, probe.turns, probe)[0].rstrip()
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def complete(tokenizer: Any, examples: Iterable[Example]) -> None:
    """Make the chat template begin an answer that is asked for with all that it writes before one that is given.

    Qwen3's writes empty <think></think> tags before a given answer only. They would be trained as a part of every
    answer, and the server would show them to people. In the completed template, which is published with the model,
    they belong to the question. A caller who says `enable_thinking` gets what the template gave before.
    If an answer of `examples`, be it an earlier one of a conversation, brings such text of its own, thoughts are to be
    learned: then the template is as it was before anything of ours.
    """
    if not tokenizer.chat_template:
        return
    own = tokenizer.chat_template = tokenizer.chat_template.partition(COMPLETED)[0]
    probe = Example((Message("user", "x"),), "qxz")
    asked = _render(tokenizer, probe.turns[:1], probe, prompt=True)[0]
    given = _render(tokenizer, probe.turns, probe)[0]
    start = given.find("qxz", len(asked))
    added = given[len(asked) : start] if given.startswith(asked) and start > 0 else ""
    words = WORD.findall(added)  # white space is harmless: it is left where the template has it
    answers = (turn["content"] for example in examples for turn in example.turns if turn["role"] == "assistant")
    if not words or any(word in answer for answer in answers for word in words):
        return
    more = (
        f"{{% if add_generation_prompt and enable_thinking is not defined %}}{{{{ {json.dumps(added)} }}}}{{% endif %}}"
    )
    tokenizer.chat_template = own.removesuffix("\n") + COMPLETED + more  # Jinja drops that line end, too


def _texts(tokenizer: Any, example: Example, loss_on: LossOn, *, ends: bool) -> list[list[Piece]]:
    """The rendered conversation, cut at the borders of the answers; or one such text for each answer.

    `ends`: whether the template ends an answer with a token.
    """
    if not tokenizer.chat_template:
        return [[(_plain(example), False), (example.answer or "", example.weight > 0 or loss_on == "all")]]
    turns = example.turns
    whole, marks = _render(tokenizer, turns, example)
    learned = [weight > 0 or loss_on == "all" for weight in example.weights]
    spans = _spans(tokenizer, turns, whole, example) if ends else None
    if spans is None:
        places = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
        answers = list(zip(places, learned, strict=True))
        # Where all is trained, the last text has all; where nothing is, it stands for the example.
        wanted = [(at, learn) for at, learn in answers if learn and loss_on == "assistant"] or answers[-1:]
        return [_alone(*_answer(tokenizer, turns[: at + 1], example), learn=learn) for at, learn in wanted]
    found: list[Piece] = []
    at = 0
    for start, end, learn in _answers(spans, marks, learned):
        # White space after the end of a turn is the template's, and generation never gets that far.
        stripped = start + len(whole[start:end].rstrip())
        found += [(whole[at:start], False), (whole[start:stripped], learn)]
        at = stripped
    return [[*found, (whole[at:], False)]]


def _answers(
    spans: Sequence[tuple[int, int]], marks: Sequence[tuple[int, int]], learned: Sequence[bool]
) -> list[tuple[int, int, bool]]:
    """Start and end of every answer, or of what is marked in it, and whether it is learned.

    What asks for an answer is no part of it, although SmolLM3's template marks it. Marks that leave out an answer tell
    nothing where some answers are not learned.
    """
    found = [
        (max(start, before), end, at)
        for start, end in marks
        for at, (before, through) in enumerate(spans)
        if before < end <= through
    ]
    if found and (all(learned) or {at for _, _, at in found} == {*range(len(spans))}):
        return [(start, end, learned[at]) for start, end, at in found]
    return [(start, end, learn) for (start, end), learn in zip(spans, learned, strict=True)]


def _alone(before: str, through: str, *, learn: bool) -> list[Piece]:
    """What is asked and what is answered, to be learned or not; behind it is nothing that generation gets to."""
    return [(before, False), (through[len(before) :].rstrip(), learn)]


def _spans(tokenizer: Any, turns: list[dict[str, str]], whole: str, example: Example) -> list[tuple[int, int]] | None:
    """Start and end of every answer in the text: where the same template would start it, and where it ends it.

    None where the text shows an earlier answer otherwise than as it was given: Qwen3's with no empty thoughts.
    """
    found: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, through = _answer(tokenizer, turns[: index + 1], example)
        shorter = through.removesuffix(tokenizer.eos_token)
        if not whole.startswith(through) and not shorter.rstrip().endswith(turn["content"].strip()):
            # Phi-3's ends a turn and then the text, which more turns go on with. A turn with no end of its own is not
            # taken so: the model would learn not to stop there.
            through = shorter
        if not whole.startswith(through):
            return None
        found.append((len(before), len(through)))
    return found


def _answer(tokenizer: Any, turns: list[dict[str, str]], example: Example) -> tuple[str, str]:
    """The text that asks for the last turn, and the text with that turn, which begins with it."""
    before = _render(tokenizer, turns[:-1], example, prompt=True)[0]
    through = _render(tokenizer, turns, example)[0]
    if not through.startswith(before):
        pairs = enumerate(zip(before, through, strict=False))
        added = before[next((at for at, (one, other) in pairs if one != other), len(through)) :]
        raise RunFailure(
            "UnsupportedModel",
            f"The model's chat template puts {added!r} before an answer that is asked for, and not before one that "
            f"is given (turn {len(turns)} of line {example.line}): what is trained would not be what is asked. "
            "Use a model whose template begins both alike.",
        )
    return before, through


def _render(
    tokenizer: Any, turns: list[dict[str, str]], example: Example, *, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the character spans of what the template marks with {% generation %}."""
    clock = {CLOCK: getattr(tokenizer, CLOCK)} if hasattr(tokenizer, CLOCK) else {}
    marked = not prompt and "{% generation" in tokenizer.chat_template.replace("{%-", "{%")
    try:
        texts, marks = render_jinja_template(
            conversations=[turns],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked,
            **tokenizer.special_tokens_map,
            **clock,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise RunFailure(
            "BadDataset", f"The model's chat template refuses the conversation of line {example.line}: {error}"
        ) from error
    return texts[0], [(start, end) for start, end in marks[0]] if marked else []


def _join(tokenizer: Any, parts: Sequence[Ids], stop_ids: Sequence[int], loss_on: LossOn) -> Encoded:
    begin = [] if tokenizer.chat_template else _begin(tokenizer)
    ids = list(begin)
    labels = [IGNORED] * len(begin) if loss_on == "assistant" else list(begin)
    after_answer = False
    for index, (piece, answer) in enumerate(parts):
        trained = [answer or loss_on == "all"] * len(piece)
        # The end of a turn is the answer's, also where the template's marks leave it out.
        if after_answer and piece and piece[0] in stop_ids:
            trained[0] = True
        ids += piece
        labels += [token if wanted else IGNORED for token, wanted in zip(piece, trained, strict=True)]
        after_answer = answer
        after: list[int] = next((other for other, _ in parts[index + 1 :] if other), [])
        if answer and not {*piece[-1:], *after[:1]} & {*stop_ids}:
            # Neither the template nor the text ends the answer: without this the model would learn never to stop.
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
    return Encoded(array("i", ids), array("i", labels))


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text, such as a beginning-of-text token."""
    found: list[int] = tokenizer("")["input_ids"]
    return [token for token in found if token != tokenizer.eos_token_id]


def _plain(example: Example) -> str:
    if len(example.messages) != 1:
        raise RunFailure(
            "UnsupportedModel",
            f"Line {example.line} is a conversation and the model has no chat template. Use a model with one "
            "(chat_template in tokenizer_config.json, or chat_template.jinja), or prompt-completion data.",
        )
    return example.messages[0].content
