"""A training step as large models take it: parameters cut over data (FSDP) and model (TP)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import NamedSharding, P
from jax.sharding import AxisType
from meshes import collectives, mesh_of

import jaxgrad
from jaxgrad.parallel import sharded

pytestmark = pytest.mark.usefixtures("eight_devices", "standard_promotion")

BATCH, CONTEXT, D, HEADS, V = 4, 8, 8, 4, 32
SPECS = {
    "embedding": P("model", "data"),
    "qkv": P("data", None, "model"),
    "out": P("model", None, "data"),
    "up": P("data", "model"),
    "down": P("model", "data"),
}
SHAPES = {
    "embedding": (V, D),
    "qkv": (D, 3, HEADS, D // HEADS),
    "out": (HEADS, D // HEADS, D),
    "up": (D, 4 * D),
    "down": (4 * D, D),
}
ADAM = optax.adamw(1e-2)


def normal(x):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def block(params, words):
    x = params["embedding"][words]
    q, k, v = jnp.moveaxis(jnp.einsum("bsd,dcnh->bscnh", normal(x), params["qkv"]), 2, 0)
    o = jaxgrad.dot_product_attention(q, k, v, is_causal=True)
    x += jnp.einsum("bsnh,nhd->bsd", o, params["out"])
    return normal(x + jaxgrad.tanh(normal(x) @ params["up"]) @ params["down"])


def step(block, head, params, state, words):
    def loss(params):
        x = block(params, words[:, :-1])
        options = {"vocab_axis": 0, "reduction": "mean", "z_loss": 1e-3, "chunk_size": (8, 4)}
        return head(x, params["embedding"], words[:, 1:], **options)

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = ADAM.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def losses(step, params, state, batches):
    values = []
    for words in batches:
        params, state, value = step(params, state, words)
        values.append(float(value))
    return params, values


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_losses_are_those_of_one_device(x64, unoptimised, kind):
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape) / 2 for name, shape in SHAPES.items()}
    batches = rng.integers(0, V, (3, BATCH, CONTEXT + 1))
    head = jaxgrad.linear_softmax_cross_entropy
    alone = jax.jit(functools.partial(step, block, head))
    _, expected = losses(alone, params, ADAM.init(params), batches)

    mesh = mesh_of(kind, data=2, model=4)
    axes = {"batch_axes": "data", "vocab_axis_name": "model", "fsdp_axis": "data"}
    of_layers = block
    if kind == AxisType.Explicit:  # JAX would ask of each product in it how its result is cut
        of_layers = jax.sharding.auto_axes(block, out_sharding=P("data"))
    with jax.set_mesh(mesh):
        shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
        params = jax.device_put(params, shardings)
        state = ADAM.init(params)
        kept = optax.tree_utils.tree_map_params(
            ADAM,
            lambda _, sharding: sharding,
            state,
            shardings,
            transform_non_params=lambda _: NamedSharding(mesh, P()),
        )
        state = jax.device_put(state, kept)
        batches = jax.device_put(batches, NamedSharding(mesh, P(None, "data")))
        on_mesh = functools.partial(step, of_layers, sharded(head, **axes))
        on_mesh = jax.jit(on_mesh, out_shardings=(shardings, kept, None))
        program = on_mesh.lower(params, state, batches[0]).compile()
        params, found = losses(program, params, state, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    assert {name: z.sharding.spec for name, z in params.items()} == SPECS
    in_loops = {op for op, _, in_loop in collectives(program) if in_loop}
    assert {"all-gather", "reduce-scatter"} <= in_loops  # the embedding, by tiles
