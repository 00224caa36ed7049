"""Losses from logits: the digits of a label that wins, the options, labels that name no class."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import distribution, logits

from jaxgrad import soft_cap, softmax_cross_entropy
from jaxgrad import softmax_cross_entropy_with_integer_labels as integer_loss

RNG = np.random.default_rng(0)
X = jnp.asarray(logits(RNG, (3, 5)), "float32")
T = jnp.asarray(distribution(RNG, (3, 5)), "float32")
LABELS = jnp.array([4, 0, 2])
HOT = jax.nn.one_hot(LABELS, 5)
BOTH = {
    "dense": lambda x, **options: softmax_cross_entropy(x, HOT, **options),
    "integer": lambda x, **options: integer_loss(x, LABELS, **options),
}
both = pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH)


@pytest.mark.parametrize("gap", [10.0, 15.0, 20.0, 40.0])
@pytest.mark.parametrize("kind", BOTH)
def test_a_label_that_wins_keeps_its_digits(kind, gap):
    x, hot = np.array([gap, 0.0, -1.0, 0.5]), np.array([1.0, 0.0, 0.0, 0.0])
    labels = jnp.asarray(hot, "float32") if kind == "dense" else 0
    function = softmax_cross_entropy if kind == "dense" else integer_loss
    value, slope = jax.value_and_grad(function)(jnp.asarray(x, "float32"), labels)
    twin = lambda x: oracles.softmax_cross_entropy(x, hot)
    np.testing.assert_allclose(value, oracles.in_50_digits(twin, x), rtol=1e-6)
    np.testing.assert_allclose(slope, oracles.derivative(twin, (x,), 0, 1.0), rtol=1e-6)


@pytest.mark.parametrize("offset", [1e3, 1e5])
@both
def test_a_common_offset_costs_no_digits(loss, offset):
    x = jnp.round(X * 64) / 64  # what a float32 near 1e5 can hold exactly
    np.testing.assert_allclose(loss(x + offset), loss(x), rtol=1e-6)


@both
def test_smoothing_is_that_of_the_labels(loss):
    smoothed = softmax_cross_entropy(X, 0.9 * HOT + 0.1 / 5)
    np.testing.assert_allclose(loss(X, label_smoothing=0.1), smoothed, rtol=1e-6)


@both
def test_smoothing_spreads_over_valid_classes_alone(loss):
    where, valid = np.array([True, False, True, False, True]), np.array([0, 2, 4])
    nan = np.where(np.arange(5) == 1, np.nan, X)
    found = loss(nan, label_smoothing=0.3, where=where[None])
    expected = softmax_cross_entropy(X[:, valid], HOT[:, valid], label_smoothing=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@both
def test_the_soft_cap_comes_before_the_temperature(loss):
    found = loss(X, temperature=0.5, logit_soft_cap=2.0)
    np.testing.assert_allclose(found, loss(soft_cap(X, 2.0) / 0.5), rtol=1e-6)


@both
def test_z_loss_is_the_square_of_the_log_sum_exp(loss):
    added = 0.01 * jax.nn.logsumexp(X, -1) ** 2
    np.testing.assert_allclose(loss(X, z_loss=0.01), loss(X) + added, rtol=1e-6)


@both
def test_options_may_be_traced(loss):
    names = ("label_smoothing", "z_loss", "temperature", "logit_soft_cap")
    options = dict(zip(names, (0.1, 0.01, 0.5, 4.0), strict=True))
    np.testing.assert_allclose(jax.jit(loss)(X, **options), loss(X, **options), rtol=1e-6)


def test_labels_need_not_sum_to_one():
    twin = lambda x, t: oracles.softmax_cross_entropy(x, t)
    args = np.float64(X), 3 * np.float64(T)
    _, pull = jax.vjp(softmax_cross_entropy, X, 3 * T)
    for wrt, slope in enumerate(pull(jnp.ones(3))):
        expected = oracles.derivative(twin, args, wrt, np.ones(3))
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


def test_gradient_to_the_labels_in_their_dtype():
    _, pull = jax.vjp(softmax_cross_entropy, X.astype("bfloat16"), T.astype("float16"))
    assert [z.dtype for z in pull(jnp.ones(3))] == ["bfloat16", "float16"]


def test_gradient_to_a_label_is_its_surprise():
    slope = jax.grad(softmax_cross_entropy, 1)(jnp.array([0.0, -jnp.inf]), jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(slope, [0.0, np.inf])


def test_a_label_that_names_no_class():
    """NaN in its own row, and nothing in the others."""

    @jax.jit
    def of(labels):
        return integer_loss(X, labels), jax.grad(lambda x: integer_loss(x, labels).sum())(X)

    known_value, known_slope = of(LABELS)
    for label in (-1, -100, 5, 2**31 - 1):
        value, slope = of(np.where(np.arange(3) == 1, label, LABELS))
        assert np.isnan(value[1])
        assert np.isnan(slope[1]).all()
        np.testing.assert_array_equal(value[::2], known_value[::2])
        np.testing.assert_array_equal(slope[::2], known_slope[::2])


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1, "temperature": 2.0}], ids=["", "rule"]
)
def test_an_ignored_row_gives_nothing(options):
    """To the logits nor to the options, even if it holds NaN."""
    x, labels = X.at[1].set(jnp.nan), LABELS.at[1].set(-100)

    def total(x, options):
        return integer_loss(x, labels, ignore_index=-100, **options).sum()

    value, (x_bar, bars) = jax.jit(jax.value_and_grad(total, (0, 1)))(x, options)
    kept = lambda x, options: integer_loss(x[::2], LABELS[::2], **options).sum()
    value_, (x_bar_, bars_) = jax.jit(jax.value_and_grad(kept, (0, 1)))(X, options)
    np.testing.assert_allclose(value, value_, rtol=1e-6)
    np.testing.assert_allclose(x_bar, x_bar_, rtol=1e-6)
    np.testing.assert_array_equal(x_bar[1], np.zeros(5))
    for name in options:
        np.testing.assert_allclose(bars[name], bars_[name], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@both
def test_residuals_are_logits_labels_and_two_numbers_per_row(loss, dtype):
    kept = jax.tree.leaves(jax.vjp(loss, X.astype(dtype))[1])
    of_rows = [z for z in kept if z.size == 3 and z.dtype == "float32"]
    assert len(of_rows) in (2, 3)  # Σ t too, where labels are dense
    assert sum(z.size for z in kept) <= 15 + 15 + 3 * len(of_rows)
    assert sum(z.shape == (3, 5) and z.dtype == dtype for z in kept) >= 1


def test_the_forward_of_bfloat16_holds_no_array_of_float32():
    """On the CPU; other platforms fuse the widened copy away by themselves."""
    if jax.default_backend() != "cpu":
        pytest.skip("the memory of the CPU backend")
    x, labels = jax.ShapeDtypeStruct((64, 4096), "bfloat16"), jnp.zeros(64, int)
    for function in (integer_loss, jax.grad(lambda x, labels: integer_loss(x, labels).sum())):
        memory = jax.jit(function).lower(x, labels).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.1 * 4 * 64 * 4096


def test_a_soft_cap_is_not_spread_over_the_logits():
    """On the CPU, which gives two consumers of a scalar an array of it."""
    if jax.default_backend() != "cpu":
        pytest.skip("the memory of the CPU backend")
    x, labels = jax.ShapeDtypeStruct((64, 4096), "float32"), jnp.zeros(64, int)
    loss = lambda x, labels: integer_loss(x, labels, logit_soft_cap=30.0).sum()
    memory = jax.jit(jax.value_and_grad(loss)).lower(x, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * 4 * 64 * 4096


def test_the_gradient_of_many_classes_keeps_its_digits():
    """The largest of many probabilities is small: 1 must not be taken off it and put back."""
    rng = np.random.default_rng(0)
    x = np.float32(3 * rng.standard_normal((8, 4096)))
    t = np.float32(oracles.softmax(rng.standard_normal((8, 4096))))
    found = jax.jit(jax.grad(lambda x: softmax_cross_entropy(x, t).sum()))(x)
    x, t = np.float64(x), np.float64(t)
    expected = t.sum(-1, keepdims=True) * oracles.softmax(x) - t
    assert oracles.error(found, expected, axis=-1) < 4
