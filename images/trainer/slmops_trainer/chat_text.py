"""Examples as text: a conversation as the tokenizer's chat template writes it, cut at the borders of its answers.

A template that shows earlier answers otherwise than it showed them when they were given makes one text of each answer,
with all that stood before it then. Without a chat template a prompt and its completion are simply joined.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from slmops_trainer.data import Example, Message
from slmops_trainer.failure import RunFailure

COMPLETED = "{# SLMOps: what stands before an answer that is given #}"  # ends a model's own chat template
CLOCK = "strftime_now"  # what chat templates call, and where the tokenizer keeps it
WORD = re.compile(r"<[^<>]+>|[^\s<>]+")

LossOn = Literal["assistant", "all"]
Piece = tuple[str, bool]  # text, is it an answer to learn


def date(tokenizer: Any, began: datetime) -> None:
    """Make chat templates that write the date or the time write this one, whenever they are rendered."""
    setattr(tokenizer, CLOCK, began.strftime)


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
    asked = render(tokenizer, probe.turns[:1], probe, prompt=True)[0]
    given = render(tokenizer, probe.turns, probe)[0]
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


def texts(tokenizer: Any, example: Example, loss_on: LossOn, *, ends: bool) -> list[list[Piece]]:
    """The rendered conversation, cut at the borders of the answers; or one such text for each answer.

    `ends`: whether the template ends an answer with a token.
    """
    if not tokenizer.chat_template:
        return [[(plain(example), False), (example.answer or "", example.weight > 0 or loss_on == "all")]]
    turns = example.turns
    whole, marks = render(tokenizer, turns, example)
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
    before = render(tokenizer, turns[:-1], example, prompt=True)[0]
    through = render(tokenizer, turns, example)[0]
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


def render(
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


def plain(example: Example) -> str:
    """The prompt of a model without a chat template. Raises RunFailure(UnsupportedModel) for a conversation."""
    if len(example.messages) != 1:
        raise RunFailure(
            "UnsupportedModel",
            f"Line {example.line} is a conversation and the model has no chat template. Use a model with one "
            "(chat_template in tokenizer_config.json, or chat_template.jinja), or prompt-completion data.",
        )
    return example.messages[0].content
