"""Plain onnxruntime with operators of our own (images/server/kernels): tokens of any rows in one call.

A token's logits are bit for bit what they are alone, whatever else a call computes and however its prompt was cut:
that is how these operators are made. onnxruntime's own products of floats may round a lone token differently, so where
that is seen at load, and with adapters, whose products are such ones, a lone token has an idle one for company.
Adapters of a rank above 16 are not exact in several threads: MLAS cuts a product with weights that are no constants by
columns or rows, as they come, and sums up in blocks that depend on the columns of a part.
"""

import weakref
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]  # it ships no types

from slmops_server.engines import ragged_graph, timing
from slmops_server.engines.adapters import BASE, Adapter
from slmops_server.engines.binding import bind, lora_inputs, recent
from slmops_server.engines.ragged_graph import UnsuitedError
from slmops_server.engines.sampler import Logits
from slmops_server.engines.schedule import SMALLEST_CHUNK
from slmops_server.model_folder import ModelFolder

LANES = 16  # tokens; a row's length is a multiple of it
LOGITS_BYTES = 64 << 20  # of a call in which all logits are wanted
MAX_ROWS = 32  # in one call; beyond, a row costs as much as in a call of its own
MEASURED_CHUNKS = (4, 32)  # tokens
MEASURED_ROWS = (1, 2, 4, 8)  # and as many as a call may have; between them the time grows evenly
MOST_BOUND = 8  # bindings kept: half a KB for each input, of which an adapter has hundreds


class RaggedForward:
    """A session over a graph of ragged_graph, and its rows of cache. UnsuitedError when they do not fit together."""

    keeps = True
    uniform = True

    def __init__(
        self, folder: ModelFolder, session: ort.InferenceSession, slots: int, max_len: int, chunk: int
    ) -> None:
        self.vocab, self.rows, self.mixes = folder.vocab_size, slots, min(slots, MAX_ROWS)
        self.decode_seconds: Sequence[float] = ()
        self.prefill_seconds: Mapping[int, float] = {}
        self._session, self._max_len = session, max_len
        self._ids, self._logits = folder.inputs["input_ids"], folder.outputs["logits"]
        self._positions = folder.inputs.get("position_ids", "position_ids")
        kinds = {i.name: i.type for i in session.get_inputs()}
        self._names = folder.cache_inputs
        expected = {*self._names, self._ids, ragged_graph.CALLS, ragged_graph.AT}
        self._has_positions = self._positions in kinds
        if set(kinds) - {self._positions} != expected:
            raise UnsuitedError(f"it has other inputs: {', '.join(sorted(set(kinds) ^ expected))}")
        floats = {kinds[self._names[0]], next(o.type for o in session.get_outputs() if o.name == self._logits)}
        if floats != {"tensor(float)"}:
            raise UnsuitedError("its cache or logits are not of float32")
        length = -(-max_len // LANES) * LANES
        # zeros is lazy: the machine pays for a row only when it is first used
        self._cache = np.zeros((len(self._names), slots + 1, folder.kv_heads, length, folder.head_size), np.float32)
        self.lone = False  # whether a lone token is what it is in company
        chunk = max(SMALLEST_CHUNK, min(chunk, max_len))
        self.chunk, self.scored = chunk, max(SMALLEST_CHUNK, min(chunk, LOGITS_BYTES // (4 * self.vocab)))
        self._out = np.empty((self.mixes + 1, self.vocab), np.float32)
        self.lora = lora_inputs(session)
        self._bound: dict[weakref.ref[Adapter], ort.IOBinding] = {}

    def prefill(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        logits: Logits = self.compute([slot], [tokens], [past], [len(tokens) - 1], adapter)[0]
        return logits

    def score(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        return self.compute([slot], [tokens], [past], range(len(tokens)), adapter)

    def copy(self, source: int, target: int, count: int) -> None:
        """See Forward. Whole blocks, because in the keys' tokens lie side by side in blocks of LANES."""
        whole = -(-count // LANES) * LANES
        self._cache[:, target, :, :whole] = self._cache[:, source, :, :whole]

    def release(self, slot: int) -> None:
        """Nothing to do: the row's content may be taken over by the next prompt."""

    def compute(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        at: Sequence[int],
        adapter: Adapter = BASE,
    ) -> Logits:
        """See Mixing."""
        calls = [(slot, length, len(new)) for slot, length, new in zip(slots, lengths, tokens, strict=True)]
        flat = [token for new in tokens for token in new]
        if len(flat) == 1 and not (self.lone and adapter is BASE):
            calls.append((self.rows, 0, 1))
            flat.append(0)
        made = recent(self._bound, weakref.ref(adapter), MOST_BOUND, lambda: self._bind_fixed(adapter))
        given = {
            self._ids: np.array([flat], np.int64),
            ragged_graph.CALLS: np.array(calls, np.int64),
            ragged_graph.AT: np.array(at, np.int64),
        }
        if self._has_positions:
            positions = np.concatenate([np.arange(past, past + count) for _, past, count in calls])
            given[self._positions] = positions.astype(np.int64)[None]
        for name, array in given.items():
            bind(made, name, array)
        if len(at) > len(self._out):
            self._out = np.empty((len(at), self.vocab), np.float32)
        out = self._out[: len(at)]
        made.bind_output(self._logits, "cpu", 0, np.float32, (1, *out.shape), out.ctypes.data)
        self._session.run_with_iobinding(made)
        return out

    def _bind_fixed(self, adapter: Adapter) -> ort.IOBinding:
        """What is the same in every call: the cache and the adapter."""
        made = self._session.io_binding()
        for name, array in zip(self._names, self._cache, strict=True):
            bind(made, name, array)
        for name, tensor in adapter.tensors.items():
            bind(made, name, tensor)
        return made

    def time_decode(self, rows: int, steps: int) -> list[float]:
        """Seconds of `steps` decode steps of `rows` rows, sorted."""
        length = min(max(MEASURED_CHUNKS), self._max_len - 1)
        step = partial(self.compute, range(rows), [[0]] * rows, [length] * rows, range(rows))
        return sorted(timing.seconds(step) for _ in range(steps))

    def measure(self) -> None:
        """Fill in decode_seconds and prefill_seconds; the rows' content is lost."""
        tokens = [(7 * index + 1) % self.vocab for index in range(max(MEASURED_CHUNKS))]
        sizes = [size for size in MEASURED_CHUNKS if size <= self.chunk and size < self._max_len]
        self.prefill(0, tokens[: min(SMALLEST_CHUNK, self._max_len - 1)], 0)  # the first call pays for buffers
        self.prefill_seconds = {size: timing.seconds(partial(self.prefill, 0, tokens[:size], 0)) for size in sizes}
        self._look_for_lone(max(sizes, default=1))
        counts = sorted({*(rows for rows in MEASURED_ROWS if rows < self.mixes), self.mixes})
        seconds = [self.time_decode(rows, 2)[0] for rows in counts]
        self.decode_seconds = [float(np.interp(rows, counts, seconds)) for rows in range(1, self.mixes + 1)]

    def notes(self) -> dict[str, str]:
        """The measurements, as EngineInfo tells them."""
        lone = {} if self.lone else {"lone_rows": "in company"}
        return timing.notes(self.decode_seconds, self.prefill_seconds) | lone

    def _look_for_lone(self, length: int) -> None:
        token = partial(self.compute, [0], [[1]], [length], [0])
        pair = token().copy()
        self.lone = True
        self.lone = np.array_equal(token(), pair, equal_nan=True)
