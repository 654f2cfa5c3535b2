"""Examples -> token ids and labels: exactly the answers' tokens are trained, and the ids are those of inference.

A conversation is cut at the borders of the assistant's turns (chat_text), and each piece is tokenized alone. So what
stands before an answer has the very ids that the server will give the model, also where the tokenizer would merge
characters across the border. Where the tokenizer puts a space before every text (Llama 2, Mistral 7B), an answer has
the ids that it has behind its question: alone it would get a second space. Without a chat template the end-of-text
token follows the completion.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from slmops_trainer import chat_text
from slmops_trainer.chat_text import LossOn, Piece
from slmops_trainer.data import Example, Message
from slmops_trainer.failure import RunFailure

ROWS = "slmops_rows"  # where the tokenizer keeps how many tokens its model has weights for
CALL_TAGS = ("<tool_call>", "</tool_call>")  # text, as at the server, even where a tokenizer calls them special
IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index

BATCH_CHARACTERS = 1 << 20  # that are tokenized together: a call takes some 150 bytes a token until it is over

Ids = tuple[list[int], bool]  # a Piece, tokenized


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
        texts = chat_text.texts(tokenizer, example, loss_on, ends=ends)
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
    before = chat_text.render(tokenizer, probe.turns[:1], probe, prompt=True)[0]
    through = chat_text.render(tokenizer, probe.turns, probe)[0]
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


def bound(tokenizer: Any, rows: int) -> None:
    """Refuse texts with a token that the model has no weights for: `rows` is the number of those that it has."""
    setattr(tokenizer, ROWS, rows)


def encode_prompt(tokenizer: Any, example: Example) -> list[int]:
    """The ids that the model is given to answer the example's question. Raises RunFailure(BadDataset)."""
    if tokenizer.chat_template:
        turns = [turn.wire() for turn in example.messages]
        text, begin = chat_text.render(tokenizer, turns, example, prompt=True)[0], []
    else:
        text, begin = chat_text.plain(example), _begin(tokenizer)
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
    text = chat_text.render(tokenizer, probe.turns, probe)[0].rstrip()
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
