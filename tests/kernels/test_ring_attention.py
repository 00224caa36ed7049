"""Attention by a ring: one device's results, and what is sent from shard to shard."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import P
from meshes import abstract, close, collectives, mesh_of, sends_in_branches

import jaxgrad
from jaxgrad.parallel import ring_attention

pytestmark = pytest.mark.usefixtures("eight_devices", "standard_promotion")

CASES = {
    "causal": ({"is_causal": True}, ("mask", "segments")),
    "window": ({"local_window_size": (3, 1)}, ("bias", "lengths")),
}
TOKENS = P("data", "sequence")
SPECS = {
    **dict.fromkeys(("q", "k", "v", "segments"), TOKENS),
    **dict.fromkeys(("bias", "mask"), P(None, None, "sequence")),
    **dict.fromkeys(("cap", "scale"), P()),
    "lengths": P("data"),
}


def arrays(rng):
    keys = jax.random.split(rng, 6)
    shapes = ((2, 16, 4, 3), (2, 16, 2, 3), (2, 16, 2, 5), (4, 16, 16), (2, 16, 4, 5))
    q, k, v, bias, o_bar = (
        jax.random.normal(key, shape, jnp.float64) for key, shape in zip(keys, shapes, strict=False)
    )
    floats = {"q": q, "k": k, "v": v, "cap": jnp.float64(2.0), "scale": jnp.float64(0.4)}
    more = {
        "bias": bias[None],
        "mask": jax.random.bernoulli(keys[5], 0.8, (1, 1, 16, 16)),
        "lengths": jnp.array([16, 11]),
        "segments": jnp.tile(jnp.arange(16) // 6, (2, 1)),
    }
    return floats, more, o_bar


@pytest.mark.parametrize("case", CASES)
def test_one_device_and_a_ring_agree(x64, unoptimised, rng, case):
    options, names = CASES[case]
    floats, more, o_bar = arrays(rng)
    given = {name: more[name] for name in names}
    floats |= {"bias": given.pop("bias")} if "bias" in given else {}

    def attention(function, a):
        return function(
            *(a[name] for name in ("q", "k", "v")),
            a.get("bias"),
            a.get("mask"),
            scale=a["scale"],
            logits_soft_cap=a["cap"],
            query_seq_lengths=a.get("lengths"),
            key_value_seq_lengths=a.get("lengths"),
            segment_ids=a.get("segments"),
            return_residual=True,
            **options,
        )

    def measured(attention):
        def f(floats):
            o, lse = attention(floats | given)
            return (o * o_bar).sum() + jnp.sin(jnp.where(lse > -1e9, lse, 0)).sum(), (o, lse)

        return jax.jit(jax.value_and_grad(f, has_aux=True)).trace(floats)

    ring = jax.shard_map(
        functools.partial(attention, functools.partial(ring_attention, axis_name="sequence")),
        mesh=mesh_of(data=2, sequence=4),
        in_specs=({name: SPECS[name] for name in floats | given},),
        out_specs=(TOKENS, TOKENS),
    )
    expected = measured(functools.partial(attention, jaxgrad.dot_product_attention))
    found = measured(ring)
    assert not sends_in_branches(found)
    close(*(z.lower().compile()(floats) for z in (found, expected)))


def compiled(**options):
    mesh, tokens = mesh_of(sequence=8), P(None, "sequence")
    ring = functools.partial(ring_attention, axis_name="sequence", **options)
    ring = jax.shard_map(ring, mesh=mesh, in_specs=tokens, out_specs=tokens)
    q = abstract(mesh, (1, 64, 2, 4), tokens)
    return jax.jit(ring).lower(q, q, q).compile()


def test_what_a_ring_sends():
    """Keys and values, from one shard to the next: never the whole sequence."""
    ring = compiled(is_causal=True)
    found = collectives(ring)
    assert {(op, in_loop) for op, _, in_loop in found} == {
        ("collective-permute", False),
        ("collective-permute", True),
    }
    assert {shape for _, shapes, _ in found for shape in shapes} == {"f32[1,2,1,8,4]"}
    assert len(found) == 4
    assert " conditional(" in ring.as_text()  # the steps of later shards are skipped, not masked


def test_what_a_window_sends():
    """The keys and values of the shards that it reaches, once: of eight keys before, one shard."""
    found = collectives(compiled(is_causal=True, local_window_size=8))
    assert found == [("collective-permute", ("f32[1,2,1,8,4]",), False)] * 2


def test_wrong_uses():
    specs = P(None, "sequence")

    def call(queries, keys, cut=(specs, specs, specs), **options):
        ring = functools.partial(ring_attention, axis_name="sequence", **options)
        mapped = jax.shard_map(ring, mesh=mesh_of(sequence=8), in_specs=cut, out_specs=specs)
        k = jnp.zeros((1, keys, 2, 4))
        return jax.eval_shape(mapped, jnp.zeros((1, queries, 2, 4)), k, k)

    with pytest.raises(ValueError, match="ring_attention: key must be as long as query with"):
        call(16, 8, is_causal=True)
    with pytest.raises(ValueError, match=r"ring_attention: bias must broadcast .* \[1, 2, 2, 16\]"):
        call(16, 16, bias=jnp.zeros((16, 16)))
    with pytest.raises(ValueError, match="ring_attention: key must be cut over axis_name='sequ"):
        call(16, 16, cut=(specs, P(), P()))
    with pytest.raises(ValueError, match="ring_attention: axis_name must name an axis"):
        ring_attention(*[jnp.zeros((1, 8, 2, 4))] * 3, axis_name="sequence")
