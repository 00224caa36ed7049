"""The Pallas kernels of attention for GPU, in Pallas's interpreter, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_truth import assert_near, problem, truth, with_gradients

from jaxgrad import backends, dot_product_attention, forward_mode, tiling
from jaxgrad.backends.pallas_gpu import attention as pallas_gpu
from jaxgrad.backends.pallas_gpu import attention_blocks as blocks
from jaxgrad.kernels import attention, attention_pallas

pytestmark = pytest.mark.usefixtures("unoptimised")

interpreted = functools.partial(dot_product_attention, implementation="pallas_gpu_interpret")
both = functools.partial(interpreted, return_residual=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of which short sequences have several, ragged ones and such as need no mask."""
    monkeypatch.setattr(blocks, "cut", lambda *_: blocks.Cut(32, 16, 4, 2))


def test_causal_groups_and_heads_that_are_no_power_of_two(rng):
    given = problem(rng, t=70, s=84, h=20, d=5)
    out = with_gradients(functools.partial(both, is_causal=True), *given)
    assert_near(out, truth(*given, np.tri(70, 84, dtype=bool)), 1e-6)


def test_window_lengths_soft_cap_and_scale(rng):
    given = problem(rng, b=3, t=90, s=64, n=2, k=2)
    ends, key_ends = np.array([90, 40, 0]), np.array([50, 64, 3])
    options = {"local_window_size": (40, 10), "logits_soft_cap": 2.0, "scale": 0.3}
    options |= {"query_seq_lengths": ends, "key_value_seq_lengths": key_ends}
    t, s = np.arange(90)[:, None], np.arange(64)
    seen = (t - 40 <= s) & (s <= t + 10)
    seen = seen & (t < ends[:, None, None, None]) & (s < key_ends[:, None, None, None])
    out = with_gradients(functools.partial(both, **options), *given)
    assert_near(out, truth(*given, seen, cap=2.0, scale=0.3), 1e-6)
    assert (out[0][1, 40:] == 0).all() and (out[2][1, 40:] == 0).all()
    assert (out[3][2] == 0).all() and (out[4][2] == 0).all()


def test_bias_mask_and_segments(rng):
    given = problem(rng, t=33, s=48, n=4, k=1)
    bias = np.asarray(jax.random.normal(rng, (4, 33, 1)))
    mask = (
        np.asarray(jax.random.bernoulli(rng, 0.7, (2, 1, 33, 48))) & (np.arange(33) != 5)[:, None]
    )
    ids, key_ids = np.arange(66).reshape(2, 33) // 20, np.arange(96).reshape(2, 48) // 30
    segments = {"mask": mask, "segment_ids": (ids, key_ids)}
    seen = mask & (ids[:, None, :, None] == key_ids[:, None, None, :])
    out = with_gradients(functools.partial(both, bias=bias, **segments), *given)
    assert_near(out, truth(*given, seen, bias=bias), 1e-6)


def test_bfloat16(rng):
    given = problem(rng, "bfloat16", b=1, t=64, s=64, n=2, k=1)
    out = with_gradients(functools.partial(both, local_window_size=(40, 20)), *given)
    assert [x.dtype for x in out] == ["bfloat16", "float32", *["bfloat16"] * 3]
    t, s = np.arange(64)[:, None], np.arange(64)
    assert_near(out, truth(*given, (t - 40 <= s) & (s <= t + 20)), 4e-3)


def test_huge_logits(rng):
    column = lambda *x: jnp.pad(jnp.array(x)[None, :, None, None], [(0, 0)] * 3 + [(0, 1)])
    q, k, v = column(1e10, -1e10), column(1e10, 2e10, -3e10), column(0.0, 1, 2)
    bars = jnp.ones_like(q), jnp.zeros((1, 2, 1))
    o, lse, *gradients = with_gradients(functools.partial(both, scale=0.7), q, k, v, *bars)
    np.testing.assert_array_equal(o[0, :, 0, 0], [1, 2])
    np.testing.assert_allclose(lse.ravel(), [1.4e20, 2.1e20], rtol=1e-6)
    assert all(jnp.isfinite(z).all() for z in gradients)


@pytest.mark.parametrize(
    "left, right", [(None, None), (None, 0), (7, 3), (-9, 12), (30, -8), (0, 0)]
)
def test_a_block_visits_what_it_sees(left, right):
    t, s, rows, columns = 70, 84, 16, 8
    at, keys = np.arange(t)[:, None], np.arange(s)
    before = np.inf if left is None else left
    after = np.inf if right is None else right
    seen = (at - before <= keys) & (keys <= at + after)
    for i in range(-(-t // rows)):
        own = blocks.side(i, rows, t)
        span = blocks.span(own, None, columns, s, None, (left, right), False)
        first, all_first, all_last, last = map(int, span[:4])
        here = np.pad(seen[own.first : own.first + rows], ((0, 0), (0, -s % columns)))
        tiles = here.reshape(len(here), -1, columns).swapaxes(0, 1)
        some = np.flatnonzero(tiles.any((1, 2)))
        visited = np.arange(first, last)
        np.testing.assert_array_equal(
            visited, np.arange(some[0], some[-1] + 1) if len(some) else []
        )
        assert tiles[all_first:all_last].all()


@pytest.mark.parametrize(
    "dtype, width, options, why",
    [
        ("float64", 16, {}, "takes float32, bfloat16 and float16 alone, got float64"),
        ("float32", 300, {}, "takes heads of at most 256, got 300"),
        ("float32", 0, {}, "takes no array of size 0"),
    ],
)
@pytest.mark.usefixtures("x64")
def test_what_it_does_not_do_is_refused(dtype, width, options, why):
    q = jnp.ones((1, 3, 2, width), dtype)
    with pytest.raises(NotImplementedError, match=f"'pallas_gpu_interpret' {why}"):
        interpreted(q, q, q, **options)


def test_derivatives_that_it_does_not_have_are_refused(rng):
    q = problem(rng)[0]
    loss = lambda q, scale: interpreted(q, q, q, scale=scale).sum()
    with pytest.raises(NotImplementedError, match="no gradient for bias, scale"):
        jax.eval_shape(jax.grad(loss, 1), q, 1.0)
    with pytest.raises(NotImplementedError, match="second derivative"):
        jax.eval_shape(jax.grad(lambda q: jax.grad(loss)(q, 1.0).sum()), q)
    with pytest.raises(NotImplementedError, match="'pallas_gpu' needs a GPU, got cpu"):
        dot_product_attention(q, q, q, implementation="pallas_gpu")


@pytest.fixture
def as_default(monkeypatch):
    """The kernels chosen unasked, and the interpreter in place of the GPU."""
    monkeypatch.setattr(backends, "device", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(attention_pallas, "_backend", lambda _: (pallas_gpu, True))
    monkeypatch.setattr(attention_pallas, "_where_it_runs", lambda kernel, loops: kernel)
    calls = []
    forward, backward = pallas_gpu.forward, pallas_gpu.backward
    monkeypatch.setattr(pallas_gpu, "forward", lambda *x: calls.append(forward) or forward(*x))
    monkeypatch.setattr(pallas_gpu, "backward", lambda *x: calls.append(backward) or backward(*x))
    attention._jit.clear_cache()
    yield calls
    attention._jit.clear_cache()


def test_unasked_it_has_every_derivative(rng, as_default):
    q, k, v, o_bar, _ = problem(rng, "bfloat16", b=1, t=20, s=20, n=2, k=1)
    terms = (jnp.ones((20, 20)).at[3].set(2.0), jnp.float32(0.6), jnp.float32(2.0))

    def loss(implementation, q, k, v, bias, scale, cap):
        options = {"scale": scale, "logits_soft_cap": cap, "implementation": implementation}
        o = dot_product_attention(q, k, v, bias, is_causal=True, **options)
        return (o * o_bar).astype(jnp.float32).sum()

    def derivatives(implementation):
        first = jax.grad(functools.partial(loss, implementation), tuple(range(6)))
        x = (q, k, v, *terms)
        return jax.jit(lambda *x: jax.jvp(first, x, jax.tree.map(jnp.cos, x)))(*x)

    actual = jax.tree.leaves(derivatives(None))
    assert len(set(as_default)) == 2
    for a, e in zip(actual, jax.tree.leaves(derivatives("xla")), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.linalg.norm(a - e) <= 1e-2 * np.linalg.norm(e)


def test_unasked_under_vmap_and_where_it_cannot(rng, as_default):
    q, k, v, *bars = problem(rng, "bfloat16", b=2, t=20, s=20, n=2, k=1)
    f = functools.partial(dot_product_attention, is_causal=True, return_residual=True)
    mapped = jax.vmap(lambda *x: f(*x))
    out = with_gradients(mapped, q, k, v, *bars)
    assert_near(out, truth(q, k, v, *bars, np.tri(20, dtype=bool)), 4e-3)
    assert as_default
    as_default.clear()
    jax.eval_shape(forward_mode.dot_product_attention, q, k, v)
    jax.eval_shape(f, q, k, v[..., :0])
    jax.eval_shape(f, *(z.astype(jnp.float32) for z in (q, k, v)))
    assert not as_default


def test_on_another_platform_the_loops_run(rng, monkeypatch):
    monkeypatch.setattr(backends, "device", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tiling, "_cpu_flags", frozenset)  # which then round no factor
    attention._jit.clear_cache()
    q, k, v, *bars = problem(rng, "bfloat16", b=1, t=20, s=20, n=2, k=1)
    f = functools.partial(dot_product_attention, return_residual=True)
    out = with_gradients(f, q, k, v, *bars)
    assert_near(out, truth(q, k, v, *bars), 4e-3)
    attention._jit.clear_cache()


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_lowers_for_a_gpu_on_any_machine(platform):
    device = jax.sharding.AbstractDevice(platform="gpu", device_kind="", num_cores=None)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    q, k = (jax.ShapeDtypeStruct((2, t, n, 96), jnp.bfloat16) for t, n in ((1000, 4), (3000, 2)))
    ids = [jax.ShapeDtypeStruct((2, t), jnp.int32) for t in (1000, 3000)]

    def loss(q, k, v, ids):
        options = {"segment_ids": ids, "is_causal": True, "logits_soft_cap": 30.0}
        return dot_product_attention(q, k, v, implementation="pallas_gpu", **options).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, tuple(ids))
        program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.custom_call @") == 3
    assert "1000x3000" not in program
