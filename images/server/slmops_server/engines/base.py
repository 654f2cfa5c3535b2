"""The interface every engine fulfils, and the plain data that crosses it."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from slmops_server.engines.adapters import BASE, Adapter, Shelf

# Bounds of a histogram of the tokens of a step, vLLM's and two of small steps
STEP_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 switch those filters off.

    logit_bias: (token, added to its logit). stop_ids: tokens that end the answer beside the model's own end tokens;
    none of them all comes before `min_tokens` tokens. logprobs: how many alternatives to tell, -1: no logprobs at all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int = -1


class Guide(Protocol):
    """What the text of one answer may be, token by token."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, shape [vocab]. ValueError when the guide gave up."""

    def take(self, token: int) -> None:
        """The token was chosen."""


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to generate. `prompt` holds token ids; prompt + max_tokens fit into the engine's max_len."""

    id: int
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    ignore_eos: bool = False
    guide: Guide | None = None
    score_prompt: bool = False  # tell the logprobs of the prompt's tokens too, with the first token
    adapter: Adapter = BASE


class Scores(NamedTuple):
    """Natural logarithms of probabilities, as the model gave them: of a token, and of the likeliest, best first."""

    logprob: float
    top: list[tuple[int, float]]


class Token(NamedTuple):
    """One generated token. `finish` is None, or "stop" (token is an end token), "length", "error".

    `scores` where the job asks for logprobs; `prompt_scores`, on the first token, one for each token of the prompt
    after its first.
    `cached`, on the first token: tokens of the prompt that did not have to be computed.
    """

    job: int
    token: int
    finish: str | None
    scores: Scores | None = None
    prompt_scores: list[tuple[int, Scores]] | None = None
    cached: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine says about itself."""

    name: str
    slots: int
    max_len: int
    threads: int
    notes: dict[str, str]


@dataclass(slots=True)
class Drafted:
    """Speculation so far: calls over guessed tokens, these tokens, and how many of them were right."""

    calls: int = 0
    tokens: int = 0
    accepted: int = 0


class Engine(Protocol):
    """An engine owns its model and is driven by one thread: submit and cancel between calls of step.

    A job's tokens do not depend on what else runs. After a Token with `finish`, or a cancel, the job is gone.
    """

    info: EngineInfo
    drafted: Drafted
    adapters: Shelf

    def submit(self, job: Job) -> None:
        """Queue a job; it starts in a later step, in order of arrival."""

    def cancel(self, job: int) -> None:
        """Forget a job, queued or running; unknown ids are ignored."""

    def step(self) -> list[Token]:
        """Advance what runs by one step. Blocks for that step only. An empty list is no sign of idleness."""

    @property
    def busy(self) -> bool:
        """Whether any job is queued or running."""

    @property
    def running(self) -> int:
        """Jobs that hold a slot."""


class EngineRefusedError(Exception):
    """The engine cannot serve the model; the message says why, and another engine may."""
