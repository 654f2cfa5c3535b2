"""LoRA adapters in the multi-adapter form of Olive and onnxruntime: a graph with the weights of adapters as inputs.

Beside each adapted matrix product the graph has two more, of the adapter's A [in, rank] and B [rank, out, scaled],
both optional inputs; without them their rank is 0 and the base computes what it would without them. The rank is one
for all of the graph: onnxruntime gives the memory of one product to another that has the same dimensions by name.
An adapter is a folder with one .onnx_adapter file: tensors by name.
"""

import re
import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

SUFFIX = ".onnx_adapter"
# Olive names a weight after peft's module (self_attn.q_proj.lora_A.weight), the builder after its node
# (attn.q_proj.lora_A.MatMul.weight): layer, module and side are the same.
NAMES = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?([^.]+)\.lora_([AB])(?:\.MatMul)?\.weight$")
RANK_AXIS = {"A": 1, "B": 0}
LEAST_RANK = 2  # onnxruntime's product with a matrix of one column rounds a row by how many there are

Tensors = dict[str, NDArray[np.generic]]
Place = tuple[int, str, str]  # layer, module, "A" or "B"


class BadAdapterError(Exception):
    """The adapter cannot be served with this model; the message says why."""


class Adapter:
    """The tensors of one adapter by the names of the graph's inputs. The object is the identity, its name is not."""

    def __init__(self, tensors: Mapping[str, NDArray[np.generic]]) -> None:
        self.tensors = dict(tensors)
        owners = {id(owner): owner for owner in (_owner(tensor) for tensor in tensors.values())}
        self.bytes = sum(owner.nbytes for owner in owners.values())


def _owner(tensor: NDArray[np.generic]) -> NDArray[np.generic]:
    return tensor if tensor.base is None else cast("NDArray[np.generic]", tensor.base)


BASE = Adapter({})  # stands for none


class Input(NamedTuple):
    """An optional input of the graph: its type, and its size beside the rank."""

    name: str
    kind: type[np.generic]
    size: int


def place(name: str) -> Place | None:
    """Where the tensor of that name belongs; None when it is no LoRA weight."""
    found = NAMES.search(name)
    return None if found is None else (int(found[1]), found[2], found[3])


def inputs(named: Mapping[str, tuple[type[np.generic], list[int | str]]]) -> dict[Place, Input]:
    """Those of a graph's optional inputs that adapters fill, by place. `named`: type and shape by name.

    ValueError when two of them have the same place.
    """
    found: dict[Place, Input] = {}
    for name, (kind, shape) in named.items():
        at = place(name)
        if at is None or len(shape) != 2 or not isinstance(size := shape[1 - RANK_AXIS[at[2]]], int):
            continue
        if at in found:
            raise ValueError(f"{found[at].name} and {name} are inputs for the same module")
        found[at] = Input(name, kind, size)
    return found


def file(folder: Path) -> Path:
    """The one file of an adapter's folder. BadAdapterError when there is none."""
    if not folder.is_dir():
        raise BadAdapterError(f"{folder} is not a folder")
    try:
        files = [path for path in folder.iterdir() if path.name.endswith(SUFFIX) and path.is_file()]
    except OSError as error:
        raise BadAdapterError(f"{folder} cannot be read: {error.strerror}") from None
    if len(files) != 1:
        raise BadAdapterError(
            f"{folder} has {len(files)} *{SUFFIX} files, and one is an adapter; "
            "`olive convert-adapters` makes it of what peft saved"
        )
    return files[0]


def read(path: Path) -> Tensors:
    """The tensors of an .onnx_adapter file by the names that it has. BadAdapterError when it is damaged."""
    import onnxruntime as ort  # type: ignore[import-untyped]  # it ships no types; the front reads no tensors

    try:
        _warm(path)
        held = ort.AdapterFormat.read_adapter(str(path))  # owns the memory that its parameters show
        values = held.get_parameters()
        # A damaged shape may claim more than the file has, and onnxruntime would read beyond its end.
        claimed = sum(_bytes(value.data_type(), value.shape()) for value in values.values())
        if claimed > path.stat().st_size:
            raise BadAdapterError(f"{path} is damaged: its tensors claim {claimed} bytes, more than the file has")
        return {name: np.array(value.numpy()) for name, value in values.items()}
    except (OSError, RuntimeError, ValueError) as error:  # the last: names that are no text, types that numpy lacks
        what = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise BadAdapterError(f"{path} cannot be read as an adapter, it may be damaged: {what}") from None


def _warm(path: Path) -> None:
    """Have the machine read a file into its cache. onnxruntime holds Python's lock while it reads, this does not."""
    part = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(part):
            pass


def _bytes(kind: str, shape: list[int]) -> int:
    return int(np.prod(shape, dtype=object)) * ITEM_BYTES.get(kind, 1)


ITEM_BYTES = {"tensor(float)": 4, "tensor(float16)": 2, "tensor(double)": 8, "tensor(int64)": 8, "tensor(int32)": 4}


def arrange(tensors: Tensors, wanted: Mapping[Place, Input]) -> tuple[dict[Place, str], int]:
    """The tensor for each place by its name, and the rank for all. BadAdapterError when the graph cannot take them."""
    found: dict[Place, str] = {}
    ranks: dict[tuple[int, str], int] = {}
    sides: Counter[tuple[int, str]] = Counter()
    for name, tensor in tensors.items():
        at = place(name)
        if at is None:
            raise BadAdapterError(f"{name} is no float LoRA weight of a layer, and the graph takes nothing else")
        if at not in wanted:
            have = ", ".join(sorted({module for _, module, _ in wanted}))
            layers = 1 + max((layer for layer, _, _ in wanted), default=-1)
            raise BadAdapterError(
                f"{name} has no place in the graph, which takes adapters of {have} in {layers} layers: "
                "it was made for another base, or the graph for adapters of fewer modules"
            )
        layer, module, side = at
        put = wanted[at]
        axis = RANK_AXIS[side]
        if tensor.ndim != 2 or tensor.shape[1 - axis] != put.size:
            shape = ("rank", put.size) if axis == 0 else (put.size, "rank")
            raise BadAdapterError(
                f"{name} is {list(tensor.shape)}, where the graph wants [{shape[0]}, {shape[1]}]: "
                "it was made for another base"
            )
        rank = ranks.setdefault((layer, module), tensor.shape[axis])
        if rank != tensor.shape[axis] or rank == 0:
            raise BadAdapterError(f"layer {layer} {module}: lora_A and lora_B are of different ranks, or of rank 0")
        if not np.issubdtype(tensor.dtype, np.floating):
            raise BadAdapterError(f"{name} has values that are no finite numbers")
        if at in found:
            raise BadAdapterError(f"{name} is there twice, by two names")
        sides[layer, module] += 1
        found[at] = name
    half = next((key for key, count in sides.items() if count != 2), None)
    if half is not None:
        raise BadAdapterError(f"layer {half[0]} {half[1]} has only one of lora_A and lora_B")
    if not found:
        raise BadAdapterError("it holds no weights at all")
    return found, max(LEAST_RANK, *ranks.values())


def size(found: Collection[Place], wanted: Mapping[Place, Input], rank: int) -> int:
    """Bytes of the adapter that `fit` makes of tensors for these places."""
    own = sum(wanted[at].size * np.dtype(wanted[at].kind).itemsize for at in found)
    others = {put.kind for at, put in wanted.items() if at not in found}
    return rank * (own + _largest(wanted) * sum(np.dtype(kind).itemsize for kind in others))


def fit(tensors: Tensors, found: Mapping[Place, str], wanted: Mapping[Place, Input], rank: int) -> Adapter:
    """All tensors that the graph wants, of one rank: those found, with zeros up to it, and zeros for the others.

    The others share their zeros. Each tensor is taken out of `tensors` when it is copied, or both would be there as a
    whole. BadAdapterError where a value is no finite number of the graph's type.
    """
    zeros: dict[type[np.generic], NDArray[np.generic]] = {}
    made: dict[str, NDArray[np.generic]] = {}
    for at, (name, kind, size) in wanted.items():
        shape = (size, rank) if at[2] == "A" else (rank, size)
        if at in found:
            tensor = tensors.pop(found[at])
            made[name] = np.zeros(shape, kind)
            part = made[name][: tensor.shape[0], : tensor.shape[1]]
            with np.errstate(over="ignore"):
                part[...] = tensor
            if not np.isfinite(part).all():
                raise BadAdapterError(f"{found[at]} has values that are no finite numbers")
        else:
            if kind not in zeros:
                zeros[kind] = np.zeros(rank * _largest(wanted), kind)
            made[name] = zeros[kind][: rank * size].reshape(shape)
    return Adapter(made)


def _largest(wanted: Mapping[Place, Input]) -> int:
    return max(one.size for one in wanted.values())


class Shelf:
    """The adapters of a model by name. `room`: bytes for all that are in use, those included that lost their name."""

    def __init__(self, wanted: Mapping[Place, Input], room: int) -> None:
        self._wanted, self.room = wanted, room
        self._named: dict[str, Adapter] = {"": BASE}
        self._alive: weakref.WeakSet[Adapter] = weakref.WeakSet()

    @property
    def names(self) -> list[str]:
        """Of the adapters, without the base."""
        return [name for name in self._named if name]

    @property
    def used(self) -> int:
        """Bytes of those in use."""
        return sum(adapter.bytes for adapter in self._alive)

    def get(self, name: str) -> Adapter | None:
        """The adapter of that name; the empty one is the base's."""
        return self._named.get(name)

    def load(self, name: str, folder: Path) -> None:
        """Read an adapter and give it the name, which another one then loses. BadAdapterError when it does not fit."""
        path = file(folder)
        self._check_room(path, path.stat().st_size)
        tensors = read(path)
        found, rank = arrange(tensors, self._wanted)
        self._check_room(path, size(found, self._wanted, rank))
        adapter = fit(tensors, found, self._wanted, rank)
        self._alive.add(adapter)
        self._named[name] = adapter

    def _check_room(self, path: Path, need: int) -> None:
        used = self.used
        if used + need > self.room:
            raise BadAdapterError(
                f"{path} needs {need / 2**20:.1f} MiB; the memory limit leaves {self.room / 2**20:.1f} MiB for "
                f"adapters, of which {used / 2**20:.1f} MiB are in use. Raise the limit, or lower --slots or "
                "--max-model-len"
            )

    def unload(self, name: str) -> None:
        """Forget the name; jobs that run keep the adapter."""
        self._named.pop(name, None)
