"""Which engine serves a folder, with how many slots and threads."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops_server import cgroup
from slmops_server.engines import adapters, graph
from slmops_server.engines.adapters import BadAdapterError
from slmops_server.engines.base import Engine, EngineInfo, EngineRefusedError, Job, Sampling
from slmops_server.engines.slots import SlotEngine
from slmops_server.model_folder import ModelFolder

log = logging.getLogger(__name__)

ONLY = "only onnxruntime does; leave out --adapter and --adapter-root"

DEFAULT_SLOTS = 8
RUNTIME_BYTES = 200 << 20  # two Python processes, onnxruntime's code and arenas
FORMS = {".xml": ("OpenVINO IR", "openvino"), ".gguf": ("GGUF", "llamacpp")}  # and the only engine that reads them
GENAI_SLOTS = 4  # rows are stepped one by one there: more only share the same speed


@dataclass(frozen=True)
class EngineOptions:
    """What the front passes on; 0 means "work it out"."""

    engine: str = "auto"
    threads: int = 0
    slots: int = 0
    max_model_len: int = 0
    prefill_chunk: int = 128
    guesses: int = 0
    adapters: Sequence[tuple[str, str]] = ()  # names and folders; the engine does not start without them
    loaded: Sequence[tuple[str, str]] | None = None  # while the server ran; None: none may be

    @property
    def wants_adapters(self) -> bool:
        """Whether the engine has to be one that knows adapters."""
        return bool(self.adapters) or self.loaded is not None


class DoesNotFitError(Exception):
    """The KV cache cannot fit into the memory limit; the message has the numbers."""


def plan_slots(
    folder: ModelFolder,
    max_len: int,
    wanted: int,
    memory: int,
    item_bytes: int = 0,
    runtime: int = RUNTIME_BYTES,
    least_rows: int = 1,
) -> int:
    """Slots that fit into `memory` bytes beside the model and `runtime`. DoesNotFitError when it does not fit.

    `item_bytes`: of one number in the KV cache, 0 for what the graph has. `least_rows`: what the engine has at least.
    """
    row = folder.kv_bytes(max_len, item_bytes or _item_bytes(folder))
    left = memory - folder.model_bytes - runtime
    slots = wanted or max(1, min(DEFAULT_SLOTS, left // row))
    rows = max(slots, least_rows)
    if rows * row > left:
        what = f"{slots} slots" if rows == slots else f"{rows} rows (the engine has no fewer)"
        raise DoesNotFitError(
            f"{what} x {max_len} tokens need {rows * row >> 20} MiB of KV cache; of {memory >> 20} MiB "
            f"the model ({folder.model_bytes >> 20} MiB) and the runtime leave {max(0, left) >> 20} MiB. "
            "Raise the memory limit or lower --slots or --max-model-len"
        )
    return slots


def _item_bytes(folder: ModelFolder) -> int:
    """Bytes of one number in the KV cache; of a damaged or unusual graph the most that it may be."""
    try:
        return graph.item_bytes(graph.read(folder.graph), folder.inputs["past_key_names"] % 0) or 4
    except (KeyError, TypeError, ValueError):  # the engine tells what is wrong with it
        return 4


def load(folder: ModelFolder, options: EngineOptions) -> Engine:
    """A loaded and measured engine. EngineRefusedError or DoesNotFitError say why there is none."""
    max_len = min(options.max_model_len or folder.context_length, folder.context_length)
    if max_len < 2:
        raise DoesNotFitError(f"{max_len} token holds no prompt and an answer; raise --max-model-len to 2 at least")
    limit = cgroup.threads()
    form, only = FORMS.get(folder.graph.suffix, ("ONNX", ""))
    engine = only if only and options.engine == "auto" else options.engine
    if options.wants_adapters and engine not in ("auto", "onnxruntime"):
        raise EngineRefusedError(f"the engine {engine} takes no adapters, {ONLY}")
    if only and engine != only:
        raise EngineRefusedError(f"{folder.path} holds {form}; start it with --engine {only}")
    if engine == "llamacpp" and not only:
        raise EngineRefusedError(f"{folder.path} holds ONNX; the engine llamacpp reads GGUF")
    if engine == "openvino":
        return _openvino(folder, options, max_len, limit)
    if engine == "llamacpp":
        return _llamacpp(folder, options, max_len, limit)
    slots = plan_slots(folder, max_len, options.slots, cgroup.memory_limit())
    reason = ""
    if options.engine in ("auto", "onnxruntime"):
        try:
            return _onnxruntime(folder, options, slots, max_len, limit)
        except EngineRefusedError as error:
            if options.engine == "onnxruntime" or options.wants_adapters:
                raise
            reason = str(error)
            log.info("Engine onnxruntime refused the model: %s", reason)
    if options.guesses:
        raise EngineRefusedError(f"engine genai cannot guess ahead: leave --speculate out{reason and f' ({reason})'}")
    return _genai(folder, options, min(slots, options.slots or GENAI_SLOTS), max_len, limit, reason)


def _onnxruntime(folder: ModelFolder, options: EngineOptions, slots: int, max_len: int, limit: int) -> Engine:
    from slmops_server.engines import ort

    try:
        forward, threads, notes = ort.load(folder, slots, max_len, options.prefill_chunk, options.threads, limit)
    except EngineRefusedError as error:
        if options.wants_adapters:
            raise EngineRefusedError(
                f"adapters need the engine onnxruntime, which refuses the model: {error}"
            ) from None
        raise
    if options.wants_adapters and not forward.lora:
        raise EngineRefusedError(
            f"{folder.graph} takes no adapters: the weights of adapters are no inputs of it. "
            "Build it anew with Olive's ExtractAdapters pass"
        )
    row = folder.kv_bytes(max_len, _item_bytes(folder))
    left = cgroup.memory_limit() - folder.model_bytes - RUNTIME_BYTES
    shelf = adapters.Shelf(forward.lora, left - (options.slots or 1) * row)
    for name, where in options.adapters:
        try:
            shelf.load(name, Path(where))
        except BadAdapterError as error:
            raise EngineRefusedError(f"--adapter {name}: {error}") from None
    for name, where in options.loaded or ():
        try:
            shelf.load(name, Path(where))
        except BadAdapterError as error:  # it was loaded while the engine before this one ran
            log.error("Lost an adapter name=%r problem=%s", name, error)  # noqa: TRY400 - the message has it all
    # fewer slots for the adapters' sake where none were asked for; a row without a slot is never filled
    slots = min(slots, (left - shelf.used) // row)
    shelf.room = left - slots * row
    info = EngineInfo("onnxruntime", slots, max_len, threads, notes)
    return SlotEngine(
        forward, info, folder.eos_ids, options.guesses, adapters=shelf if options.wants_adapters else None
    )


def _openvino(folder: ModelFolder, options: EngineOptions, max_len: int, limit: int) -> Engine:
    from slmops_server.engines import openvino

    memory = cgroup.memory_limit()
    slots = plan_slots(folder, max_len, options.slots, memory, openvino.KV_BYTES, openvino.RUNTIME_BYTES)
    threads = options.threads or limit
    forward, notes = openvino.load(folder, slots, max_len, options.prefill_chunk, threads)
    return SlotEngine(forward, EngineInfo("openvino", slots, max_len, threads, notes), folder.eos_ids, options.guesses)


def _llamacpp(folder: ModelFolder, options: EngineOptions, max_len: int, limit: int) -> Engine:
    from slmops_server.engines import llamacpp

    memory, row = cgroup.memory_limit(), llamacpp.cells(max_len)
    slots = plan_slots(
        folder, row, options.slots, memory, llamacpp.KV_BYTES, llamacpp.RUNTIME_BYTES, llamacpp.LEAST_ROWS
    )
    threads = options.threads or limit
    forward, notes = llamacpp.load(folder, slots, max_len, options.prefill_chunk, threads, options.guesses)
    return SlotEngine(forward, EngineInfo("llamacpp", slots, max_len, threads, notes), folder.eos_ids, options.guesses)


def _genai(folder: ModelFolder, options: EngineOptions, slots: int, max_len: int, limit: int, reason: str) -> Engine:
    from slmops_server.engines import genai

    threads = options.threads or limit
    forward = genai.GenaiForward(folder, slots, max_len, threads, options.prefill_chunk)
    notes = {"reason": reason} if reason else {}
    return SlotEngine(forward, EngineInfo("genai", slots, max_len, threads, notes), folder.eos_ids)


def warm(engine: Engine, prompt: list[int]) -> float:
    """Generate a few tokens through the whole path; seconds. RuntimeError when no token comes."""
    start = time.monotonic()
    size = max(1, min(len(prompt), engine.info.max_len - 4))
    engine.submit(Job(id=0, prompt=prompt[:size], max_tokens=4, sampling=Sampling(temperature=0.0), ignore_eos=True))
    finished = None
    while engine.busy:
        for token in engine.step():
            finished = token.finish or finished
    if finished != "length":
        raise RuntimeError(f"the model gave no answer at warm-up ({finished or 'no token'})")
    return time.monotonic() - start
