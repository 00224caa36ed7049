"""Attention against a plain reference, jax.nn, and what its compiled programs hold."""

import functools
import inspect
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.kernels import attention, attention_tiles
from jaxgrad.kernels.attention import dot_product_attention


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 8 queries, so that short sequences have many tiles, ragged and rolled ones."""
    monkeypatch.setattr(attention_tiles, "CPU", attention_tiles.Room(16, 16, area=512))
    monkeypatch.setattr(attention_tiles, "NARROWEST", 4)
    attention._jit.clear_cache()
    yield
    attention._jit.clear_cache()


def seen(
    shape,
    mask=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    segment_ids=None,
):
    queries, keys = shape[2:]
    t, s = np.arange(queries)[:, None], np.arange(keys)[None, :]
    out = np.ones(shape, bool)
    if mask is not None:
        out &= np.asarray(mask)
    if is_causal:
        out &= s <= t
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        out &= (t - left <= s) & (s <= t + right)
    if query_seq_lengths is not None:
        out &= t < np.asarray(query_seq_lengths)[:, None, None, None]
    if key_value_seq_lengths is not None:
        out &= s < np.asarray(key_value_seq_lengths)[:, None, None, None]
    if segment_ids is not None:
        ids, key_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
        out &= (np.asarray(ids)[:, :, None] == np.asarray(key_ids)[:, None, :])[:, None]
    return out


def plain(q, k, v, bias=None, scale=None, cap=None, **masks):
    """Attention with the whole matrix, in the dtype of its arguments; JAX differentiates it."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    z = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    if bias is not None:
        z = z + bias
    where = jnp.asarray(seen(z.shape, **masks))
    z = jnp.where(where, z, -jnp.inf)
    some = (z > -jnp.inf).any(-1, keepdims=True)
    z = jnp.where(some, z, 0)
    lse = jax.nn.logsumexp(z, -1, keepdims=True)
    p = jnp.where(some, jnp.exp(z - lse), 0)
    lse = jnp.where(some, lse, -jnp.inf)[..., 0].transpose(0, 2, 1)
    return jnp.einsum("bnts,bsnh->btnh", p, v), lse


class Case(NamedTuple):
    b: int = 2
    t: int = 37
    s: int = 37
    n: int = 4
    k: int = 2
    bias: tuple | None = None
    mask: tuple | None = None
    scale: bool = False
    cap: bool = False
    causal: bool = False
    window: int | tuple | None = None
    lengths: bool = False
    key_lengths: bool = False
    segments: str | None = None


# Every value of every option meets every value of the others at least in part: wide or broadcast
# bias with and without a cap, bands from all sides, more queries than keys and the reverse.
CASES = [
    Case(),
    Case(causal=True, bias=(2, 4, 37, 37), cap=True, k=4),
    Case(t=21, s=50, causal=True, mask=(1, 1, 21, 50), k=1, scale=True),
    Case(t=50, s=21, causal=True, bias=(1, 4, 1, 21), window=9, lengths=True, k=4),
    Case(b=1, window=(5, 3), segments="one", bias=(1, 1, 37, 1), cap=True),
    Case(t=25, s=41, window=(12, 4), mask=(2, 4, 1, 41), bias=(2, 1, 25, 41), key_lengths=True),
    Case(t=41, s=17, segments="two", lengths=True, key_lengths=True, n=3, k=1, scale=True),
    Case(causal=True, segments="one", cap=True, key_lengths=True, scale=True, n=4, k=1),
    Case(causal=True, window=(6, 2), bias=(1, 1, 1, 1), mask=(3, 1, 37, 1), b=3, n=1, k=1),
    Case(t=1, s=70, bias=(2, 1, 1, 70), key_lengths=True, k=2, cap=True),
    Case(t=19, s=1, causal=True, mask=(1, 4, 1, 1)),
    Case(t=30, s=30, window=(-1, 4), bias=(1, 4, 30, 30), scale=True, k=4),
    Case(t=8, s=16, b=1, n=2, k=2, window=(0, 40), lengths=True, segments="two"),
]


def arguments(case, dtype=jnp.float64, size=5):
    """The arguments that are differentiated, and the options that are not."""
    keys = iter(jax.random.split(jax.random.key(case.t * 100 + case.s), 16))
    normal = lambda shape: jax.random.normal(next(keys), shape, dtype)
    arrays = {
        "q": normal((case.b, case.t, case.n, size)),
        "k": normal((case.b, case.s, case.k, size)),
        "v": normal((case.b, case.s, case.k, size)),
    }
    if case.bias is not None:
        arrays["bias"] = normal(case.bias)
    if case.scale:
        arrays["scale"] = jnp.asarray(0.7, dtype)
    if case.cap:
        arrays["cap"] = jnp.asarray(1.3, dtype)
    options = {}
    if case.causal:
        options["is_causal"] = True
    if case.window is not None:
        options["local_window_size"] = case.window
    if case.mask is not None:
        options["mask"] = jax.random.bernoulli(next(keys), 0.7, case.mask)
    integers = lambda n, high: jax.random.randint(next(keys), (case.b, *n), 0, high, jnp.int32)
    if case.lengths:
        options["query_seq_lengths"] = integers((), case.t + 1)
    if case.key_lengths:
        options["key_value_seq_lengths"] = integers((), case.s + 1)
    if case.segments == "one":
        options["segment_ids"] = jnp.sort(integers((case.t,), 4), 1)
    if case.segments == "two":
        options["segment_ids"] = (integers((case.t,), 4), integers((case.s,), 3))
    return arrays, options


def ours(q, k, v, bias=None, scale=None, cap=None, mask=None, **options):
    return dot_product_attention(
        q, k, v, bias, mask, scale=scale, logits_soft_cap=cap, return_residual=True, **options
    )


def scalar(f, arrays, options):
    """A loss that weighs every entry of output and lse, -inf left out."""
    o, lse = f(**arrays, **options)
    weigh = lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    lse_ = jnp.where(lse == -jnp.inf, 0, lse)
    return (weigh(o) * o).sum() + (weigh(lse) * lse_).sum(), (o, lse)


def close(actual, expected, tolerance, name=""):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    size = np.abs(expected[np.isfinite(expected)]).max(initial=1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size, err_msg=name)


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: (
        "-".join(
            f"{name}={value}".replace(" ", "")
            for name, value in case._asdict().items()
            if value != Case._field_defaults[name]
        )
        or "plain"
    ),
)
@pytest.mark.usefixtures("x64", "small_tiles", "unoptimised")
def test_agrees_with_the_whole_matrix(case, standard_promotion):
    arrays, options = arguments(case)
    for f in (ours, plain):
        loss = functools.partial(scalar, f, options=options)
        (_, out), bars = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        if f is ours:
            actual = out, bars
    close(actual[0][0], out[0], 1e-12, "output")
    close(actual[0][1], out[1], 1e-12, "lse")
    for name in arrays:
        close(actual[1][name], bars[name], 1e-12, name)


JAX_CASES = [
    (jnp.float32, Case(b=1, t=7, s=7, causal=True)),
    (jnp.bfloat16, Case(b=2, t=255, s=257, mask=(1, 1, 255, 257), bias=(1, 4, 1, 257))),
    (jnp.float32, Case(b=1, t=257, s=255, causal=True, scale=True, n=2, k=1)),
    (jnp.float16, Case(b=2, t=40, s=60, window=(8, 3), key_lengths=True, lengths=True)),
    (jnp.float32, Case(b=1, t=1500, s=1500, n=1, k=1, causal=True)),
]


def of_jax(q, k, v, bias=None, scale=None, **options):
    return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, **options)


@pytest.mark.parametrize(
    "dtype, case", JAX_CASES, ids=[f"{d.__name__}-{case.t}x{case.s}" for d, case in JAX_CASES]
)
def test_agrees_with_jax(dtype, case, standard_promotion):
    """Where jax.nn defines the result; its error against float64 is the measure of ours."""
    arrays, options = arguments(case, dtype, size=16)
    if "key_value_seq_lengths" in options:  # a query without a key is where the two differ
        options["key_value_seq_lengths"] = jnp.full(case.b, case.s - 5, jnp.int32)
    where = seen((case.b, case.n, case.t, case.s), **options).any(-1).all(1)
    weight = jnp.asarray(where)[..., None, None] * jnp.cos(jnp.arange(16.0))

    def gradient(f, arrays):
        def loss(arrays):
            o = f(**arrays, **options)
            o = o[0] if isinstance(o, tuple) else o
            return (weight * o.astype(weight.dtype)).sum(), o * jnp.asarray(where)[..., None, None]

        (_, o), bars = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return {"output": o} | bars

    found, theirs = gradient(ours, arrays), {}
    with jax.enable_x64(True):
        true = gradient(plain, jax.tree.map(lambda x: np.asarray(x, np.float64), arrays))
    if dtype != jnp.float16:  # which jax.nn does not differentiate on a CPU
        theirs = gradient(of_jax, arrays)
    eps = float(jnp.finfo(dtype).eps)
    for name in found:
        assert found[name].dtype == dtype
        a, exact = (np.asarray(x[name], np.float64) for x in (found, true))
        size, error_jax = np.abs(exact).max(), 0
        if name == "scale":  # a sum of so much, most of which cancels
            size = np.abs(np.asarray(true["q"]) * np.asarray(arrays["q"], np.float64)).sum()
            size /= np.abs(np.asarray(arrays["scale"], np.float64))
        if theirs:
            b = np.asarray(theirs[name], np.float64)
            error_jax = np.abs(b - exact).max() / size
            assert np.abs(a - b).max() / size <= 8 * eps + 2.5 * error_jax, name
        error = np.abs(a - exact).max() / size
        assert error <= max(8 * eps, 1.5 * error_jax), (name, error, error_jax)


def test_takes_the_arguments_of_jax():
    ours, theirs = (
        inspect.signature(f).parameters.values()
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    described = lambda p: (p.name, p.kind, p.default)
    assert list(map(described, ours))[: len(theirs)] == list(map(described, theirs))
    q = jnp.ones((1, 3, 2, 4))
    near = dot_product_attention(q, q, q, implementation="xla")
    np.testing.assert_array_equal(near, dot_product_attention(q, q, q))
    for other in ("cudnn", "XLA", 1):
        with pytest.raises(ValueError, match="implementation must be None or 'xla'"):
            dot_product_attention(q, q, q, implementation=other)


def test_soft_cap_comes_before_the_bias():
    one = jnp.ones((1, 1, 1, 1))
    bias = jnp.array([[0.0, 3.0]])
    keys = jnp.array([5.0, -5.0])[None, :, None, None]
    f = functools.partial(dot_product_attention, one, keys, keys, bias, scale=1.0)
    _, lse = f(logits_soft_cap=2.0, return_residual=True)
    z = 2 * np.tanh([2.5, -2.5]) + np.array([0, 3])
    np.testing.assert_allclose(lse.ravel(), np.logaddexp(*z), rtol=1e-6)


@pytest.mark.usefixtures("unoptimised")
def test_three_axes_are_one_batch_entry():
    arrays, options = arguments(Case(b=1, t=9, s=9, causal=True), jnp.float32)
    q, k, v = arrays.values()
    o, lse = dot_product_attention(q[0], k[0], v[0], return_residual=True, **options)
    o4, lse4 = dot_product_attention(q, k, v, return_residual=True, **options)
    np.testing.assert_array_equal(o, o4[0])
    np.testing.assert_array_equal(lse, lse4[0])


def test_lengths_of_zero():
    q, k = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 0, 2, 8))
    o, lse = dot_product_attention(q, k, k, return_residual=True)
    assert (o == 0).all()
    assert (lse == -jnp.inf).all()
    bars = jax.grad(lambda *x: dot_product_attention(*x).sum(), argnums=(0, 1, 2))(q, k, k)
    assert (bars[0] == 0).all()
    assert dot_product_attention(q[:, :0], q, q).shape == (2, 0, 4, 8)
    assert dot_product_attention(q[:0], q[:0], q[:0], is_causal=True).shape == (0, 3, 4, 8)


def test_value_may_have_a_size_of_its_own():
    q, v = jnp.ones((2, 3, 4, 8)), jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    o = dot_product_attention(q, q, v)
    np.testing.assert_allclose(o, jnp.broadcast_to(v.mean(1, keepdims=True), o.shape), rtol=1e-6)


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("how", ["mask", "bias", "window", "lengths"])
def test_query_that_sees_no_key_gives_zero(how):
    q = np.random.default_rng(0).standard_normal((1, 6, 2, 4), np.float32)
    row = (np.arange(6) == 3)[:, None]
    options = {
        "mask": {"mask": ~row},
        "bias": {"bias": np.where(row, -np.inf, np.float32(0))},
        "window": {"local_window_size": (-3, 6)},
        "lengths": {"query_seq_lengths": np.array([3])},
    }[how]

    def f(q, k, v):
        o, lse = dot_product_attention(q, k, v, return_residual=True, **options)
        return o.sum(), (o, lse)

    with jax.debug_nans(True):
        (_, (o, lse)), bars = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, q, q)
    assert (o[:, 3] == 0).all()
    assert (lse[:, 3] == -jnp.inf).all()
    assert (bars[0][:, 3] == 0).all()
    assert all(np.isfinite(bar).all() for bar in bars)
    assert (o[:, 2] != 0).all()


@pytest.mark.usefixtures("unoptimised")
def test_infinite_bias_is_a_mask():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 20, 2, 4), np.float32)
    mask = (rng.random((20, 20)) < 0.6) | np.eye(20, dtype=bool)

    @jax.jit
    def gradients(q, bias, mask):
        def f(q, bias, mask, cap):
            return dot_product_attention(q, q, q, bias, mask, logits_soft_cap=cap).sum()

        return [jax.value_and_grad(f, (0, 1))(q, bias, mask, cap) for cap in (None, 2.0)]

    by_bias = gradients(q, np.where(mask, np.float32(0), -np.inf), None)
    by_mask = gradients(q, np.zeros((20, 20), np.float32), mask)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, by_bias, by_mask)
    for _, (_, bias_bar) in by_bias:
        assert (bias_bar[~mask] == 0).all()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_huge_logits(dtype, size):
    column = lambda *x: jnp.asarray(
        np.pad(np.float64(x)[None, :, None, None], [(0, 0)] * 3 + [(0, size - 1)]), dtype
    )
    q, k, v = column(1e10, -1e10), column(1e10, 2e10, -3e10), column(0, 1, 2)
    f = lambda q, k, v: dot_product_attention(q, k, v, scale=0.7, return_residual=True)
    (o, lse), back = jax.vjp(f, q, k, v)
    np.testing.assert_array_equal(o[0, :, 0, 0].astype(jnp.float32), [1, 2])
    np.testing.assert_allclose(lse.ravel(), [1.4e20, 2.1e20], rtol=1e-2)
    bars = back((jnp.ones_like(o), jnp.zeros_like(lse)))
    assert all(jnp.isfinite(bar).all() for bar in bars)


@pytest.mark.usefixtures("x64")
def test_common_shift_of_the_logits_costs_no_digits():
    q = np.random.default_rng(0).standard_normal((1, 12, 2, 4), np.float32)
    shift = np.full((1, 1, 1, 1), 1024, np.float32)
    z = np.round(1024 * q) / 1024  # so that the shift rounds few logits

    @jax.jit
    def slopes(q):
        ours = lambda q: (dot_product_attention(q, q, q, shift) * jnp.cos(q)).sum()
        exact = lambda q: (plain(q, q, q)[0] * jnp.cos(q)).sum()
        return jax.grad(ours)(q), jax.grad(exact)(q.astype(jnp.float64))

    bar, exact = slopes(z)
    rounding = 1024 * float(jnp.finfo(jnp.float32).eps)
    close(bar, exact, rounding)


def shapes(text):
    """Every array in the text of a compiled program."""
    found = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", text)
    return [tuple(map(int, dims.split(","))) for dims in found]


def compiled(f, t, dtype=jnp.float32, heads=2):
    x = jax.ShapeDtypeStruct((1, t, heads, 16), dtype)
    return jax.jit(f).lower(x, x, x).compile()


def loss(q, k, v, **options):
    return dot_product_attention(q, k, v, **options).astype(jnp.float32).sum()


@pytest.mark.usefixtures("unoptimised")  # to the byte the memory is that of optimised programs
@pytest.mark.parametrize("order, options", [(1, {}), (2, {"is_causal": True})])
def test_memory_is_linear(order, options):
    """Of the gradient, which holds the forward pass, and of the second order, which holds both."""
    gradient = jax.grad(functools.partial(loss, **options), argnums=(0, 1, 2))

    def second(q, k, v):
        return jax.grad(lambda q: sum((x**2).sum() for x in gradient(q, k, v)))(q)

    f = gradient if order == 1 else second
    lengths = (2048, 4096)
    programs = [compiled(f, t) for t in lengths]
    for program, t in zip(programs, lengths, strict=True):
        arrays = shapes(program.as_text())
        assert (1, t, 2, 16) in arrays
        assert max(map(math.prod, arrays)) < t * t / 2
    temp = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert temp[1] <= 2.2 * temp[0], temp


def visited(queries, keys, group, left, right):
    """How many times each entry of the logits is computed."""
    band = attention_tiles.Band(left, right)
    rows, width, columns = attention_tiles.lengths(queries, keys, group, band)
    grid = np.zeros((queries, keys), int)
    for first in range(0, queries, rows):
        low = int(attention_tiles.first_key(min(first, queries - rows), width, keys, band))
        for key in range(0, width, columns):
            starts = (min(first, queries - rows), low + min(key, width - columns))
            sizes = (1, 1, group, rows, columns)
            if attention_tiles.Tile((0, 0, 0, *starts), sizes, None, None).meets(band):
                grid[first : first + rows, low + key : low + min(key + columns, width)] += 1
    return grid


@pytest.mark.parametrize("band", [(None, None), (None, 0), (0, None), (3, 5), (-2, 9), (40, -3)])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 300), (300, 7), (257, 255), (1500, 1500)])
def test_tiles_cover_what_a_query_sees(band, sizes):
    queries, keys = sizes
    left, right = (keys if side is None else side for side in band)
    left = queries if band[0] is None else left
    t, s = np.arange(queries)[:, None], np.arange(keys)[None]
    grid = visited(queries, keys, 3, *band)
    assert grid.max(initial=0) <= 1
    assert grid[(t - left <= s) & (s <= t + right)].all()


def test_hidden_tiles_are_not_computed():
    share = lambda *band: visited(4096, 4096, 1, *band).mean()
    assert share(None, None) == 1
    assert share(None, 0) <= 0.5 + 1 / 8
    assert share(0, None) <= 0.5 + 1 / 8
    assert share(256, 0) <= 2 * 256 / 4096
    assert share(100, 100) <= 2 * 200 / 4096
    branches = lambda **options: str(
        jax.make_jaxpr(functools.partial(loss, **options))(*jnp.ones((3, 1, 16, 1, 8)))
    ).count("cond[")
    assert (branches(), branches(is_causal=True)) == (0, 1)


@pytest.mark.usefixtures("x64", "small_tiles", "unoptimised")
def test_derivatives_of_second_order(standard_promotion):
    case = Case(b=1, t=19, s=17, n=2, k=1, bias=(1, 2, 19, 17), cap=True, scale=True, window=(9, 4))
    arrays, options = arguments(case, size=3)
    f = lambda arrays: scalar(ours, arrays, options)[0]
    direction = jax.tree.map(lambda x: jnp.sin(3 * x), arrays)

    def product(f):
        slope = lambda arrays: sum(
            jax.tree.leaves(
                jax.tree.map(lambda a, b: (a * b).sum(), jax.grad(f)(arrays), direction)
            )
        )
        return jax.jit(jax.grad(slope))(arrays)

    actual = product(f)
    expected = product(lambda arrays: scalar(plain, arrays, options)[0])
    for name in arrays:
        close(actual[name], expected[name], 1e-11, name)
    forward = jax.jit(lambda x, y: jax.jvp(jax.grad(f), (x,), (y,))[1])(arrays, direction)
    for name in arrays:
        close(forward[name], expected[name], 1e-11, name)


@pytest.mark.usefixtures("x64", "small_tiles", "unoptimised")
@pytest.mark.parametrize("size", [3, 0])
def test_hessian(size, monkeypatch):
    """By all arguments at once, over two tiles of keys; at 0 the maxima of both are the same."""
    monkeypatch.setattr(attention_tiles, "CPU", attention_tiles.Room(2, 2, area=8))
    x = size * jax.random.normal(jax.random.key(0), (3, 1, 3, 1, 2))
    x = x.at[2].add(jnp.arange(6.0).reshape(1, 3, 1, 2))
    square = lambda f: lambda x: (f(*x, is_causal=True) ** 2).sum()
    actual, expected = (
        jax.jit(lambda x, f=f: (jax.hessian(f)(x), jax.jacrev(f)(x)))(x)
        for f in (square(dot_product_attention), square(lambda *x, **o: plain(*x, **o)[0]))
    )
    close(actual[0], expected[0], 1e-11)
    close(actual[1], expected[1], 1e-12)


@pytest.mark.usefixtures("small_tiles", "unoptimised")
def test_transforms():
    arrays, _ = arguments(Case(b=3, t=20, s=20, n=2, k=1), jnp.float32)
    q, k, v = arrays.values()
    f = functools.partial(dot_product_attention, is_causal=True)

    def slope(f, q):
        return jax.grad(lambda q: (f(q) ** 2).sum())(q)

    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    expected = jax.jit(lambda q, k, v: slope(lambda q: f(q, k, v), q))(q, k, v)
    shared = jax.jit(lambda q: slope(lambda q: f(q, k[0], v[:1].repeat(3, 0)[0]), q[1]))(q)

    @jax.jit
    def transformed(q, taken):
        scanned = lambda q: jax.lax.scan(lambda c, x: (c, f(*x)), 0.0, (q, k, v))[1]
        branch = lambda q: jax.lax.cond(taken, lambda q: f(q, k, v), jnp.zeros_like, q)
        one = lambda q, v: slope(lambda q: f(q, k[0], v), q)
        return {
            "vmap": jax.vmap(lambda *x: slope(lambda q: f(q, *x[1:]), x[0]))(q, k, v),
            "scan": slope(scanned, q),
            "cond": slope(branch, q),
            "checkpoint": slope(jax.checkpoint(lambda q: f(q, k, v)), q),
        }, jax.vmap(one, in_axes=(2, None), out_axes=2)(jnp.moveaxis(q, 0, 2), v[0])[:, :, 1]

    found, mixed = transformed(q, True)
    for name, bar in found.items():
        near(bar, expected, err_msg=name)
    near(mixed, shared, err_msg="vmap with mixed axes")
    step = jax.jit(lambda q, k, v: q - slope(lambda q: f(q, k, v), q), donate_argnums=0)
    exported = jax.export.export(step)(q, k, v)
    near(jax.export.deserialize(exported.serialize()).call(q, k, v), q - expected)
    donated = jnp.copy(q)
    with jax.checking_leaks(), jax.debug_nans(True):
        near(step(donated, k, v), q - expected)
    assert donated.is_deleted()


@pytest.mark.usefixtures("x64", "unoptimised", "standard_promotion")
def test_shard_map_over_batch_and_heads():
    """Every cotangent is summed over the devices that share its argument, and over no other."""
    if jax.device_count() < 4:
        pytest.skip("a mesh of four devices needs as many")
    case = Case(b=4, t=10, s=10, k=2, bias=(1, 4, 10, 10), cap=True, causal=True)
    arrays, options = arguments(case, size=4)
    rows, heads = jax.P("rows", None, "heads"), jax.P(None, "heads")
    specs = {"q": rows, "k": rows, "v": rows, "bias": heads, "cap": jax.P()}

    def gradient(f):
        return jax.jit(jax.value_and_grad(lambda arrays: scalar(f, arrays, {}), has_aux=True))

    f = functools.partial(ours, **options)
    expected = gradient(f)(arrays)
    for kind in jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit:
        mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(kind, kind))
        inside = jax.shard_map(
            lambda arrays: f(**arrays), mesh=mesh, in_specs=(specs,), out_specs=(rows, rows)
        )
        placed = {
            n: jax.device_put(x, jax.NamedSharding(mesh, specs[n])) for n, x in arrays.items()
        }
        found = gradient(lambda f=inside, **arrays: f(arrays))(placed)
        jax.tree.map(lambda x, y: close(x, y, 1e-12), found, expected)


def test_residuals_hold_no_matrix():
    q = jnp.ones((1, 300, 2, 8))
    kept = jax.tree.leaves(jax.vjp(dot_product_attention, q, q, q)[1])
    assert sum(x.size for x in kept) <= 4 * q.size + 2 * 600 + 1


def test_remat_policy_keeps_the_residuals():
    policy = jax.checkpoint_policies.save_only_these_names("dot_product_attention")
    q = jnp.ones((1, 16, 2, 8))

    def products(**options):
        f = jax.checkpoint(lambda q: dot_product_attention(q, q, q).sum(), **options)
        return str(jax.make_jaxpr(jax.grad(f))(q)).count("dot_general")

    assert products(policy=policy) == products() - 2


@pytest.mark.parametrize(
    ("error", "says", "change"),
    [
        (ValueError, "query must be", {"query": np.ones((4, 8))}),
        (ValueError, "key must be .2, S, K, 8.", {"key": np.ones((1, 5, 2, 8))}),
        (ValueError, "value must be .2, 5, 2, D.", {"value": np.ones((2, 6, 2, 8))}),
        (ValueError, "the heads of query must be a multiple", {"query": np.ones((2, 4, 3, 8))}),
        (
            TypeError,
            "key must have the dtype of query",
            {"key": np.ones((2, 5, 2, 8), jnp.bfloat16)},
        ),
        (TypeError, "query must be real", {"query": np.ones((2, 4, 4, 8), complex)}),
        (ValueError, "bias must broadcast to", {"bias": np.ones((2, 4, 4, 4))}),
        (TypeError, "mask must be bool", {"mask": np.ones((4, 5))}),
        (ValueError, "mask must broadcast to", {"mask": np.ones((3, 1, 1, 1), bool)}),
        (ValueError, "scale must be a scalar", {"scale": np.ones(2)}),
        (ValueError, "logits_soft_cap must be above 0", {"logits_soft_cap": 0}),
        (ValueError, "local_window_size must be", {"local_window_size": (1, 2, 3)}),
        (TypeError, "query_seq_lengths must be integer", {"query_seq_lengths": np.ones(2)}),
        (
            ValueError,
            r"key_value_seq_lengths must be int\[2\]",
            {"key_value_seq_lengths": np.ones(3, int)},
        ),
        (ValueError, "segment_ids of the keys", {"segment_ids": np.ones((2, 4), int)}),
    ],
)
def test_errors_name_the_argument(error, says, change):
    given = {
        "query": np.ones((2, 4, 4, 8)),
        "key": np.ones((2, 5, 2, 8)),
        "value": np.ones((2, 5, 2, 8)),
    }
    with pytest.raises(error, match=f"^dot_product_attention: {says}"):
        dot_product_attention(**given | change)
