"""OpenVINO on CPUs: the slot engine over PagedAttention, with the same sampling as the others.

Slots own fixed blocks of one store of keys and values, so a row is a range of blocks. The cache is float16 and the
arithmetic float32 on every CPU: OpenVINO's own choice, an 8-bit cache, makes a token depend on how its prompt was cut.
Products still round by the number of tokens in a call, so a row's logits are near what they are alone, not equal.
Weights keep their bits; where the CPU has VNNI or AMX, OpenVINO multiplies them as 8-bit integers.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

try:
    # pip brings it along, and OpenVINO's tools report with it; as if it were absent
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino as ov
except ImportError:  # it is an extra
    ov = None

from slmops_server.engines import timing
from slmops_server.engines.adapters import BASE, Adapter
from slmops_server.engines.base import EngineRefusedError
from slmops_server.engines.sampler import Logits
from slmops_server.engines.schedule import SMALLEST_CHUNK
from slmops_server.model_folder import ModelFolder

BLOCK = 32  # tokens; the CPU plugin's
KV_BYTES = 2  # of an item of the cache
# two Python processes, OpenVINO's code, its copies of scales and norms; the weights are counted once, because the file
# is only mapped and the copy that is computed with stays
RUNTIME_BYTES = 280 << 20
MAX_ROWS = 16  # in one call
SCORED = 64  # tokens in one call whose logits are all wanted: room for them is beside the model, and all others wait
MEASURED_CHUNKS = (4, 16, 64)  # tokens
INSTALL = "OpenVINO is not installed here: use the server image, or slmops-server with its extra openvino"


class OpenvinoForward:
    """A compiled model with its rows of cache. EngineRefusedError when it cannot be computed."""

    keeps = True
    uniform = False
    mixes = MAX_ROWS

    def __init__(self, folder: ModelFolder, slots: int, max_len: int, chunk: int, threads: int) -> None:
        if ov is None:
            raise EngineRefusedError(INSTALL)
        from slmops_server.engines import paged

        self.vocab = folder.vocab_size
        self.rows = slots
        self.chunk = max(SMALLEST_CHUNK, min(chunk, max_len))
        self.scored = max(SMALLEST_CHUNK, min(SCORED, self.chunk))
        self.decode_seconds: Sequence[float] = ()
        self.prefill_seconds: Mapping[int, float] = {}
        self._max_len = max_len
        self._blocks = -(-max_len // BLOCK)  # of a row
        core = ov.Core()
        compiled = core.compile_model(
            paged.read(core, folder.graph),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": "NO",  # two servers on a machine would pin to the same cores
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": "f16",
            },
        )
        self._request = compiled.create_infer_request()
        self._caches: list[NDArray[np.float16]] = []
        self._tokens: list[tuple[str, int]] = []  # inputs with one item for each token, and their number of axes
        for one in compiled.inputs:
            name, shape = one.get_any_name(), one.get_partial_shape()
            if "_cache." in name:
                self._add_cache(name, [axis.get_length() for axis in list(shape)[1:]])
            elif name in ("input_ids", paged.POSITIONS):
                self._tokens.append((name, len(shape)))

    def _add_cache(self, name: str, block: list[int]) -> None:
        # zeros is lazy: the machine pays for a row only when it is first used
        array = np.zeros((self.rows * self._blocks, *block), np.float16)
        self._caches.append(array)
        self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))

    def prefill(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        logits: Logits = self.compute([slot], [tokens], [past], [len(tokens) - 1], adapter)[0]
        return logits

    def score(self, slot: int, tokens: Sequence[int], past: int, adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        return self.compute([slot], [tokens], [past], range(len(tokens)), adapter)

    def copy(self, source: int, target: int, count: int) -> None:
        """See Forward."""
        size = -(-count // BLOCK)
        from_, to = source * self._blocks, target * self._blocks
        for cache in self._caches:
            cache[to : to + size] = cache[from_ : from_ + size]

    def release(self, slot: int) -> None:
        """Nothing to do: the row's content may be taken over by the next prompt."""

    def compute(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        past: Sequence[int],
        at: Sequence[int],
        _adapter: Adapter = BASE,
    ) -> Logits:
        """See Mixing. Beside a chunk answers cost next to nothing: most of a call is unpacking the weights."""
        ends = [before + len(new) for before, new in zip(past, tokens, strict=True)]
        used = [-(-end // BLOCK) for end in ends]
        ranges = [
            range(slot * self._blocks, slot * self._blocks + count) for slot, count in zip(slots, used, strict=True)
        ]
        flat = {
            "input_ids": [token for row in tokens for token in row],
            "position_ids": [at for before, end in zip(past, ends, strict=True) for at in range(before, end)],
        }
        for name, axes in self._tokens:
            self._set(name, np.array(flat[name], np.int64).reshape((-1,) + (1,) * (axes - 1)))
        self._set("logits_at", np.array(at, np.int64))
        self._set("past_lens", np.array(past, np.int32))
        self._set("subsequence_begins", _begins([len(row) for row in tokens]))
        self._set("block_indices", np.array([block for one in ranges for block in one], np.int32))
        self._set("block_indices_begins", _begins(used))
        self._set("max_context_len", np.array(max(ends), np.int32))
        self._request.infer()
        logits: Logits = self._request.get_tensor("logits").data.reshape(-1, self.vocab)
        return logits

    def _set(self, name: str, array: NDArray[np.int64] | NDArray[np.int32]) -> None:
        self._request.set_tensor(name, ov.Tensor(array))

    def measure(self) -> None:
        """Fill in decode_seconds and prefill_seconds; the rows' content is lost."""
        tokens = [(7 * index + 1) % self.vocab for index in range(max(MEASURED_CHUNKS))]
        sizes = [size for size in MEASURED_CHUNKS if size <= self.chunk and size < self._max_len]
        # of two calls, for the first one of a size pays for code and buffers
        self.prefill_seconds = {size: timing.best(partial(self.prefill, 0, tokens[:size], 0)) for size in sizes}
        length = max(sizes, default=1)
        for row in range(1, self.rows):
            self.copy(0, row, length)
        calls = [
            partial(self.compute, range(count), [[token] for token in tokens[:count]], [length] * count, range(count))
            for count in range(1, min(self.rows, MAX_ROWS) + 1)
        ]
        self.decode_seconds = [timing.best(call) for call in calls]


def _begins(sizes: Sequence[int]) -> NDArray[np.int32]:
    """Where each of ranges of these sizes begins, and the end of the last one."""
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)


def load(
    folder: ModelFolder, slots: int, max_len: int, chunk: int, threads: int
) -> tuple[OpenvinoForward, dict[str, str]]:
    """A compiled and measured model, and the measurements."""
    forward = OpenvinoForward(folder, slots, max_len, chunk, threads)
    forward.measure()
    notes = timing.notes(forward.decode_seconds, forward.prefill_seconds)
    del notes["lone_rows"]  # as near to the same row in company as any other
    notes["openvino"] = str(ov.__version__)
    return forward, notes
