"""The Pallas kernels of the fused head for GPU, in Pallas's interpreter, against float64."""

import functools

import heads
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import assert_near, truth, with_gradients

from jaxgrad import linear_log_probs, linear_softmax_cross_entropy
from jaxgrad.backends.pallas_gpu import attention_blocks, tiles

pytestmark = pytest.mark.usefixtures("unoptimised")

T, D, V = 40, 40, 150  # ragged: three tiles of tokens, two chunks of features, five of classes
TILE = (16, 32)
fused = functools.partial(
    linear_softmax_cross_entropy, implementation="pallas_gpu_interpret", chunk_size=TILE
)


@pytest.fixture
def small(monkeypatch):
    """Chunks, parts, ranges and blocks, and not one of each."""
    smaller = tiles.LARGEST_ELSEWHERE._replace(feature_bytes=64, parts=2)
    monkeypatch.setattr(tiles, "LARGEST_ELSEWHERE", smaller)
    monkeypatch.setattr(tiles, "BLOCK_BYTES", 70 * T * 4)


def problem(rng, dtype=jnp.float32):
    return heads.problem(rng, T, D, V, dtype)


def on(gpu):
    device = jax.sharding.AbstractDevice(platform="gpu", device_kind=gpu, num_cores=None)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_every_option(rng, small):
    heads.assert_every_option(fused, *problem(rng))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_and_a_tied_embedding(dtype, rng):
    heads.assert_tied_in_16_bits(fused, *problem(rng, dtype))


def test_ignored_and_unknown_tokens_under_a_mean(rng):
    x, w, _, labels, weights = problem(rng)
    heads.assert_tokens_left_out(fused, x, w, labels, weights)


def test_log_probs_by_a_tile_that_holds_all(rng):
    x, w, bias, labels, bar = problem(rng)
    f = lambda *z: -linear_log_probs(*z[:2], labels, z[2], implementation="pallas_gpu_interpret")
    loss, back = with_gradients(f, x, w, bias, bar)
    expected = truth(x, w, bias, labels, bar)
    assert_near((loss, *back), (expected[0], *expected[3:]), 1e-6)


@pytest.mark.parametrize(
    "more, why",
    [
        ({"where": np.ones(V, bool)}, "takes no where"),
        ({"chunk_size": (16, 48)}, "powers of two from 16 on, got"),
        ({"chunk_size": 64}, "powers of two"),
        ({"accumulate_dtype": jnp.bfloat16}, "accumulate_dtype=float32"),
        ({"labels": np.ones((T, V), np.float32)}, "integer labels"),
    ],
)
def test_what_it_does_not_do_is_refused(more, why, rng):
    x, w, bias, labels, _ = problem(rng)
    with pytest.raises(NotImplementedError, match=why):
        fused(x, w, **{"labels": labels, "bias": bias} | more)


def test_derivatives_that_it_does_not_have_are_refused(rng):
    x, w, _, labels, _ = problem(rng)
    heads.assert_derivatives_refused(fused, x, w, labels)


def plan(name, t, d, v):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    operands = tiles.Operands(shape((t, d)), shape((d, v)), None, None, None)
    return tiles.plan(name, operands, 1, None)


@pytest.mark.parametrize("t, d, v", [(4096, 2048, 131072), (20, 50, 11), (300, 8, 50257)])
@pytest.mark.parametrize("name", tiles.LARGEST)
@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
def test_tiles_are_as_triton_wants_them(gpu, name, t, d, v):
    with on(gpu):
        cut = plan(name, t, d, v)
    sides = (cut.tokens, cut.classes // cut.parts, cut.features)
    assert all(size >= 16 and size & (size - 1) == 0 for size in sides)
    rows, columns = cut.tiles
    assert rows * cut.splits <= 2 * tiles.PROGRAMS and cut.splits <= columns
    block = tiles.block(t, 2, cut.classes)
    assert block % cut.classes == 0 and block * t * 2 <= tiles.BLOCK_BYTES


@pytest.mark.parametrize(
    "gpu, classes, queries",
    [("NVIDIA H100 80GB HBM3", 256, 128), ("NVIDIA H200", 256, 128), ("NVIDIA A100", 128, 64)],
)
def test_sizes_that_were_timed_are_for_their_chip(gpu, classes, queries):
    x = jax.ShapeDtypeStruct((2, 4096, 8, 1, 128), jnp.bfloat16)
    with on(gpu):
        assert plan("bars", 4096, 2048, 131072).classes == classes
        assert attention_blocks.cut("of_queries", x, x).queries == queries


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_a_gpu_on_any_machine(dtype, platform):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    t, d, v = 4000, 256, 100_000
    labels = jax.ShapeDtypeStruct((t,), jnp.int32)

    def loss(x, w, bias, labels):
        return linear_softmax_cross_entropy(
            x,
            w,
            labels,
            bias,
            implementation="pallas_gpu",
            return_aux=True,
            reduction="mean",
            label_smoothing=0.1,
            z_loss=0.01,
            temperature=0.7,
            logit_soft_cap=30.0,
        )

    f = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    with on("NVIDIA H100 80GB HBM3"):
        traced = f.trace(shape((t, d)), shape((d, v)), shape((v,)), labels)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.custom_call @__gpu$xla.gpu.triton") in (2, 3)
    assert f"{t}x{v}" not in program
