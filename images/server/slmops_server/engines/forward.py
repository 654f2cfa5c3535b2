"""What the slot scheduler needs of a model: calls over rows of a KV cache."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from slmops_server.engines.adapters import Adapter
from slmops_server.engines.sampler import Logits

IDLE = -1  # the length of a row that only keeps company


class Forward(Protocol):
    """A loaded model with `rows` rows of KV cache, each `max_len` tokens long. Logits are valid until the next call.

    `adapter`: what the tokens of a call are computed with, BASE where the engine knows no others.
    """

    vocab: int
    rows: int
    chunk: int  # prompt tokens that one prefill call may hold
    scored: int  # prompt tokens that one score call may hold
    decode_seconds: Sequence[float]  # time of a call for a token of 1, 2, ... rows; inf where rows would not be exact
    prefill_seconds: Mapping[int, float]  # time of a prefill call by number of tokens, as far as measured
    keeps: bool  # whether a row's content outlives its answer and can be copied
    uniform: bool  # whether a token is computed the same in an answer and in a prompt, to the last bit

    def prefill(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter, /) -> Logits:
        """Append tokens to a row that holds `past` tokens; logits of the last one, shape [vocab]."""

    def score(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter, /) -> Logits:
        """As prefill, with the logits after every token: shape [tokens, vocab]."""

    def copy(self, source: int, target: int, count: int) -> None:
        """The first `count` tokens of a row become those of another."""

    def release(self, slot: int) -> None:
        """The row's answer has ended."""


class Adjacent(Forward, Protocol):
    """Answers advance in calls for rows that lie side by side."""

    def decode(self, first: int, tokens: Sequence[int], lengths: Sequence[int], adapter: Adapter, /) -> Logits:
        """One token for each of the rows first, first+1, ...; lengths before it; logits [rows, vocab].

        A row of length IDLE only keeps company: what it holds stays, its logits mean nothing.
        """


@runtime_checkable
class Mixing(Forward, Protocol):
    """Answers advance in calls for any rows, a prompt's chunk among them."""

    mixes: int  # answers that such a call may advance

    def compute(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        at: Sequence[int],
        adapter: Adapter,
        /,
    ) -> Logits:
        """Append tokens to each of these rows, which hold so many before.

        The logits after the tokens with the indices `at`, counted over all rows: shape [at, vocab].
        """
