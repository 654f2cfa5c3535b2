"""Plain onnxruntime over ordinary Olive / ModelBuilder decoders: IOBinding on one shared KV buffer.

The graph must use GroupQueryAttention with a shared past/present buffer. Rows of different lengths in one batch then
give exactly the tokens that each row gives alone, because the kernel writes each row at its own length. One exception,
found at load: the int4 kernel rounds a lone row differently from the same row in company, so where that is seen, a
lone row is computed with an idle one beside it.

The weights of an adapter are bound as inputs: onnxruntime's own LoraAdapter is ignored by runs with an IOBinding.
"""

import math
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]  # it ships no types
from numpy.typing import NDArray

from slmops_server.engines import graph, kernels, ragged_graph, timing
from slmops_server.engines.adapters import BASE, Adapter
from slmops_server.engines.base import EngineRefusedError
from slmops_server.engines.binding import TYPES, bind, lora_inputs, recent
from slmops_server.engines.forward import IDLE
from slmops_server.engines.ragged import RaggedForward
from slmops_server.engines.ragged_graph import UnsuitedError
from slmops_server.engines.sampler import Logits
from slmops_server.engines.schedule import SMALLEST_CHUNK
from slmops_server.model_folder import ModelFolder

SMALL = 64 << 20  # bytes of model up to which loading it twice to measure thread counts costs little
LOGITS_BYTES = 64 << 20  # a prefill chunk's logits, [chunk, vocab], stay below this where all of them are computed
# Microseconds that a thread waits by spinning before it sleeps. onnxruntime's own choice is far longer: where others
# use the CPUs too, threads then spin for one that does not run, and a step of a 10 M model took three times as long.
SPIN = 50
TINY_STEP = 0.0003  # seconds; below that threads wait for each other longer than they work
GAIN = 0.7  # more threads must take at most this share of the time of one, or one it is
MAX_ROWS = 8  # in one call; beyond, the kernels gain nothing more
MEASURED_CHUNKS = (4, 32)  # tokens
MEASURED_LENGTH = 64  # tokens in a row while it is measured
# Bindings kept for prompts, and as many for decode calls: half a KB for each input, of which an adapter has hundreds.
MOST_BOUND = 48

_Decode = tuple[ort.IOBinding, NDArray[np.int64], NDArray[np.int64], Logits]
_Rows = tuple[weakref.ref[Adapter], int, int]  # the adapter, which is not kept alive, first row and number of rows


def _session(folder: ModelFolder, model: str | bytes, threads: int, library: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    if library:
        options.register_custom_ops_library(library)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN))
    options.log_severity_level = 3
    if isinstance(model, bytes):
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", os.fspath(folder.graph.parent)
        )
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _model(folder: ModelFolder) -> str | bytes:
    """The graph with `logits_from`; or its path where it is left as it is: of a damaged one onnxruntime tells more."""
    try:
        changed = graph.logits_from(graph.read(folder.graph), folder.outputs["logits"])
    except ValueError:
        changed = None
    return changed or os.fspath(folder.graph)


class OrtForward:
    """One session, its rows of KV cache. EngineRefusedError when the graph is not of the expected form."""

    keeps = True
    uniform = False

    def __init__(
        self, folder: ModelFolder, session: ort.InferenceSession, slots: int, max_len: int, chunk: int
    ) -> None:
        self.vocab = folder.vocab_size
        self.rows = max(2, slots)  # a lone row may need company
        self.decode_seconds: Sequence[float] = ()
        self.prefill_seconds: Mapping[int, float] = {}
        self._session, self._max_len = session, max_len
        kinds = {i.name: i.type for i in session.get_inputs()}
        self._ids = folder.inputs["input_ids"]
        self._mask = folder.inputs["attention_mask"]
        self._positions = folder.inputs.get("position_ids", "position_ids")
        self._logits = folder.outputs["logits"]
        pairs = list(zip(folder.cache_inputs, folder.cache_outputs, strict=True))
        self._has_positions = self._positions in kinds
        self._has_from = graph.FROM in kinds
        unknown = set(kinds) - {past for past, _ in pairs} - {self._ids, self._mask, self._positions, graph.FROM}
        if unknown:
            raise EngineRefusedError(
                f"the graph has inputs that only another engine knows: {', '.join(sorted(unknown))}"
            )
        if not folder.share_buffer:
            raise EngineRefusedError("the graph has no shared past/present buffer")
        logits_kind = next(o.type for o in session.get_outputs() if o.name == self._logits)
        if kinds[pairs[0][0]] not in TYPES or logits_kind not in TYPES:
            raise EngineRefusedError(f"the KV cache is {kinds[pairs[0][0]]}")
        self._kv_type, self._logits_type = TYPES[kinds[pairs[0][0]]], TYPES[logits_kind]
        self._row_shape = (folder.kv_heads, max_len, folder.head_size)
        # zeros is lazy: the machine pays for a row only when it is first used
        self._cache = np.zeros((len(pairs), self.rows, *self._row_shape), self._kv_type)
        self._names = pairs
        self._lent: dict[int, NDArray[np.float32]] = {}  # the first token of rows that keep company
        self._ones = np.ones((1, max_len), np.int64)
        self._ones_at = self._ones.ctypes.data
        chunk = min(chunk, max_len)
        self.scored = max(SMALLEST_CHUNK, min(chunk, LOGITS_BYTES // (4 * self.vocab)))
        self.chunk = max(SMALLEST_CHUNK, chunk) if self._has_from else self.scored
        self._prompt_logits = np.empty((1, self.vocab), self._logits_type)
        # one for all calls: a buffer for each (first, rows) of each adapter would be up to 112 rows of the vocabulary
        self._decode_logits = np.empty((min(self.rows, MAX_ROWS), self.vocab), self._logits_type)
        self._first, self._begin = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.lora = lora_inputs(session)
        self._prefills: dict[_Rows, ort.IOBinding] = {}
        self._decodes: dict[_Rows, _Decode] = {}

    def prefill(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        logits: Logits = self._prompt(slot, tokens, past, len(tokens) - 1, adapter)[-1]
        return logits

    def score(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        return self._prompt(slot, tokens, past, 0, adapter)

    def _prompt(self, slot: int, tokens: Sequence[int], past: int, begin: int, adapter: Adapter) -> Logits:
        """Append tokens; logits from the token `begin` on, or of all where the graph cannot choose."""
        size = len(tokens)
        self._give_back(slot)
        key = (weakref.ref(adapter), slot, 1)
        binding = recent(self._prefills, key, MOST_BOUND, lambda: self._bind_fixed(slot, 1, adapter))
        ids = np.asarray(tokens, np.int64)
        positions = np.arange(past, past + size, dtype=np.int64)
        bind(binding, self._ids, ids, (1, size))
        bind(binding, self._mask, self._ones, (1, past + size))
        if self._has_positions:
            bind(binding, self._positions, positions, (1, size))
        rows = size
        if self._has_from:
            self._begin[0] = begin
            bind(binding, graph.FROM, self._begin, (1,))
            rows -= begin
        if rows > len(self._prompt_logits):
            self._prompt_logits = np.empty((rows, self.vocab), self._logits_type)
        out = self._prompt_logits[:rows]
        binding.bind_output(self._logits, "cpu", 0, self._logits_type, (1, *out.shape), out.ctypes.data)
        self._session.run_with_iobinding(binding)
        return out.astype(np.float32, copy=False)

    def decode(self, first: int, tokens: Sequence[int], lengths: Sequence[int], adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        rows = len(tokens)
        key = (weakref.ref(adapter), first, rows)
        binding, ids, positions, logits = recent(
            self._decodes, key, MOST_BOUND, lambda: self._bind_decode(first, rows, adapter)
        )
        for slot, length in enumerate(lengths, first):
            if length == IDLE:
                self._lend(slot)
            else:
                self._give_back(slot)
        lengths = [max(length, 0) for length in lengths]
        ids[:, 0] = tokens
        if self._has_positions:
            positions[:, 0] = lengths
        total = max(lengths) + 1
        if rows == 1:
            binding.bind_input(self._mask, "cpu", 0, np.int64, (1, total), self._ones_at)
        else:
            mask = (np.arange(total) <= np.asarray(lengths)[:, None]).astype(np.int64)
            bind(binding, self._mask, mask, (rows, total))
        self._session.run_with_iobinding(binding)
        return logits.astype(np.float32, copy=False)

    def copy(self, source: int, target: int, count: int) -> None:
        """See Forward."""
        self._give_back(source)
        self._lent.pop(target, None)
        self._cache[:, target, :, :count] = self._cache[:, source, :, :count]

    def release(self, slot: int) -> None:
        """Nothing to do: the row's content may be taken over by the next prompt."""

    def _lend(self, slot: int) -> None:
        """The row keeps company, at the length of one token: longer ones would have to attend to all that they hold."""
        if slot not in self._lent:
            self._lent[slot] = self._cache[:, slot, :, 0].copy()

    def _give_back(self, slot: int) -> None:
        token = self._lent.pop(slot, None)
        if token is not None:
            self._cache[:, slot, :, 0] = token

    def _bind_decode(self, first: int, rows: int, adapter: Adapter) -> _Decode:
        binding = self._bind_fixed(first, rows, adapter)
        ids, positions = np.zeros((rows, 1), np.int64), np.zeros((rows, 1), np.int64)
        logits = self._decode_logits[:rows]
        bind(binding, self._ids, ids, (rows, 1))
        if self._has_positions:
            bind(binding, self._positions, positions, (rows, 1))
        if self._has_from:
            bind(binding, graph.FROM, self._first, (1,))
        binding.bind_output(self._logits, "cpu", 0, self._logits_type, (rows, 1, self.vocab), logits.ctypes.data)
        return binding, ids, positions, logits

    def _bind_fixed(self, first: int, rows: int, adapter: Adapter) -> ort.IOBinding:
        """What is the same in every call for these rows: the cache and the adapter."""
        binding = self._session.io_binding()
        shape = (rows, *self._row_shape)
        for (past, present), array in zip(self._names, self._cache, strict=True):
            at = array[first].ctypes.data
            binding.bind_input(past, "cpu", 0, self._kv_type, shape, at)
            binding.bind_output(present, "cpu", 0, self._kv_type, shape, at)
        for name, tensor in adapter.tensors.items():
            bind(binding, name, tensor)
        return binding

    def time_decode(self, rows: int, steps: int) -> list[float]:
        """Seconds of `steps` decode steps of `rows` rows, sorted."""
        length = min(MEASURED_LENGTH, self._max_len - 1)
        return sorted(timing.seconds(lambda: self.decode(0, [0] * rows, [length] * rows)) for _ in range(steps))

    def measure(self) -> None:
        """Fill in decode_seconds and prefill_seconds; the rows' content is lost."""
        tokens = [(7 * index + 1) % self.vocab for index in range(max(MEASURED_CHUNKS))]
        sizes = [size for size in MEASURED_CHUNKS if size <= self.chunk and size < self._max_len]
        self.prefill(0, tokens[: min(SMALLEST_CHUNK, self._max_len - 1)], 0)  # the first call pays for buffers
        self.prefill_seconds = {size: timing.seconds(partial(self.prefill, 0, tokens[:size], 0)) for size in sizes}
        length = max(sizes, default=1)
        for row in range(1, self.rows):
            self.copy(0, row, length)
        counts = range(1, min(self.rows, MAX_ROWS) + 1)
        # of two calls the faster; the first one also shows whether a row is what it is in company, and pays for buffers
        first, times = [], []
        for count in counts:
            start = time.perf_counter()
            first.append(self.decode(0, tokens[:count], [length] * count)[0].copy())
            times.append(min(time.perf_counter() - start, self.time_decode(count, 1)[0]))
        self.decode_seconds = [
            seconds if np.array_equal(row, first[1], equal_nan=True) else math.inf
            for seconds, row in zip(times, first, strict=True)
        ]

    def notes(self) -> dict[str, str]:
        """The measurements, as EngineInfo tells them."""
        return timing.notes(self.decode_seconds, self.prefill_seconds)


def load(
    folder: ModelFolder, slots: int, max_len: int, chunk: int, threads: int, limit: int
) -> tuple[RaggedForward | OrtForward, int, dict[str, str]]:
    """A warmed model, its thread count and the measurements behind the choices.

    threads 0: all of `limit`, or one where a small model is measured to be as fast on one.
    """
    if folder.providers:
        raise EngineRefusedError(
            f"genai_config.json names the execution provider {', '.join(folder.providers)}, and this engine computes "
            "on the CPU: empty provider_options there if it shall"
        )
    counts = [threads] if threads else [limit]
    if not threads and limit > 1 and folder.model_bytes <= SMALL:
        counts = [1, limit]
    tried, notes = _tried(folder, slots, max_len, chunk, counts)
    best = 0
    if len(tried) > 1:
        times: list[list[float]] = [[] for _ in tried]
        for _ in range(3):  # alternate, so that a noisy moment hits all
            for forward, seen in zip(tried, times, strict=True):
                seen.extend(forward.time_decode(1, 9))
        best = 1 if _pays(*times) else 0
        notes |= {f"step_ms_{n}_threads": f"{_median(t) * 1e3:.3f}" for n, t in zip(counts, times, strict=True)}
    forward = tried[best]
    forward.measure()
    return forward, counts[best], notes | forward.notes()


def _tried(
    folder: ModelFolder, slots: int, max_len: int, chunk: int, counts: Sequence[int]
) -> tuple[Sequence[RaggedForward | OrtForward], dict[str, str]]:
    """The model, loaded for each of these numbers of threads, and why with onnxruntime's own operators if so."""
    try:
        return _ragged(folder, slots, max_len, chunk, counts), {}
    except Exception as error:  # noqa: BLE001 - onnxruntime raises nothing finer; what is wrong with both it tells below
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    model = _model(folder)
    made = [OrtForward(folder, _session(folder, model, n), slots, max_len, chunk) for n in counts]
    return made, {"without_kernels": reason}


def _ragged(
    folder: ModelFolder, slots: int, max_len: int, chunk: int, counts: Sequence[int]
) -> Sequence[RaggedForward]:
    """The model with the server's own operators, which have computed a prompt: sizes that do not fit show there."""
    library = kernels.library()
    if not library:
        raise UnsuitedError("they are not installed, or not for this CPU")
    if not folder.share_buffer:
        raise UnsuitedError("the graph has no shared past/present buffer")
    changed = ragged_graph.ragged(graph.read(folder.graph), folder)
    made = [RaggedForward(folder, _session(folder, changed, n, library), slots, max_len, chunk) for n in counts]
    for forward in made:
        forward.prefill(0, [0, 0], 0)
    return made


def _median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def _pays(one: list[float], many: list[float]) -> bool:
    """Whether more threads are worth it: steps long enough, and faster both at best and in the middle of the noise."""
    return min(one) > TINY_STEP and min(many) < GAIN * min(one) and _median(many) < GAIN * _median(one)
