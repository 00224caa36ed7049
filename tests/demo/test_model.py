"""The model and its optimiser: the same whichever rules are put in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.demo import model, optimiser, rules, text
from jaxgrad.demo.train import cast

SIZES = model.Sizes(vocabulary=11, context=6, dim=8)
WINDOWS = text.windows(np.random.default_rng(0), np.arange(100, dtype=np.int32) % 11, 3, 6)


@pytest.fixture(scope="module")
def params():
    return model.init(np.random.default_rng(1), SIZES)


def value_and_grad(which, params):
    return jax.jit(jax.value_and_grad(lambda p: model.loss(p, WINDOWS, which)))(params)


def test_both_rules_give_one_loss_and_one_gradient(params):
    loss, grads = value_and_grad(rules.JAXGRAD, params)
    plain_loss, plain_grads = value_and_grad(rules.PLAIN, params)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, plain_grads)


def test_no_word_sees_the_ones_after_it(params):
    words = WINDOWS[:1, :-1]
    changed = words.copy()
    changed[0, 4] += 1
    hidden = jax.jit(lambda words: model.hidden(params, words, rules.JAXGRAD)[0])
    a, b = hidden(words), hidden(changed)
    np.testing.assert_array_equal(a[:4], b[:4])
    assert (a[4:] != b[4:]).any(-1).all()


@pytest.mark.parametrize("dim, heads", [(1, 1), (16, 1), (100, 2), (128, 4), (97, 1)])
def test_heads_divide_the_features(dim, heads):
    assert model.Sizes(vocabulary=5, context=4, dim=dim).heads == heads


def test_continuation_never_holds_the_unknown_word(params):
    draw = jax.jit(
        lambda words: model.continuation(params, words, 50, jax.random.key(1), rules.JAXGRAD)
    )
    drawn = draw(WINDOWS[0, :-1])
    assert drawn.shape == (50,)
    assert drawn.min() >= 1
    assert drawn.max() < SIZES.vocabulary


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_is_float32(params, dtype, standard_promotion):
    for which in (rules.JAXGRAD, rules.PLAIN):
        loss = jax.eval_shape(lambda p, w=which: model.loss(cast(p, dtype), WINDOWS, w), params)
        assert loss.dtype == jnp.float32


def test_adamw_without_optax_is_that_of_optax(params, standard_promotion):
    schedule = optimiser.warm_up_and_decay(1e-2, 10)
    theirs, ours = optimiser.adamw(schedule), optimiser.plain_adamw(schedule)
    assert theirs.name == "optax.adamw"
    kept = []
    for adam in (theirs, ours):
        update, moved, state = jax.jit(adam.update), params, adam.init(params)
        for i in range(4):
            grads = jax.tree.map(lambda p, i=i: jnp.sin(p * 50 + i), moved)
            moved, state = update(grads, state, moved)
        kept.append(moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *kept)


def test_schedule_warms_up_then_decays():
    rates = jax.vmap(optimiser.warm_up_and_decay(1.0, 100))(jnp.arange(100))
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert (jnp.diff(rates[10:]) < 0).all()
    np.testing.assert_allclose(rates[-1], 0.1, atol=1e-3)
