"""What is computed together and how much at a time: pure functions of measured times."""

import math
from collections.abc import Mapping, Sequence

SMALLEST_CHUNK = 4
TILE = 32  # rows of a block in onnxruntime's int4 matrix product, of whole prompts; it uses larger multiples too
WEIGHT = 0.2  # of the newest measurement


def cover(active: Sequence[bool], seconds: Sequence[float]) -> tuple[float, list[tuple[int, int]]]:
    """The cheapest way to advance every active row: total seconds, and segments (first, rows) of adjacent rows.

    `seconds[n - 1]` is the time of one call for n rows, inf where n rows are not allowed. A segment may hold rows that
    are not active: they bridge gaps, and they keep company where a lone row is not allowed. inf when nothing covers.
    """
    best = [0.0] + [math.inf] * len(active)  # best[end]: time for the active rows before `end`
    size = [0] * (len(active) + 1)
    for end, wanted in enumerate(active, 1):
        if not wanted:
            best[end] = best[end - 1]
        for rows, cost in enumerate(seconds[:end], 1):
            if best[end - rows] + cost < best[end]:
                best[end], size[end] = best[end - rows] + cost, rows
    segments = []
    end = len(active)
    while end > 0:
        if size[end]:
            segments.append((end - size[end], size[end]))
        end -= size[end] or 1
    return best[-1], segments[::-1]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Pace:
    """How long chunks of a prompt take, by size, kept current by the calls themselves."""

    def __init__(self, largest: int, measured: Mapping[int, float]) -> None:
        """largest: at least SMALLEST_CHUNK tokens. measured: seconds of a chunk by its number of tokens."""
        sizes = {largest}
        size = SMALLEST_CHUNK
        while size < largest:
            sizes |= {size, min(size * 3 // 2, largest)}
            size *= 2
        self._sizes = sorted(sizes)
        self._seconds = dict(measured)

    def chunk(self, left: int, budget: float, beside: int = 0) -> int:
        """Tokens of the next chunk of a prompt of which `left` are left: the most that fit into `budget` seconds.

        `beside`: tokens of other rows in the same call, of which each takes as long as one of the prompt.

        onnxruntime's int4 kernel works on blocks of TILE tokens and rounds a lone token in the last block differently.
        An answer must not depend on how its prompt was cut, so no chunk has one and none is left for the next (a prompt
        of one token aside).
        """
        fitting = [size for size in self._sizes if self._expected(size) * (size + beside) / size <= budget]
        size = min(left, fitting[-1] if fitting else self._sizes[0])
        if left - size == 1:
            size -= 1
        if size % TILE == 1 and size > 1:  # two: one alone may leave a lone token behind
            size -= 2
        return size

    def note(self, size: int, seconds: float, beside: int = 0) -> None:
        """A chunk took that long, see chunk. Longer ones take no more for each token: they are tried again."""
        seconds *= size / (size + beside)
        if size in self._sizes:
            known = self._seconds
            known[size] = known.get(size, seconds) * (1 - WEIGHT) + seconds * WEIGHT
            known.update({more: min(known[more], known[size] * more / size) for more in known if more > size})

    def _expected(self, size: int) -> float:
        """Seconds; sizes never seen are scaled from the nearest one seen."""
        if not self._seconds:
            return 0.0
        nearest = min(self._seconds, key=lambda known: abs(math.log(known / size)))
        return self._seconds[nearest] * (size / nearest if size != nearest else 1.0)
