"""How long a request would wait, from how long the answers before it took."""

from collections.abc import Iterable
from typing import NamedTuple

KEPT = 0.95  # of the past, with every new answer
UNKNOWN = 1.0  # seconds of an answer before any was measured


class Work(NamedTuple):
    """An answer to make: tokens of its prompt, and the most tokens it may have."""

    prompt: int
    limit: int


class QueueTime:
    """Seconds per token of a prompt and of an answer, while it holds a slot."""

    def __init__(self) -> None:
        self._answers = self._read = self._reading = self._written = self._writing = 0.0

    @property
    def measured(self) -> bool:
        """Whether any answer was noted."""
        return self._answers > 0

    def note(self, prompt: int, tokens: int, reading: float, writing: float) -> None:
        """An answer is whole: prompt tokens that were computed, its own tokens, seconds to the first and after it."""
        self._answers = self._answers * KEPT + 1
        self._read = self._read * KEPT + max(1, prompt)
        self._reading = self._reading * KEPT + reading
        self._written = self._written * KEPT + tokens
        self._writing = self._writing * KEPT + writing

    def seconds(self, work: Work) -> float:
        """For one answer in its slot. It is taken to get as long as answers do on average, if it may get so long."""
        if not self.measured:
            return UNKNOWN
        length = min(work.limit, self._written / self._answers)
        # the first token of an answer comes with its prompt
        later = max(1.0, self._written - self._answers)
        return work.prompt * self._reading / self._read + max(0.0, length - 1) * self._writing / later

    def wait(self, running: Iterable[Work], waiting: Iterable[Work], slots: int) -> float:
        """Until `slots` slots have done all that waits; what runs is half done on average."""
        left = sum(self.seconds(work) for work in waiting) + sum(self.seconds(work) for work in running) / 2
        return left / slots
