"""onnxruntime-genai's Generator, one per slot: for GPUs, and models that the slot engine over onnxruntime refuses.

Only the calls that its 0.18 release keeps stable are used (append_tokens, get_logits); sampling is ours, so that seeds,
penalties and results are the same with every engine.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np

try:
    import onnxruntime_genai as og
except ImportError:  # it is an extra
    og = None

from slmops_server.engines.adapters import BASE, Adapter
from slmops_server.engines.base import EngineRefusedError
from slmops_server.engines.sampler import Logits
from slmops_server.engines.schedule import SMALLEST_CHUNK
from slmops_server.model_folder import ModelFolder

SCORED = 16  # prompt tokens in one step: each takes a call of its own, and others wait for all of them
INSTALL = "onnxruntime-genai is not installed here: use the server image, or slmops-server with its extra genai"
CUDA = ("cuda", "cudaexecutionprovider")


class GenaiForward:
    """A loaded genai model. Rows are stepped one after the other. EngineRefusedError when it cannot be loaded here."""

    decode_seconds: Sequence[float] = (1.0,)  # one row a call: nothing to choose from
    keeps = False
    uniform = False

    def __init__(self, folder: ModelFolder, slots: int, max_len: int, threads: int, chunk: int) -> None:
        if og is None:
            raise EngineRefusedError(INSTALL)
        config = og.Config(str(folder.path))
        # genai takes half of the machine's cores when it is not told, whatever the container may use
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        try:
            self._model = og.Model(config)
        except RuntimeError as error:
            if not folder.providers:
                raise
            raise EngineRefusedError(_elsewhere(folder.providers, error)) from None
        self._max_len = max_len
        self._rows: list[og.Generator | None] = [None] * slots
        self.vocab = folder.vocab_size
        self.rows = slots
        self.chunk = max(SMALLEST_CHUNK, min(chunk, max_len))
        self.scored = max(SMALLEST_CHUNK, min(SCORED, max_len))
        self.prefill_seconds: Mapping[int, float] = {}

    def prefill(self, slot: int, tokens: Sequence[int], past: int, _adapter: Adapter = BASE) -> Logits:
        """See Forward."""
        if past == 0:
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=self._max_len, do_sample=False)
            self._rows[slot] = og.Generator(self._model, params)
        return self._append(slot, tokens)

    def score(self, slot: int, tokens: Sequence[int], past: int, _adapter: Adapter = BASE) -> Logits:
        """See Forward. One token at a time: genai hands out the logits of the last one only."""
        rows = [self.prefill(slot, [token], past + index) for index, token in enumerate(tokens)]
        return np.stack(rows)

    def decode(
        self,
        first: int,
        tokens: Sequence[int],
        lengths: Sequence[int],  # noqa: ARG002 - genai counts
        _adapter: Adapter = BASE,
    ) -> Logits:
        """See Forward."""
        return self._append(first, tokens)[None]

    def copy(self, source: int, target: int, count: int) -> None:
        """Not asked for: `keeps` is false."""
        raise NotImplementedError

    def release(self, slot: int) -> None:
        """See Forward."""
        self._rows[slot] = None

    def _append(self, slot: int, tokens: Sequence[int]) -> Logits:
        row = self._rows[slot]
        assert row is not None
        row.append_tokens(np.asarray(tokens, np.int32))
        logits: Logits = np.array(row.get_logits(), np.float32).reshape(-1, self.vocab)[-1]
        return logits


def _elsewhere(providers: Sequence[str], error: RuntimeError) -> str:
    """Why a model of these execution providers is not loaded, and what to do about it."""
    names = ", ".join(providers)
    wheel = "onnxruntime-genai-cuda" if providers[0].lower() in CUDA else f"a build of onnxruntime-genai for {names}"
    return (
        f"genai_config.json names the execution provider {names}, which this onnxruntime-genai cannot use ({error}): "
        f"install {wheel} in its place, or empty provider_options there to compute on the CPU"
    )
