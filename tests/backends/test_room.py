"""Where programs run decides how large their tiles are, and what is kept between two loops."""

import jax
import numpy as np

import jaxgrad
from jaxgrad import backends, tiling
from jaxgrad.kernels import attention_tiles


def test_on_a_gpu_a_mean_computes_its_logits_anew(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (24, 8)), jax.random.normal(keys[1], (8, 40))
    labels = jax.random.randint(keys[2], (24,), 0, 40)

    def gradients():
        jax.clear_caches()

        def loss(x, w):
            return jaxgrad.linear_softmax_cross_entropy(x, w, labels, reduction="mean")

        f = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return f.lower(x, w).as_text().count("dot_general"), f(x, w)

    products, due = gradients()
    monkeypatch.setattr(backends, "platform", lambda: "gpu")
    more_products, got = gradients()
    assert (products, more_products) == (3, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), got, due)


def test_a_gpu_attends_with_all_heads_of_a_large_tile_at_once(monkeypatch):
    q = jax.ShapeDtypeStruct((2, 16, 1, 4096, 64), "bfloat16")
    plan = attention_tiles.Plan(q, q, attention_tiles.Band(None, 0))
    assert (plan.batch_step, plan.heads_step, plan.rows, plan.columns) == (1, 1, 512, 1024)
    monkeypatch.setattr(backends, "platform", lambda: "gpu")
    plan = attention_tiles.Plan(q, q, attention_tiles.Band(None, 0))
    assert (plan.batch_step, plan.heads_step, plan.rows, plan.columns) == (2, 16, 1024, 1024)


def test_a_gpu_has_room_for_large_tiles():
    cpu, gpu = (
        tiling.tile_sizes(10**6, 10**6, keeps_logits=False, room=tiling.room(platform))
        for platform in ("cpu", "gpu")
    )
    assert cpu[0] * cpu[1] * 4 <= 4 * 2**20 < gpu[0] * gpu[1] * 4 <= 128 * 2**20
