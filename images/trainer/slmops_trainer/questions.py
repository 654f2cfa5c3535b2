"""The questions to a teacher: what is asked of it, and by which keys its answers are found again."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slmops_trainer.answers import answer_key
from slmops_trainer.teacher import Sampling


@dataclass(frozen=True, slots=True)
class Question:
    """One request. `prompt` is the number of its prompt: several samples share one.

    `whole`: the key of the same question with whatever limit to the answer's length.
    """

    key: str
    whole: str
    prompt: int
    messages: tuple[dict[str, str], ...]
    seed: int


def make(
    prompts: Sequence[Sequence[dict[str, str]]],
    samples: int,
    teacher: str,
    sampling: Sampling,
    seed: int,
    check: Callable[[], None],
) -> list[Question]:
    """`samples` questions to each prompt, prompt by prompt. Equal prompts give equal keys: they are asked once.

    `check()` is called before each prompt and may raise.
    """
    found: list[Question] = []
    for number, messages in enumerate(prompts):
        check()
        for sample in range(samples):
            key = answer_key(messages, sample, teacher, sampling, seed)
            whole = answer_key(messages, sample, teacher, sampling, seed, limit=False)
            digest = hashlib.sha256(key.encode()).digest()
            found.append(Question(key, whole, number, tuple(messages), int.from_bytes(digest[:4], "big") >> 1))
    return found
