"""The fused head in forward mode: the plain formula's derivatives, without the logits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import PLAIN, check_every_order, close_to, forwards, mixed, push, transformed
from numpy.testing import assert_allclose

import jaxgrad
from jaxgrad import SparseLabels, forward_mode
from jaxgrad.curvature import linear_softmax_cross_entropy_gnvp

T, D, V = 5, 3, 8  # of which tiles of 4 leave none over: the body of a loop is compiled once
RULE = {"label_smoothing": 0.1, "z_loss": 0.01, "temperature": 0.7, "logit_soft_cap": 5.0}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def dense(labels):
    """The targets that labels stand for."""
    if isinstance(labels, SparseLabels):
        return (jax.nn.one_hot(labels.indices, V) * labels.probs[..., None]).sum(1)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jax.nn.one_hot(labels, V)
    return labels


def cases():
    """Labels made of numbers that are differentiated, or not; and a reduction."""
    indices = jnp.array([[0, 1], [6, 7], [3, 3], [7, 4], [5, 6]])
    yield "integer, mean", lambda s: jnp.array([1, 7, -100, 0, 4]), "mean"
    yield "dense, sum", lambda s: jax.nn.softmax(normal(T, V, seed=1) + s), "sum"
    yield "sparse", lambda s: SparseLabels(indices, 1 + normal(T, 2, seed=2) ** 2 + s), None


@pytest.mark.parametrize("make, reduction", [c[1:] for c in cases()], ids=[c[0] for c in cases()])
def test_derivatives(make, reduction, x64, standard_promotion, unoptimised):
    """Of everything along one line; of both orders, or the first with aux. And the rule's own."""
    x, w, bias, weights = normal(T, D), normal(D, V), normal(V), normal(T, seed=3) ** 2
    where = jnp.arange(V) != 2

    def arguments(s):
        rule = {name: value * (1 + s) for name, value in RULE.items()}
        line = [z + s * normal(*z.shape, seed=4) for z in (x, w, bias, weights)]
        return *line, make(s), rule

    def fused(function, s):
        x, w, bias, weights, labels, rule = arguments(s)
        ignored = (
            {}
            if jnp.issubdtype(jax.tree.leaves(labels)[-1].dtype, float)
            else {"ignore_index": -100}
        )
        rule |= {"weights": weights, "reduction": reduction, "chunk_size": (T, 4)}
        if reduction is not None:
            return function(x, w, labels, bias, where, **rule, **ignored)
        loss, aux = function(x, w, labels, bias, where, **rule, **ignored, return_aux=True)
        return loss.sum() + jnp.sin(aux.lse).sum() + jnp.cos(aux.entropy).sum()

    def plain(s):
        x, w, bias, weights, labels, rule = arguments(s)
        t = dense(labels)
        losses = weights * PLAIN["softmax_cross_entropy"](x @ w + bias, t, where, **rule)
        kept = t.any(-1) if jnp.issubdtype(jax.tree.leaves(labels)[0].dtype, int) else weights > -1
        if reduction is not None:
            total = jnp.where(kept, losses, 0).sum()
            return total / (jnp.where(kept, weights, 0).sum() if reduction == "mean" else 1)
        z = rule["logit_soft_cap"] * jnp.tanh((x @ w + bias) / rule["logit_soft_cap"])
        z = jnp.where(where, z / rule["temperature"], -1e4)
        p, lse = jax.nn.softmax(z), jax.nn.logsumexp(z, -1)
        entropy = lse - (p * z).sum(-1)
        return losses.sum() + jnp.sin(lse).sum() + jnp.cos(entropy).sum()

    twin = functools.partial(fused, forward_mode.linear_softmax_cross_entropy)
    default = functools.partial(fused, jaxgrad.linear_softmax_cross_entropy)

    @jax.jit
    def run(s):
        if reduction is None:
            found, expected = {"forward": push(twin)(s)}, push(plain)(s)
            _, slope = found["reverse"] = jax.value_and_grad(twin)(s)
        else:
            found, expected = {"forward": forwards(twin)(s)}, forwards(plain)(s)
            slope, fr, rf = mixed(twin)(s)
            found |= {mode: (expected[0], slope, z) for mode, z in (("both", fr), ("turned", rf))}
        return found, expected, slope, jax.grad(default)(s)

    found, expected, slope, by_rule = run(jnp.zeros(()))
    close_to(found, expected)
    assert_allclose(slope, by_rule, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", None])
def test_every_order(reduction, x64, standard_promotion, unoptimised):
    """Of one tile, to the third order."""
    x, w, labels = normal(2, D), normal(D, 3), jnp.array([2, 0])

    def fused(s):
        head = functools.partial(forward_mode.linear_softmax_cross_entropy, reduction=reduction)
        return head(x + s, w * (1 + s), labels).sum()

    def plain(s):
        z = (x + s) @ (w * (1 + s))
        return -jax.nn.log_softmax(z)[jnp.arange(2), labels].sum()

    check_every_order(fused, plain)


def test_a_ragged_tile_under_transformations(x64, standard_promotion, unoptimised):
    x, w, labels = normal(2, D), normal(D, 3), jnp.array([2, 0])

    def loss(s):
        head = functools.partial(forward_mode.linear_softmax_cross_entropy, chunk_size=(1, 2))
        return head(x + s, w * (1 + s), labels) + head(x, w + s, labels, reduction="mean")

    close_to(*jax.jit(transformed, static_argnums=0)(loss))


def test_log_probs_and_an_unknown_label(unoptimised):
    x, w = normal(3, D).astype("float32"), normal(D, V).astype("float32")
    labels = jnp.array([0, V, 2])

    def f(x, w):
        log_p, entropy = forward_mode.linear_log_probs(x, w, labels, return_entropy=True)
        return log_p, entropy

    (log_p, _), (log_p_dot, entropy_dot) = jax.jvp(f, (x, w), (x, w))
    z = x @ w
    z_dot = 2 * z
    p = jax.nn.softmax(z)
    mean = (p * z_dot).sum(-1)
    rows = np.array([0, 2])
    assert_allclose(log_p_dot[rows], (z_dot[rows, rows] - mean[rows]), rtol=1e-4, atol=1e-5)
    slope = -(p * (jax.nn.log_softmax(z) * (z_dot - mean[:, None]))).sum(-1)
    assert_allclose(entropy_dot[rows], slope[rows], rtol=1e-4, atol=1e-5)
    assert np.isnan([log_p[1], log_p_dot[1]]).all()
    x_bar, w_bar = jax.grad(lambda *z: f(*z)[0].sum(), (0, 1))(x, w)
    assert np.isnan(x_bar[1]).all()
    assert np.isfinite(x_bar[rows]).all()
    assert np.isfinite(w_bar).all()


@pytest.mark.parametrize("reduction", ["mean", None])
def test_products_hold_two_tiles_where_the_gradient_holds_one(reduction, unoptimised):
    """Read from the compiled program: nothing of tokens × classes in it, and its temporaries."""
    t, d, v = 1024, 256, 32768
    x, w = jax.ShapeDtypeStruct((t, d), "float32"), jax.ShapeDtypeStruct((d, v), "float32")
    labels = jax.ShapeDtypeStruct((t,), "int32")

    def gradient(module, x, w, labels):
        return jax.grad(functools.partial(loss, module), (0, 1))(x, w, labels)

    def loss(module, x, w, labels):
        return module.linear_softmax_cross_entropy(x, w, labels, reduction=reduction).sum()

    def jvp(module, x, w, labels, x_dot, w_dot):
        return jax.jvp(lambda x, w: loss(module, x, w, labels), (x, w), (x_dot, w_dot))

    def hvp(module, x, w, labels, x_dot, w_dot):
        return jax.jvp(lambda x, w: gradient(module, x, w, labels), (x, w), (x_dot, w_dot))[1]

    def gnvp(_, x, w, labels, x_dot, w_dot):
        return linear_softmax_cross_entropy_gnvp((x, w), (x_dot, w_dot), labels)

    def read(f, module, *args):
        compiled = jax.jit(functools.partial(f, module)).lower(*args).compile()
        program = compiled.as_text()
        assert not re.search(rf"\[{t},{v}\]|\[{v},{t}\]", program)
        return compiled.memory_analysis().temp_size_in_bytes, len(re.findall(r" dot\(", program))

    allowed, _ = read(gradient, jaxgrad, x, w, labels)
    temp, _ = read(gradient, forward_mode, x, w, labels)
    inputs_and_gradients = 8 * d * (t + v)
    assert temp + inputs_and_gradients <= 1.1 * (allowed + inputs_and_gradients)
    dots = {
        "mean": {(jvp, forward_mode): 3, (hvp, forward_mode): 7, (gnvp, jaxgrad): 5},
        None: {(jvp, forward_mode): 4, (hvp, forward_mode): 10, (hvp, jaxgrad): 10},
    }
    for (product, module), expected in dots[reduction].items():
        temp, products = read(product, module, x, w, labels, x, w)
        assert temp <= 2 * allowed + 16 * t, product  # and a few numbers a token
        if jax.default_backend() == "cpu":
            assert products == expected, product


def test_reverse_mode_needs_the_memory_of_the_rule(unoptimised):
    """In bfloat16, where a whole w̄ in float32 would show."""
    x, w = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((256, 256), (256, 32768)))
    labels = jax.ShapeDtypeStruct((256,), "int32")

    def peak(module):
        head = functools.partial(module.linear_softmax_cross_entropy, chunk_size=(256, 1024))
        loss = lambda *args: head(*args).sum()
        memory = jax.jit(jax.grad(loss, (0, 1))).lower(x, w, labels).compile().memory_analysis()
        return memory.temp_size_in_bytes + 4 * (x.size + w.size)

    assert peak(forward_mode) <= 1.1 * peak(jaxgrad)
