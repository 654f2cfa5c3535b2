"""llama.cpp's C interface, as the xllamacpp wheel exports it: only what an engine on a CPU needs.

The wheel is one library with llama.cpp inside; its Python side is never imported. The records below are those of that
version's llama.h. Nothing in C tells whether they fit, so another version is refused, and so are unexpected defaults.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from collections import deque
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, ClassVar

from slmops_server.engines.base import EngineRefusedError

PACKAGE = "xllamacpp"
VERSION = "2026.9.11063"
INSTALL = "llama.cpp is not installed here: use the server image, or slmops-server with its extra llamacpp"
NEEDED = {"avx2", "bmi2", "f16c", "fma"}  # what the wheel is compiled for
# rounds in which a thread looks for the others before it sleeps. OpenMP's own 300,000 are milliseconds at each of a
# step's hundreds of meetings: where others want the CPU too, a step of 20 ms took 700 and takes 90 with this
SPINS = 1000
F16 = 1  # ggml's number of the type
ERROR, CONTINUED = 4, 5  # levels of its log; the latter goes on with the line before


class Fields(ctypes.Structure):
    """A record by its fields' names and types."""

    def told(self) -> dict[str, Any]:
        """All values."""
        return {name: getattr(self, name) for name, *_ in self._fields_}


class ModelParams(Fields):
    """llama_model_params."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host")),
        *((name, c_bool) for name in ("no_alloc", "load_mtp")),
    ]


class ContextParams(Fields):
    """llama_context_params."""

    _fields_: ClassVar = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(Fields):
    """llama_batch: tokens, each with its position, its row and whether its logits are wanted."""

    _fields_: ClassVar = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "type_k": F16,
    "type_v": F16,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_model_n_layer": (c_int32, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_n_swa": (c_int32, [c_void_p]),
    "llama_model_has_encoder": (c_bool, [c_void_p]),
    "llama_model_is_recurrent": (c_bool, [c_void_p]),
    "llama_model_is_hybrid": (c_bool, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (c_void_p, [c_void_p]),
}
_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class Library:
    """The functions of llama.h by name, and the last errors that llama.cpp logged."""

    def __init__(self, path: Path) -> None:
        """EngineRefusedError when the library cannot be loaded or is not the one that is known here."""
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
        try:
            self._library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:  # the former names the library that it lacks
            raise EngineRefusedError(f"llama.cpp's library cannot be loaded: {error}") from None
        self._errors: deque[str] = deque(maxlen=3)
        self._level = 0
        self._log = _LOG(self._note)  # kept: the library calls it
        self._library.llama_log_set(self._log, None)
        check("llama_model_params", MODEL_DEFAULTS, self.call("llama_model_default_params"))
        check("llama_context_params", CONTEXT_DEFAULTS, self.call("llama_context_default_params"))

    def call(self, name: str, *arguments: object) -> Any:
        """One of the functions above."""
        return getattr(self._library, name)(*arguments)

    def _note(self, level: int, text: bytes, _: object) -> None:
        if level != CONTINUED:
            self._level = level
        if self._level == ERROR and text.strip():
            self._errors.append(text.decode("utf-8", "replace").strip())

    def reason(self) -> str:
        """What llama.cpp said last about what went wrong."""
        return "; ".join(self._errors) or "llama.cpp gives no reason"


def check(record: str, wanted: dict[str, Any], found: Fields) -> None:
    """EngineRefusedError when the library's defaults are not those of the version whose records are above."""
    expected = {name: wanted.get(name) or 0 for name, *_ in found._fields_}
    wrong = [name for name, value in found.told().items() if (value or 0) != expected[name]]
    if wrong:
        names = ", ".join(wrong)
        raise EngineRefusedError(f"llama.cpp's {record} is not as expected ({names}): install {PACKAGE}=={VERSION}")


def missing_instructions(cpuinfo: str) -> set[str]:
    """What the wheel is compiled for and the CPU lacks, by /proc/cpuinfo."""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return NEEDED - set(flags.split())


def load() -> Library:
    """The installed library. EngineRefusedError says why it cannot be used."""
    try:
        version = importlib.metadata.version(PACKAGE)
        spec = importlib.util.find_spec(PACKAGE)  # does not run the package
    except importlib.metadata.PackageNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise EngineRefusedError(INSTALL)
    if version != VERSION:
        raise EngineRefusedError(f"{PACKAGE} {version} is installed; its records are known of {VERSION} only")
    if lacks := missing_instructions(Path("/proc/cpuinfo").read_text(encoding="utf-8")):
        raise EngineRefusedError(f"llama.cpp is compiled for AVX2, and this CPU lacks {', '.join(sorted(lacks))}")
    return Library(Path(spec.submodule_search_locations[0]) / f"{PACKAGE}.abi3.so")
