"""The Pallas kernels of the fused head, in Pallas's interpreters, against float64."""

import functools

import heads
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import assert_near, truth, with_gradients
from jax.experimental.pallas import tpu as pltpu

from jaxgrad import linear_log_probs, linear_softmax_cross_entropy
from jaxgrad.backends.pallas_tpu import tiles
from jaxgrad.kernels import linear_arguments, linear_schedules
from jaxgrad.kernels.row_rule import Rule

pytestmark = pytest.mark.usefixtures("unoptimised")

T, D, V = 150, 16, 200  # ragged: two tiles of tokens, two of classes
TILE = (128, 128)
fused = functools.partial(
    linear_softmax_cross_entropy, implementation="pallas_interpret", chunk_size=TILE
)


def problem(rng, dtype=jnp.float32, t=T):
    return heads.problem(rng, t, D, V, dtype)


def test_every_option(rng):
    heads.assert_every_option(fused, *problem(rng))


def test_bfloat16_and_a_tied_embedding(rng):
    heads.assert_tied_in_16_bits(fused, *problem(rng, jnp.bfloat16))


def test_ignored_and_unknown_tokens_under_a_mean(rng):
    x, w, _, labels, weights = problem(rng)
    heads.assert_tokens_left_out(fused, x, w, labels, weights)


def test_tokens_in_blocks_where_their_gradient_is_too_large(rng, monkeypatch):
    x, w, bias, labels, bar = problem(rng, t=300)
    monkeypatch.setattr(tiles, "vmem_bytes", lambda: 2**19)
    operands = tiles.Operands(x, w, bias, None, None)
    dtypes = tiles.Gradients(x.dtype, w.dtype, bias.dtype)
    plan, size = tiles.for_gradients(tiles.plan(operands, 1, True), dtypes, TILE)
    assert (plan.tokens, plan.classes) == TILE
    assert size < 300
    f = lambda x, w, bias: (
        -linear_log_probs(x, w, labels, bias, implementation="pallas_interpret", chunk_size=TILE)
    )
    loss, back = with_gradients(f, x, w, bias, bar)
    expected = truth(x, w, bias, labels, bar)
    assert_near((loss, *back), (expected[0], *expected[3:]), 1e-6)


def test_memory_that_nobody_wrote_is_not_read(rng):
    x, w, bias, labels, bar = problem(rng)
    plan, head, tokens, rule, _ = linear_arguments.arguments(
        "test", x, w, labels, bias, None, Rule(), None, -1, None, False, jnp.float32, None, None
    )
    plan = plan._replace(implementation="pallas_tpu", tile=TILE)

    def f(x, w, bias):
        layer = head._replace(w=w, bias=bias)
        return linear_schedules.per_token(plan, layer, tokens._replace(x=x), rule).loss[:, 0]

    interpreter = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    with pltpu.force_tpu_interpret_mode(interpreter):
        loss, back = with_gradients(f, x, w, bias, bar)
    expected = truth(x, w, bias, labels, bar)
    assert_near((loss, *back), (expected[0], *expected[3:]), 1e-6)


@pytest.mark.parametrize(
    "more, why",
    [
        ({"where": np.ones(V, bool)}, "takes no where"),
        ({"chunk_size": 64}, "multiples of 128"),
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


@pytest.mark.parametrize("t, d, v", [(4096, 2048, 131072), (8192, 2304, 256000), (7, 128, 11)])
@pytest.mark.parametrize("mebibytes", [128, 64, 16])
def test_tiles_fit(t, d, v, mebibytes, monkeypatch):
    monkeypatch.setattr(tiles, "vmem_bytes", lambda: mebibytes * 2**20)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    cut = tiles.plan(tiles.Operands(shape((t, d)), shape((d, v)), None, None, None), 1, False)
    dtypes = tiles.Gradients(jnp.bfloat16, jnp.bfloat16, None)
    cut, size = tiles.for_gradients(cut, dtypes, None)
    assert cut.tokens % 128 == cut.classes % 128 == size % cut.tokens == 0 or size == t
    resident = -(-min(size, t) // cut.tokens) * cut.tokens * d * 4
    assert resident + 2 * 2 * d * (cut.tokens + cut.classes) <= tiles.usable()
    if mebibytes == 128:
        assert size >= t  # no float32 gradient of w


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_a_tpu_on_any_machine(dtype):
    device = jax.sharding.AbstractDevice(platform="tpu", device_kind="TPU v5e", num_cores=1)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    labels = jax.ShapeDtypeStruct((1000,), jnp.int32)

    def loss(x, w, bias, labels):
        return linear_softmax_cross_entropy(
            x,
            w,
            labels,
            bias,
            implementation="pallas_tpu",
            return_aux=True,
            reduction="mean",
            label_smoothing=0.1,
            z_loss=0.01,
            temperature=0.7,
            logit_soft_cap=30.0,
        )

    f = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = f.trace(shape((1000, 256)), shape((256, 3000)), shape((3000,)), labels)
        program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("stablehlo.custom_call @tpu_custom_call") == 2
    assert "1000x3000" not in program
