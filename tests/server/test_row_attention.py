"""RowAttention, an operator of our own for onnxruntime, against what it is defined to be, computed in float64."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from kernel_harness import Array, Refused, isa, node_model, pretend, same, session

__all__ = ["isa"]  # the fixture that runs every test with the kernels of each instruction set

GUARD = 64


@dataclass
class Layer:
    """The operator with a cache between guards, and what its sequences are in float64."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 32
    rotated: int | None = None  # None: all; 0: nothing
    window: int = 0
    packed: bool = False
    slots: int = 3
    length: int = 96
    threads: int = 1
    kept: dict[int, list[tuple[Array, Array]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scale = self.size**-0.5
        turned = self.size if self.rotated is None else self.rotated
        angles = np.arange(self.length)[:, None] * 10000.0 ** -(np.arange(turned // 2) / max(turned // 2, 1))
        self.tables = [f(angles).astype(np.float32) for f in (np.cos, np.sin)] if turned else []
        separate, tables = None if self.packed else np.float32, np.float32 if turned else None
        inputs = dict(zip("qkvKVncs", [np.float32, *[separate] * 2, *[np.float32] * 2, np.int64, *[tables] * 2]))  # noqa: B905
        numbers = {"num_heads": self.heads, "kv_num_heads": self.kv_heads}
        more = {"local_window_size": self.window or -1, "scale": self.scale}
        self.session = session(node_model("RowAttention", inputs, numbers | more), self.threads)
        shape = (self.slots, self.kv_heads, self.length, self.size)
        whole = np.random.default_rng(0).standard_normal((2, int(np.prod(shape)) + 2 * GUARD)).astype(np.float32)
        whole[:] = np.nan  # what nobody wrote is nothing that anybody may read
        self.whole = whole
        self.cache = [half[GUARD:-GUARD].reshape(shape) for half in whole]

    def tokens(self, count: int, seed: int = 1, size: float = 1.0) -> Array:
        wide = (self.heads + 2 * self.kv_heads) * self.size
        return (np.random.default_rng(seed).standard_normal((count, wide)) * size).astype(np.float32)

    def run(self, tokens: Array, calls: Iterable[tuple[int, int, int]], **changed: Array) -> Array:
        """What the operator says of tokens (query, key and value, one behind the other)."""
        own, kv = self.heads * self.size, self.kv_heads * self.size
        parts = [tokens] if self.packed else [tokens[..., :own], tokens[..., own : own + kv], tokens[..., own + kv :]]
        given = dict(zip("q" if self.packed else "qkv", map(np.ascontiguousarray, parts), strict=True))
        given |= dict(zip("KV", self.cache, strict=True)) | dict(zip("cs", self.tables, strict=False))
        given |= {"n": np.array(list(calls), np.int64).reshape(-1, 3)} | changed
        bound = self.session.io_binding()
        for name, array in given.items():
            bound.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        bound.bind_output("out")
        self.session.run_with_iobinding(bound)
        return np.asarray(bound.copy_outputs_to_cpu()[0])

    def turn(self, heads: Array, position: int) -> Array:
        if not self.tables:
            return heads
        cos, sin = (table[position].astype(np.float64) for table in self.tables)
        half = len(cos)
        a, b, rest = heads[:, :half], heads[:, half : 2 * half], heads[:, 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=1)

    def expected(self, tokens: Array, calls: Iterable[tuple[int, int, int]]) -> Array:
        """The same by the definition of attention."""
        out, at = [], 0
        for slot, past, count in calls:
            for position in range(past, past + count):
                every = tokens[at].astype(np.float64).reshape(-1, self.size)
                query, key, value = np.split(every, [self.heads, self.heads + self.kv_heads])
                kept = self.kept.setdefault(slot, [])
                kept[position:] = [(self.turn(key, position), value)]
                seen = kept[-self.window :] if self.window else kept
                shared = self.heads // self.kv_heads
                keys, values = (np.repeat(np.stack(part), shared, axis=1) for part in zip(*seen, strict=True))
                scores = np.einsum("hd,phd->hp", self.turn(query, position), keys) * self.scale
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                out.append(np.einsum("hp,phd->hd", weights / weights.sum(axis=1, keepdims=True), values).reshape(-1))
                at += 1
        return np.array(out)


FORMS = [
    *({"heads": heads, "kv_heads": kv} for heads, kv in [(14, 2), (4, 4), (8, 1), (6, 2), (3, 1), (15, 1), (1, 1)]),
    *({"size": size} for size in (16, 32, 48, 64, 80, 96, 112, 128, 256, 512)),
    *({"size": 64, "rotated": rotated} for rotated in (0, 2, 16, 32, 40)),
    *({"window": window} for window in (1, 5, 16, 17, 40, 200)),
]


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_is_what_it_is_defined_to_be(form: dict[str, int], packed: bool) -> None:
    layer = Layer(**form, packed=packed)
    for calls in (
        [(1, 0, 20)],
        [(2, 0, 1), (1, 20, 1), (0, 0, 33)],
        [(0, 33, 1), (2, 1, 1), (1, 21, 1)],
        [(1, 22, 50), (2, 2, 7)],
        [(1, 72, 24), (0, 34, 1)],  # the first slot is full
        [(1, 30, 3)],  # and begins anew from within
    ):
        tokens = layer.tokens(sum(count for _, _, count in calls), seed=len(calls))
        np.testing.assert_allclose(layer.run(tokens, calls), layer.expected(tokens, calls), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_is_the_same_on_every_cpu(form: dict[str, int], isa: str) -> None:
    mine, best = Layer(**form), Layer(**form)
    for calls in ([(1, 0, 20), (0, 0, 1)], [(2, 0, 1), (1, 20, 1), (0, 1, 33)], [(1, 21, 75)]):
        tokens = mine.tokens(sum(count for _, _, count in calls), seed=len(calls), size=3.0)
        pretend(isa)
        got = mine.run(tokens, calls)
        pretend(None)
        assert same(got, best.run(tokens, calls))
        assert same(mine.whole, best.whole)


def test_scores_of_any_size() -> None:
    for size in (1e-20, 30.0, 1000.0, 1e15):
        layer = Layer(size=64, rotated=0)
        tokens = layer.tokens(40)
        tokens[:, : 6 * 64] *= size
        got, expected = layer.run(tokens, [(0, 0, 40)]), layer.expected(tokens, [(0, 0, 40)])
        assert np.isfinite(got).all()
        if size != 30.0:  # between them the weights depend on how scores were rounded
            np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("form", [{}, {"heads": 14, "size": 64}, {"window": 19}, {"size": 80, "packed": True}], ids=str)
def test_a_token_is_the_same_alone_in_company_and_however_its_prompt_was_cut(form: dict[str, int]) -> None:
    whole = Layer(**form)
    prompt, others = whole.tokens(70), whole.tokens(300, seed=2)
    once = whole.run(prompt, [(0, 0, 70)])
    layer = Layer(**form, threads=2)
    past = taken = 0
    for cut in (1, 1, 15, 1, 2, 29, 1, 16, 4):
        company = [] if past == 0 else [(0, past % 50, 1)] if cut == 1 else [(0, past % 50, 3), (1, past % 7, 1)]
        if past:
            layer.run(others[:60], [(0, 0, 60)])  # so that the company has something to see
            layer.run(others[:9], [(1, 0, 9)])
        calls = [*company[:1], (2, past, cut), *company[1:]]
        before = sum(count for _, _, count in company[:1])
        total = sum(count for _, _, count in calls)
        tokens = others[taken : taken + total].copy()
        tokens[before : before + cut] = prompt[past : past + cut]
        assert same(layer.run(tokens, calls)[before : before + cut], once[past : past + cut])
        past, taken = past + cut, taken + total
    assert past == 70


@pytest.mark.parametrize("calls", [[(1, 17, 1)], [(1, 15, 20)], [(1, 0, 1)], [(1, 95, 1)], [(1, 0, 96)]], ids=str)
def test_only_the_tokens_of_a_call_are_written(calls: list[tuple[int, int, int]]) -> None:
    layer = Layer()
    (slot, past, count) = calls[0]
    layer.run(layer.tokens(96), [(slot, 0, 96)])
    before = layer.whole.copy()
    layer.run(layer.tokens(count, seed=2), calls)
    untouched = np.ones((layer.slots, layer.kv_heads, layer.length, layer.size), bool)
    untouched[slot, :, past : past + count] = False
    at_keys = untouched.reshape(*untouched.shape[:2], -1, 16, layer.size).swapaxes(3, 4).reshape(untouched.shape)
    for after, old, keep in zip(layer.whole, before, (at_keys, untouched), strict=True):
        guarded = np.concatenate([np.ones(GUARD, bool), keep.reshape(-1), np.ones(GUARD, bool)])
        assert same(after[guarded], old[guarded])
        assert (after[~guarded] != old[~guarded]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_in_its_sequence(bad: float) -> None:
    layer, other = Layer(), Layer()
    tokens, calls = layer.tokens(36), [(0, 0, 12), (2, 0, 1), (1, 0, 23)]
    expected = other.run(tokens, calls)
    tokens[20, 5] = bad  # in a query
    got = layer.run(tokens, calls)
    assert np.isnan(got[20, :32]).all()
    assert same(np.delete(got, 20, 0), np.delete(expected, 20, 0))
    assert same(got[20, 32:], expected[20, 32:])
    tokens[20, 4 * 32 + 5] = bad  # and in a key, which those behind it see
    got = layer.run(tokens, calls)
    assert same(got[:20], expected[:20])
    assert same(got[20:, 2 * 32 :], expected[20:, 2 * 32 :])  # the other head of keys has none
    with np.errstate(invalid="ignore"):
        assert (np.isnan(got) == np.isnan(layer.expected(tokens, calls))).all()


def test_nothing_outside_the_window_is_seen() -> None:
    layer, other = Layer(window=5), Layer(window=5)
    tokens = layer.tokens(40)
    expected = other.run(tokens, [(0, 0, 40)])
    tokens[20] = np.nan
    got = layer.run(tokens, [(0, 0, 40)])
    assert np.isnan(got[20:25]).all()
    assert same(np.delete(got, slice(20, 25), 0), np.delete(expected, slice(20, 25), 0))


OUT_OF_BOUNDS = [
    [(-1, 0, 3)], [(3, 0, 3)], [(1 << 40, 0, 3)], [(0, -1, 3)], [(0, 94, 3)], [(0, 96, 3)], [(0, 1 << 62, 3)],
    [(0, 0, 0), (1, 0, 3)], [(0, 0, -1), (1, 0, 4)], [(0, 0, 2)], [(0, 0, 4)], [(0, 0, 2), (1, 0, 2)], [],
    [(0, 0, (1 << 63) - 1)], [(0, 0, 1), (0, 0, (1 << 63) - 1), (1, 0, 2)], [(0, 0, -(1 << 63)), (1, 0, 3)],
]  # fmt: skip


@pytest.mark.parametrize("calls", OUT_OF_BOUNDS, ids=str)
def test_calls_out_of_bounds_are_refused_and_nothing_is_written(calls: list[tuple[int, int, int]]) -> None:
    layer = Layer()
    with pytest.raises(Refused, match="RowAttention: calls"):
        layer.run(layer.tokens(3), calls)
    assert np.isnan(layer.whole).all()


def test_positions_behind_the_tables_are_refused() -> None:
    layer = Layer()
    layer.tables = [table[:40].copy() for table in layer.tables]
    layer.run(layer.tokens(40), [(0, 0, 40)])
    with pytest.raises(Refused, match="RowAttention: calls"):
        layer.run(layer.tokens(1), [(0, 40, 1)])


def test_tables_of_no_positions_are_not_taken_for_none() -> None:
    layer, empty = Layer(), np.ones((0, 16), np.float32)
    inputs = dict(zip("qkvKVncs", [*[np.float32] * 5, np.int64, empty, empty], strict=True))
    numbers = {"num_heads": 4, "kv_num_heads": 2, "local_window_size": -1, "scale": layer.scale}
    layer.session, layer.tables = session(node_model("RowAttention", inputs, numbers)), []
    with pytest.raises(Refused, match="RowAttention: calls"):
        layer.run(layer.tokens(3), [(0, 0, 3)])


WRONG = [
    {"q": np.ones((3, 127), np.float32)},
    {"k": np.ones((3, 63), np.float32)},
    {"v": np.ones((2, 64), np.float32)},
    {"n": np.array([[0, 0], [1, 0], [0, 3]])},
    {"c": np.ones((96, 17), np.float32), "s": np.ones((96, 17), np.float32)},
    {"s": np.ones((95, 16), np.float32)},
    {"K": np.ones((3, 1, 96, 32), np.float32)},
    {"K": np.ones((3, 2, 95, 32), np.float32)},
    {"V": np.ones((3, 2, 80, 32), np.float32)},
]


@pytest.mark.parametrize("changed", WRONG, ids=lambda c: f"{[*c]}{next(iter(c.values())).shape}")
def test_shapes_that_do_not_fit_are_refused(changed: dict[str, Array]) -> None:
    layer = Layer()
    with pytest.raises(Refused, match="RowAttention: "):
        layer.run(layer.tokens(3), [(0, 0, 3)], **changed)
    assert np.isnan(layer.whole).all()


@pytest.mark.parametrize("heads", [(0, 1), (1, 0), (-2, 1), (3, 2), (2, 3), ((1 << 60) + 4, 2), (1 << 60, 1 << 60)])
def test_numbers_of_heads_that_cannot_be_are_refused(heads: tuple[int, int]) -> None:
    """Of the two last a token's size is a small number to 64 bits."""
    with pytest.raises(Refused, match="RowAttention: num_heads, kv_num_heads"):
        Layer(heads=heads[0], kv_heads=heads[1])


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_no_tokens_at_all(packed: bool) -> None:
    layer = Layer(packed=packed)
    assert layer.run(layer.tokens(0)[None], []).shape == (1, 0, 4 * 32)


def test_threads_and_sessions_give_the_same_attention() -> None:
    one, two = Layer(heads=14, size=64), Layer(heads=14, size=64, threads=2)
    for calls in ([(0, 0, 50), (1, 0, 9)], [(1, 9, 1), (0, 50, 1)], [(2, 0, 30), (0, 51, 1)]):
        tokens = one.tokens(sum(count for _, _, count in calls))
        assert same(one.run(tokens, calls), two.run(tokens, calls))
        assert all(same(a, b) for a, b in zip(one.whole, two.whole, strict=True))
