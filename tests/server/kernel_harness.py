"""Sessions of one operator of our own, whose models are written here: the onnx package is not in the server's image."""

import ctypes
import importlib.util
import struct
from collections.abc import Iterator

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]  # it ships no types
import pytest

from slmops_server.engines.protobuf import message, number_field

Array = np.ndarray
SPEC = importlib.util.find_spec("slmops_kernels")
LIBRARY = SPEC.origin if SPEC and SPEC.origin else ""
ISAS = ["avx512", "avxvnni", "avx2"]
TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int64): 7}
State = ort.capi.onnxruntime_pybind11_state
Refused = (State.InvalidArgument, State.RuntimeException, RuntimeError)


def node_model(op: str, inputs: dict[str, type | Array | None], attributes: dict[str, float]) -> bytes:
    """A model of one node; an input is of a type, or constant, or absent."""
    node = b"".join(message(1, b"" if given is None else name.encode()) for name, given in inputs.items())
    node += message(2, b"out") + message(4, op.encode()) + message(7, b"slmops")
    for name, value in attributes.items():
        kind = 1 if isinstance(value, float) else 2
        coded = b"\x15" + struct.pack("<f", value) if kind == 1 else number_field(3, int(value) & (1 << 64) - 1)
        node += message(5, message(1, name.encode()) + coded + number_field(20, kind))
    graph = message(1, node) + message(2, b"graph") + value_info(12, "out", np.float32)
    for name, given in inputs.items():
        if isinstance(given, np.ndarray):
            dims = b"".join(number_field(1, size) for size in given.shape)
            head = dims + number_field(2, TYPES[given.dtype]) + message(8, name.encode())
            graph += message(5, head + message(9, given.tobytes()))
        elif given:
            graph += value_info(11, name, given)
    versions = [message(1, domain) + number_field(2, version) for domain, version in [(b"", 17), (b"slmops", 1)]]
    return number_field(1, 8) + message(7, graph) + b"".join(message(8, one) for one in versions)


def value_info(place: int, name: str, of: type) -> bytes:
    return message(place, message(1, name.encode()) + message(2, message(1, number_field(1, TYPES[np.dtype(of)]))))


def pretend(isa: str | None) -> bool:
    """Let the operators take the kernels of an instruction set, or the best; whether this CPU has it."""
    return bool(LIBRARY) and bool(ctypes.CDLL(LIBRARY).slmops_pretend(isa and isa.encode()))


def session(model: bytes, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(LIBRARY)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def same(one: Array, other: Array) -> bool:
    """Bit for bit; one NaN is as good as another."""
    bits = [np.where(np.isnan(array), np.float32(np.nan), array).view(np.int32) for array in (one, other)]
    return one.shape == other.shape and bool((bits[0] == bits[1]).all())


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with the kernels of each instruction set."""
    if not pretend(request.param):
        pytest.skip("the library is missing, or this CPU lacks what it needs")
    yield request.param
    pretend(None)
