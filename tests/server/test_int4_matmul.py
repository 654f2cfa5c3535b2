"""Int4MatMul, an operator of our own for onnxruntime, against what it is defined to be, computed in float64."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from kernel_harness import Array, Refused, isa, node_model, pretend, same, session

__all__ = ["isa"]  # the fixture that runs every test with the kernels of each instruction set


@dataclass
class Matrix:
    """4-bit weights and the operator that multiplies by them."""

    k: int
    n: int
    block: int
    spread: float = 1.0
    zero_points: bool = False

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.k * 1000 + self.n)
        self.blocks = -(-self.k // self.block)
        self.nibbles = draw.integers(0, 16, (self.n, self.blocks * self.block), np.uint8)
        self.scales = (self.spread * draw.uniform(0.001, 0.02, (self.n, self.blocks))).astype(np.float32)
        self.zeros = np.full((self.n, self.blocks + self.blocks % 2), 8, np.uint8)
        if self.zero_points:
            self.zeros[:, : self.blocks] = draw.integers(0, 16, (self.n, self.blocks), np.uint8)
        self.bytes = (self.nibbles[:, ::2] | self.nibbles[:, 1::2] << 4).reshape(self.n, self.blocks, self.block // 2)

    def model(self, not_constant: dict[str, type] | None = None, **changed: int) -> bytes:
        inputs = {"a": np.float32, "b": self.bytes, "scales": self.scales.reshape(-1)} | (not_constant or {})
        if self.zero_points:
            inputs["zeros"] = self.zeros[:, ::2] | self.zeros[:, 1::2] << 4
        sizes = {"K": self.k, "N": self.n, "block_size": self.block, "zero_points": int(self.zero_points)}
        return node_model("Int4MatMul", inputs, sizes | changed)

    def run(self, x: Array, threads: int = 1) -> Array:
        made = session(self.model(), threads)
        return np.asarray(made.run(None, {"a": x.astype(np.float32)})[0])

    def weights(self) -> Array:
        """[K, N]."""
        zeros, scales = (np.repeat(of[:, : self.blocks], self.block, axis=1) for of in (self.zeros, self.scales))
        whole = (self.nibbles.astype(np.float64) - zeros) * scales.astype(np.float64)
        return whole[:, : self.k].T

    def by_block(self, x: Array) -> Array:
        rows = np.zeros((len(x), self.blocks * self.block), np.float32)
        rows[:, : self.k] = x
        return rows.reshape(len(x), self.blocks, self.block)

    def rounded(self, x: Array) -> Array:
        """Activations as the operator sees them: 127 steps to the largest of each row and block."""
        parts = self.by_block(x)
        most = np.abs(parts).max(axis=2, keepdims=True)
        steps = np.rint(parts * np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0))
        scales = (most / np.float32(127)).astype(np.float64)
        return np.asarray((steps * scales).reshape(len(x), -1)[:, : self.k])


@cache
def matrix(k: int = 320, n: int = 50, block: int = 32, spread: float = 1.0) -> Matrix:
    return Matrix(k, n, block, spread)


def rows(count: int, k: int, seed: int = 1) -> Array:
    draw = np.random.default_rng(seed)
    return (draw.standard_normal((count, k)) * draw.uniform(0.1, 10, (count, 1))).astype(np.float32)


def test_a_row_is_what_it_is_alone_however_many_are_multiplied() -> None:
    made, x = session(matrix().model()), rows(130, 320)
    alone = np.concatenate([made.run(None, {"a": row[None]})[0] for row in x])
    for count in [*range(1, 41), 127, 128, 129, 130]:
        assert same(made.run(None, {"a": x[:count]})[0], alone[:count]), count
        assert same(made.run(None, {"a": x[-count:]})[0], alone[-count:]), count


SHAPES = [
    *((k, 48, block) for block in (16, 32, 64, 128, 256) for k in (block, 3 * block, 3 * block - 7, 5)),
    *((256, n, 32) for n in (1, 7, 15, 16, 17, 31, 500, 700)),
    (37, 3, 16),
    (1, 1, 16),
    (1000, 33, 48),
]


@pytest.mark.parametrize(("k", "n", "block"), SHAPES)
@pytest.mark.parametrize("count", [1, 3, 19, 37])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
def test_products_are_those_of_the_rounded_rows(k: int, n: int, block: int, count: int, zero_points: bool) -> None:
    of, x = Matrix(k, n, block, zero_points=zero_points), rows(count, k)
    got, rounded = of.run(x), of.rounded(x)
    room = np.abs(rounded) @ np.abs(of.weights())
    assert (np.abs(got - rounded @ of.weights()) <= 1e-6 * room).all()
    half_steps = np.repeat(np.abs(of.by_block(x)).max(axis=2) / 254, block, axis=1)[:, :k].astype(np.float64)
    exact = x.astype(np.float64) @ of.weights()
    assert (np.abs(got - exact) <= (half_steps * 1.0001) @ np.abs(of.weights()) + 1e-6 * room).all()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-35, 1e-30, 1e20, 3e36])
def test_tiny_and_huge_rows(size: float) -> None:
    of = matrix()
    x = (rows(9, of.k).clip(-9, 9) * size).astype(np.float32)
    got, exact = of.run(x), x.astype(np.float64) @ of.weights()
    most = np.abs(x.astype(np.float64)).max(axis=1, keepdims=True) * np.abs(of.weights()).sum(axis=0)
    assert (np.abs(got - exact) <= most / 127).all() if size > 1e-36 else not got.any()  # the tiniest become zeros


def test_the_largest_steps_do_not_overflow() -> None:
    of = Matrix(512, 32, 256)
    for sign in (1, -1):
        x = np.full((1, 512), 3.25 * sign, np.float32)
        of.nibbles[:] = np.arange(32)[:, None] % 16
        of.__dict__["bytes"] = (of.nibbles[:, ::2] | of.nibbles[:, 1::2] << 4).reshape(32, 2, 128)
        np.testing.assert_allclose(of.run(x), x.astype(np.float64) @ of.weights(), rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_are_zeros() -> None:
    of, x = matrix(), rows(20, 320)
    expected = of.run(x)
    x[[0, 7, 19]] = expected[[0, 7, 19]] = 0
    x[3, :64] = 0
    got = of.run(x)
    assert same(np.delete(got, 3, 0), np.delete(expected, 3, 0))
    assert np.abs(got[3] - of.rounded(x)[3] @ of.weights()).max() < 1e-4


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 31, 319])
def test_what_is_no_number_stays_in_its_row(bad: float, at: int) -> None:
    of, x = matrix(), rows(20, 320)
    expected = of.run(x)
    x[[2, 11], at] = bad
    got = of.run(x)
    assert not np.isfinite(got[[2, 11]]).any()
    assert same(np.delete(got, [2, 11], 0), np.delete(expected, [2, 11], 0))


@pytest.mark.parametrize("shape", [(320,), (6, 320), (2, 3, 320), (1, 2, 3, 320), (0, 320), (2, 0, 320)])
def test_any_leading_axes(shape: tuple[int, ...]) -> None:
    of, x = matrix(), rows(6, 320)[: int(np.prod(shape)) // 320]
    got = of.run(x.reshape(shape))
    assert got.shape == (*shape[:-1], 50)
    assert same(got.reshape(-1, 50), of.run(x))


def test_threads_and_sessions_give_the_same_bits() -> None:
    of = Matrix(896, 700, 128)
    for count in (1, 8, 33, 129):
        x = rows(count, 896)
        assert same(of.run(x, threads=1), of.run(x, threads=2))


@pytest.mark.parametrize(("k", "n", "block"), SHAPES)
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
def test_products_are_the_same_on_every_cpu(k: int, n: int, block: int, zero_points: bool, isa: str) -> None:
    made, x = session(Matrix(k, n, block, zero_points=zero_points).model()), rows(37, k)
    x[3, 0], x[5, -1], x[7], x[8] = np.inf, np.nan, 0, x[8] * np.float32(1e-37)
    got = made.run(None, {"a": x})[0]
    pretend(None)
    assert same(got, made.run(None, {"a": x})[0])


@pytest.mark.parametrize("shape", [(4, 319), (4, 321), (320, 1), ()])
def test_rows_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(Refused, match=r"Int4MatMul: A is not \[\.\., K\]"):
        session(matrix().model()).run(None, {"a": np.ones(shape, np.float32)})


CHANGED = [
    {"K": 0}, {"N": -1}, {"block_size": 0}, {"block_size": 24}, {"K": 352}, {"K": 288}, {"N": 51}, {"N": 49},
    {"block_size": 64}, {"K": 1 << 60}, {"N": 1 << 61}, {"block_size": 1 << 62},
]  # fmt: skip


@pytest.mark.parametrize("changed", CHANGED, ids=str)
def test_sizes_that_are_not_those_of_the_weights_are_refused(changed: dict[str, int]) -> None:
    with pytest.raises(Refused, match="Int4MatMul: "):
        session(matrix().model(**changed))


def test_zero_points_of_another_number_are_refused() -> None:
    of = Matrix(96, 20, 32, zero_points=True)
    of.zeros = of.zeros[:, :2]
    with pytest.raises(Refused, match="Int4MatMul: zeros are not"):
        session(of.model())


def test_blocks_whose_products_need_not_fit_into_32_bits_are_refused() -> None:
    of = Matrix(1 << 21, 1, 1 << 21)
    with pytest.raises(Refused, match="Int4MatMul: K, N or block_size"):
        of.run(np.ones((1, 1 << 21), np.float32))


@pytest.mark.parametrize("name", [{"b": np.uint8}, {"scales": np.float32}], ids=str)
def test_weights_that_are_not_constant_are_refused(name: dict[str, type]) -> None:
    with pytest.raises(Refused, match="Int4MatMul: B, scales and zeros are to be constant"):
        session(matrix().model(name))
