"""onnxruntime's IOBindings: arrays of ours as inputs, and the bindings that are kept for later calls."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]  # it ships no types
from numpy.typing import NDArray

from slmops_server.engines import adapters
from slmops_server.engines.adapters import Input, Place

TYPES: dict[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


def bind(binding: ort.IOBinding, name: str, array: NDArray[np.generic], shape: tuple[int, ...] | None = None) -> None:
    """The array, which is not kept alive, is the input; `shape` where less of it is."""
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape if shape is None else shape, array.ctypes.data)


def recent(kept: dict[Key, Made], key: Key, most: int, make: Callable[[], Made]) -> Made:
    """What was made for this key, made again when others took its place: the `most` that were used last are kept."""
    found = kept.pop(key, None) or make()
    kept[key] = found
    if len(kept) > most:
        del kept[next(iter(kept))]
    return found


def lora_inputs(session: ort.InferenceSession) -> dict[Place, Input]:
    """The optional inputs of a graph that adapters fill. ValueError when two of them have the same place."""
    optional = {i.name: (i.type, i.shape) for i in session.get_overridable_initializers()}
    return adapters.inputs({name: (TYPES[kind], shape) for name, (kind, shape) in optional.items() if kind in TYPES})
