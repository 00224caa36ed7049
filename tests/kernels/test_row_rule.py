"""The row rule: its cotangents one by one, and rows that come in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import distribution, logits, weights

from jaxgrad.kernels import row_rule
from jaxgrad.kernels.row_rule import Rule

pytestmark = pytest.mark.usefixtures("unoptimised")

RNG = np.random.default_rng(0)
X, T = logits(RNG, (3, 6)), distribution(RNG, (3, 6))
WHERE = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]], bool)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "temperature": 0.7, "soft_cap": 5.0}
RULES = [{}, *({name: OPTIONS[name]} for name in OPTIONS), OPTIONS]
every_rule = pytest.mark.parametrize("options", RULES, ids=lambda o: "-".join(o) or "plain")


def as_rule(options):
    return Rule(**{name: jnp.asarray(value) for name, value in options.items()})


def twins(options):
    """Loss, log-sum-exp and entropy of each row, in as many digits as x has."""
    loss = {name: options.get(name, 0) for name in ("label_smoothing", "z_loss")}
    capped = {
        "temperature": options.get("temperature", 1),
        "logit_soft_cap": options.get("soft_cap"),
    }

    def lse(x):
        return oracles._distances(x, -1, WHERE, **capped)[1][..., 0]

    def entropy(x):
        surprise = oracles._distances(x, -1, WHERE, **capped)[0]
        p = oracles._exp(np.where(WHERE, -surprise, -np.inf if x.dtype == float else -1e7))
        return np.where(WHERE, p * surprise, 0).sum(-1)

    return (
        lambda x: oracles.softmax_cross_entropy(x, T, -1, WHERE, **loss, **capped),
        lse,
        entropy,
    )


@every_rule
def test_loss_log_sum_exp_and_entropy(options, x64):

    @jax.jit
    def sums(x):
        rule = as_rule(options)
        part = row_rule.measure(rule, x, jnp.asarray(T), jnp.asarray(WHERE), (-1,), True)
        return row_rule.loss(rule, part), row_rule.log_sum_exp(rule, part), row_rule.entropy(part)

    for y, twin in zip(sums(X), twins(options), strict=True):
        np.testing.assert_allclose(y[:, 0], oracles.in_50_digits(twin, X), rtol=1e-12)


@every_rule
def test_each_cotangent(options, x64):
    """(6) and (7), with one of the three cotangents, of loss, lse and entropy, at a time."""
    rule, t, where = as_rule(options), jnp.asarray(T), jnp.asarray(WHERE)

    @jax.jit
    def gradient(x, *bars):
        part = row_rule.measure(rule, x, t, where, (-1,), True)
        return row_rule.to_logits(rule, x, where, row_rule.gradient(rule, x, t, where, part, *bars))

    for at, twin in enumerate(twins(options)):
        bars = [weights((3, 1)) * (i == at) for i in range(3)]
        expected = oracles.derivative(twin, (X,), 0, weights((3, 1))[:, 0])
        np.testing.assert_allclose(gradient(X, *bars), expected, 1e-12, 1e-14)


@every_rule
def test_parts_merge_into_the_whole(options, x64):
    rule, t, where = as_rule(options), jnp.asarray(T), jnp.asarray(WHERE)

    @jax.jit
    def whole_and_merged(x):
        def of(*columns):
            s = slice(*columns)
            return row_rule.measure(rule, x[:, s], t[:, s], where[:, s], (-1,), True)

        parts = [(of(cut), of(cut, None)) for cut in (1, 3)]
        pairs = parts + [pair[::-1] for pair in parts]
        return of(None), [row_rule.merge(rule, *pair) for pair in pairs]

    whole, merged = whole_and_merged(X)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    for found in merged:
        jax.tree.map(close, found, whole)


@every_rule
def test_gradient_of_one_part_needs_the_sums_of_the_row_alone(options, x64):
    rule, t, where = as_rule(options), jnp.asarray(T), jnp.asarray(WHERE)

    @jax.jit
    def whole_and_tiles(x):
        part = row_rule.measure(rule, x, t, where, (-1,))
        return [
            row_rule.gradient(rule, x[:, s], t[:, s], where[:, s], part, jnp.ones((3, 1)))
            for s in (slice(None), slice(2), slice(2, None))
        ]

    whole, *tiles = whole_and_tiles(X)
    np.testing.assert_array_equal(np.concatenate(tiles, 1), whole)


def test_index_and_one_hot_targets_agree(x64):
    @jax.jit
    def both(x):
        rule, hot = as_rule(OPTIONS), jax.nn.one_hot(jnp.array([1, 0, 5]), 6, dtype=bool)
        part = row_rule.measure(rule, x, hot.astype(float), None, (-1,))
        return [
            row_rule.gradient(rule, x, z, None, part, jnp.ones((3, 1)))
            for z in (hot, hot.astype(float))
        ]

    np.testing.assert_allclose(*both(X), rtol=1e-12, atol=1e-15)
