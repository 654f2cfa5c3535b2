"""llama.cpp on CPUs over GGUF: the slot engine over llama_decode, with the same sampling and guarantees as the others.

A slot is one of llama.cpp's sequences in a stream of its own, so a row attends to its own cells only and the others
cannot move them. The cache is float16. Flash attention is off: on CPUs it takes one of three ways by the number of
tokens, rows and cells, so a token would depend on company and on cuts, and it was slower besides.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from slmops_server.engines import llama_library, timing
from slmops_server.engines.adapters import BASE, Adapter
from slmops_server.engines.base import EngineRefusedError
from slmops_server.engines.forward import IDLE
from slmops_server.engines.llama_library import Batch, Library
from slmops_server.engines.sampler import Logits
from slmops_server.engines.schedule import SMALLEST_CHUNK
from slmops_server.model_folder import ModelFolder

KV_BYTES = 2  # of an item of the cache
# two Python processes, llama.cpp's code, its buffers for a step; the weights are counted once: they are not mapped
RUNTIME_BYTES = 260 << 20
PAGE = 256  # cells; a row has whole ones
LEAST_ROWS = 2  # a lone row may need company; llama.cpp fills all rows with zeros, so each takes its memory at once
MOST_ROWS = 256  # llama.cpp's
MAX_ROWS = 16  # in one call
MOST_SCORES = 1 << 19  # tokens of a chunk x cells: attention's scores are float32, one for each of these and each head
SCORED = 32  # tokens in one call: their logits are kept in a buffer beside the model
MEASURED_CHUNKS = (4, 16, 64, 256)  # tokens
NO_FLASH, READ = 0, 0  # llama_flash_attn_type; llama_load_mode: a mapped file stays beside the rearranged weights


class LlamacppForward:
    """A loaded model with its rows of cache. EngineRefusedError when it cannot be computed."""

    keeps = True
    uniform = False

    def __init__(
        self, folder: ModelFolder, slots: int, max_len: int, chunk: int, threads: int, guesses: int = 0
    ) -> None:
        """guesses: `score` may be called for as many tokens and one more."""
        self.rows = max(LEAST_ROWS, slots)
        if self.rows > MOST_ROWS:
            raise EngineRefusedError(f"llama.cpp has {MOST_ROWS} slots at most, not {slots}")
        self._library = llama_library.load()
        self.vocab = folder.vocab_size
        longest = min(max_len, MOST_SCORES // cells(max_len))
        self.chunk = max(SMALLEST_CHUNK, min(chunk, longest))
        self.scored = max(SMALLEST_CHUNK, min(SCORED, longest))
        self.decode_seconds: Sequence[float] = ()
        self.prefill_seconds: Mapping[int, float] = {}
        self._max_len = max_len
        self._held = [0] * self.rows  # tokens in each row
        self._model = _read(self._library, folder)
        outputs = max(self.scored, guesses + 1, self.rows)
        most = max(self.chunk, outputs)
        params = self._library.call("llama_context_default_params")
        params.n_ctx, params.n_seq_max = cells(max_len) * self.rows, self.rows
        params.n_batch = params.n_ubatch = most
        params.n_outputs_max = params.n_outputs_max_per_seq = outputs
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = NO_FLASH
        self._context = self._library.call("llama_init_from_model", self._model, params)
        if not self._context:
            raise EngineRefusedError(f"llama.cpp refuses {folder.graph.name}: {self._library.reason()}")
        self._memory = self._library.call("llama_get_memory", self._context)
        self._batch = _batch(most)

    def prefill(self, slot: int, tokens: Sequence[int], past: int, _adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        self._rewind(slot, past)
        last = [False] * (len(tokens) - 1) + [True]
        logits: Logits = self._run([slot] * len(tokens), tokens, range(past, past + len(tokens)), last)[0]
        return logits

    def score(self, slot: int, tokens: Sequence[int], past: int, _adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        self._rewind(slot, past)
        every = [True] * len(tokens)
        return self._run([slot] * len(tokens), tokens, range(past, past + len(tokens)), every)

    def decode(self, first: int, tokens: Sequence[int], lengths: Sequence[int], _adapter: Adapter = BASE) -> Logits:
        """See Forward. llama.cpp computes adjacent rows together: idle ones have a token in their free cell then."""
        slots = range(first, first + len(tokens))
        for slot, length in zip(slots, lengths, strict=True):
            if length != IDLE:
                self._rewind(slot, length)
        places = [self._held[slot] for slot in slots]
        logits = self._run(slots, tokens, places, [True] * len(tokens))
        for slot, length, place in zip(slots, lengths, places, strict=True):
            if length == IDLE:
                self._rewind(slot, place)
        return logits

    def copy(self, source: int, target: int, count: int) -> None:
        """See Forward."""
        self._library.call("llama_memory_seq_cp", self._memory, source, target, -1, -1)  # a stream as a whole
        self._held[target] = self._held[source]
        self._rewind(target, count)

    def release(self, slot: int) -> None:
        """Nothing to do: the row's content may be taken over by the next prompt."""

    def _rewind(self, slot: int, length: int) -> None:
        """The row ends after `length` tokens."""
        if self._held[slot] != length:
            self._library.call("llama_memory_seq_rm", self._memory, slot, length, -1)
            self._held[slot] = length

    def _run(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int], wanted: Sequence[bool]
    ) -> Logits:
        """Compute tokens, each at its position of its row; logits [wanted, vocab]. RuntimeError when it fails."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for at, (slot, token, position, want) in enumerate(zip(slots, tokens, positions, wanted, strict=True)):
            batch.token[at], batch.pos[at], batch.seq_id[at][0], batch.logits[at] = token, position, slot, want
        code = self._library.call("llama_decode", self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode failed with {code}: {self._library.reason()}")
        for slot, position in zip(slots, positions, strict=True):
            self._held[slot] = position + 1
        count = sum(wanted)
        address = self._library.call("llama_get_logits", self._context)
        flat = (ctypes.c_float * (count * self.vocab)).from_address(address)
        return np.ctypeslib.as_array(flat).reshape(count, self.vocab)

    def measure(self) -> None:
        """Fill in decode_seconds and prefill_seconds; the rows' content is lost.

        inf stands for numbers of rows of which one is rounded differently from a row beside one other.
        """
        tokens = [(7 * index + 1) % self.vocab for index in range(max(MEASURED_CHUNKS))]
        sizes = [size for size in MEASURED_CHUNKS if size <= self.chunk and size < self._max_len]
        self.prefill(0, tokens[: min(SMALLEST_CHUNK, self._max_len - 1)], 0)  # the first call pays for buffers
        self.prefill_seconds = {size: timing.seconds(partial(self.prefill, 0, tokens[:size], 0)) for size in sizes}
        length = max(sizes, default=1)
        for row in range(1, self.rows):
            self.copy(0, row, length)
        wanted = self.decode(0, tokens[:1] * 2, [length] * 2)[0].copy()
        calls = [
            partial(self.decode, 0, tokens[:1] * count, [length] * count)
            for count in range(1, min(self.rows, MAX_ROWS) + 1)
        ]
        self.decode_seconds = [
            timing.seconds(call) if all(np.array_equal(row, wanted, equal_nan=True) for row in call()) else math.inf
            for call in calls
        ]


def cells(max_len: int) -> int:
    """Tokens that a row has room for, whole pages. An answer's last one is never computed, so one cell stays free."""
    return -(-max_len // PAGE) * PAGE


def _read(library: Library, folder: ModelFolder) -> int:
    """The loaded model. EngineRefusedError when the file is damaged or not the one that the other files describe."""
    params = library.call("llama_model_default_params")
    params.load_mode = READ
    model: int | None = library.call("llama_model_load_from_file", str(folder.graph).encode(), params)
    name = folder.graph.name
    if not model:
        raise EngineRefusedError(f"llama.cpp cannot read {name}: {library.reason()}")
    found = {
        "tokens in the vocabulary": library.call("llama_vocab_n_tokens", library.call("llama_model_get_vocab", model)),
        "layers": library.call("llama_model_n_layer", model),
        "tokens of context": min(library.call("llama_model_n_ctx_train", model), folder.context_length),
    }
    told = dict(zip(found, (folder.vocab_size, folder.layers, folder.context_length), strict=True))
    if wrong := [f"{found[what]} {what} against {told[what]}" for what in found if found[what] != told[what]]:
        raise EngineRefusedError(f"{name} is not the model of config.json: {', '.join(wrong)}")
    kinds = {"recurrent": "is_recurrent", "hybrid": "is_hybrid", "encoder": "has_encoder"}
    other = [kind for kind, asked in kinds.items() if library.call(f"llama_model_{asked}", model)]
    if other or library.call("llama_model_n_swa", model) > 0:
        raise EngineRefusedError(f"{name} is no plain decoder: {', '.join(other) or 'its attention slides'}")
    return model


def _batch(most: int) -> Batch:
    """Room for that many tokens, each in one row. ctypes keeps what it points to."""
    number = ctypes.POINTER(ctypes.c_int32)
    pointers = (number * most)(*(ctypes.cast((ctypes.c_int32 * 1)(), number) for _ in range(most)))
    ones = (ctypes.c_int32 * most)(*[1] * most)
    token, pos, wanted = (ctypes.c_int32 * most)(), (ctypes.c_int32 * most)(), (ctypes.c_int8 * most)()
    return Batch(0, token, None, pos, ones, pointers, wanted)


def load(
    folder: ModelFolder, slots: int, max_len: int, chunk: int, threads: int, guesses: int
) -> tuple[LlamacppForward, dict[str, str]]:
    """A loaded and measured model, and the measurements."""
    forward = LlamacppForward(folder, slots, max_len, chunk, threads, guesses)
    forward.measure()
    notes = timing.notes(forward.decode_seconds, forward.prefill_seconds)
    notes["xllamacpp"] = llama_library.VERSION
    return forward, notes
