"""Greedy answers and losses of an ONNX model, by onnxruntime-genai. One row at a time: a batch would need padding."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmops_trainer import cpus
from slmops_trainer.encoding import IGNORED, Encoded
from slmops_trainer.failure import RunFailure

OnRow = Callable[[int, int], None]
PROBE_TOKENS = 8
# A model's own defaults, which the builder takes from config.json, have no place in a measurement.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


class OnnxModel:
    """A model folder, loaded. `load_seconds` is the time that took."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai as og

        self._og = og
        settings = json.loads((folder / "genai_config.json").read_text())
        self.context = int(settings["model"]["context_length"])
        eos = settings["model"]["eos_token_id"]
        self.stops = frozenset(eos if isinstance(eos, list) else [eos])
        config = og.Config(str(folder))
        # Without it onnxruntime takes the node's cores, whatever the pod's limit is.
        session = {"intra_op_num_threads": cpus.limit()}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        began = time.monotonic()
        self._model = og.Model(config)
        self.load_seconds = time.monotonic() - began

    def answer(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The greedy answer's ids, without the end token; empty if the prompt leaves no room in the context."""
        if len(prompt) >= self.context:
            return []
        generator = self._begin(prompt, min(self.context, len(prompt) + max_tokens))
        found: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return found[:-1] if found and found[-1] in self.stops else found

    def mean_loss(self, rows: Sequence[Encoded], on_row: OnRow) -> float:
        """Mean negative log likelihood of the rows' trained tokens, in nats."""
        total, tokens = 0.0, 0
        for number, row in enumerate(rows, 1):
            logits = self._logits(row.input_ids)
            for at, label in enumerate(row.labels[1:]):
                if label != IGNORED:
                    total -= _log_probability(logits[at], label)
                    tokens += 1
            on_row(number, len(rows))
        return total / max(1, tokens)

    def probe(self, prompt: Sequence[int]) -> None:
        """Generate a few tokens, whatever the model would say.

        Raises RunFailure(UnsupportedModel) if it computes anything but finite numbers, or generates nothing.
        """
        if not np.isfinite(self._logits(prompt)).all():
            raise RunFailure(
                "UnsupportedModel",
                "The converted model computes infinite or undefined numbers: its values do not fit the precision. Use "
                "precision int4 or fp32.",
            )
        room = min(self.context, len(prompt) + PROBE_TOKENS)
        generator = self._begin(prompt, room, min_length=room)
        while not generator.is_done():
            generator.generate_next_token()
        if generator.token_count() <= len(prompt):
            raise RunFailure("UnsupportedModel", "The converted model loads, but generates nothing.")

    def _begin(self, prompt: Sequence[int], max_length: int, **search: Any) -> Any:
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=max_length, **GREEDY, **search)
        generator = self._og.Generator(self._model, parameters)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        return generator

    def _logits(self, ids: Sequence[int]) -> Any:
        """Scores of all tokens after each position, [positions, vocabulary], in the graph's precision."""
        generator = self._begin(ids, min(self.context, len(ids) + 1))
        return generator.get_output("logits")[0]  # not converted: of a large vocabulary one copy is enough


def _log_probability(logits: Any, label: int) -> float:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return float(shifted[label] - math.log(np.exp(shifted).sum()))
