"""check_rule passes what is right, and says what is wrong with each bug planted here."""

import re

import cases
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap

from jaxgrad.testing import check_rule, errors_in_ulps

pytestmark = pytest.mark.usefixtures("unoptimised")

X = jnp.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.5], [2.0, 0.75, -0.5]])
A = jnp.array([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0], [-2.0, 1.5, 1.0]])
WHERE = np.array([[True, True, False], [True, True, True], [False, True, True]])
OUT = {0: ~WHERE}
INF, NAN = np.inf, np.nan
DIGITS = mpmath.MPContext()
DIGITS.dps = 50


def with_rule(f, fwd, bwd):
    rule = jax.custom_vjp(f)
    rule.defvjp(fwd, bwd)
    return rule


def failure(*args, **options):
    with pytest.raises(AssertionError) as raised:
        check_rule(*args, **options)
    return str(raised.value)


def cube(x):
    return x * x * x


def cube_with(fwd=lambda x: (cube(x), x), bwd=lambda x, y_bar: (3 * x * x * y_bar,)):
    return with_rule(cube, fwd, bwd)


def product(a, x):
    return a @ x


def product_with(bwd):
    return with_rule(product, lambda a, x: (a @ x, (a, x)), lambda kept, y_bar: bwd(*kept, y_bar))


def masked_cubes(x, where):
    return cube(jnp.where(where, x, 0)).sum(-1)


def masked_cubes_with(bwd):
    def fwd(x, where):
        return masked_cubes(x, where), (x, where)

    return with_rule(masked_cubes, fwd, lambda kept, y_bar: (bwd(*kept, y_bar[..., None]), None))


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_right_rule_passes(dtype):
    check_rule(cube_with(), cube, X, dtypes=[dtype], residuals=lambda x: [x])


def test_right_rule_of_two_arguments_passes():
    right = product_with(lambda a, x, y_bar: (jnp.outer(y_bar, x), a.T @ y_bar))
    check_rule(right, product, A, X[0], residuals=[A, X[0]])


def test_right_mask_passes():
    def bwd(x, where, y_bar):
        x = jnp.where(where, x, 0)
        return 3 * x * x * y_bar

    check_rule(masked_cubes_with(bwd), masked_cubes, X, WHERE, masked=OUT)


@pytest.mark.parametrize(
    "slope",
    [
        lambda x, y_bar: -3 * x * x * y_bar,
        lambda x, y_bar: x * x * y_bar,
        lambda x, y_bar: 3 * x * x,
        lambda x, y_bar: 3 * x * x * jnp.abs(y_bar),
        lambda x, y_bar: jnp.zeros_like(x),
        lambda x, y_bar: 3 * x * x * y_bar.mean(),
        lambda x, y_bar: jnp.where(x == 0.5, jnp.nan, 3 * x * x * y_bar),
    ],
    ids=["sign", "factor", "no cotangent", "its modulus", "zero", "its mean", "one NaN"],
)
def test_wrong_gradient(slope):
    message = failure(cube_with(bwd=lambda x, y_bar: (slope(x, y_bar),)), cube, X)
    assert message.startswith("cube: gradient to argument[0], float32[3, 3]\n")
    pushed, pulled = map(float, re.findall(r"⟩ = (\S+) by", message))
    assert not np.isclose(pushed, pulled, rtol=1e-3)
    assert re.search(r"at \[\d, \d\]: \S+, but \S+ by the oracle: \S+ ulps where 8 are", message)


@pytest.mark.parametrize(
    "bwd, argument",
    [
        (lambda a, x, y_bar: (jnp.outer(x, y_bar), a.T @ y_bar), "[0], float32[3, 3]"),
        (lambda a, x, y_bar: (jnp.outer(y_bar, x), a @ y_bar), "[1], float32[3]"),
        (lambda a, x, y_bar: (None, a.T @ y_bar), "[0], float32[3, 3]"),
        (lambda a, x, y_bar: (jnp.outer(y_bar, x), None), "[1], float32[3]"),
    ],
    ids=["first transposed", "second transposed", "first dropped", "second dropped"],
)
def test_wrong_gradient_to_one_of_two(bwd, argument):
    message = failure(product_with(bwd), product, A, X[0])
    assert message.startswith(f"product: gradient to argument{argument}\n")


def test_dropped_cotangent_of_one_output():
    def both(x):
        return {"sin": jnp.sin(x), "cube": cube(x)}

    f = with_rule(both, lambda x: (both(x), x), lambda x, y_bar: (jnp.cos(x) * y_bar["sin"],))
    assert "gradient to argument[0]" in failure(f, both, X)


def test_leaf_of_a_tree_is_named():
    def affine(params):
        return params["w"] * X + params["b"]

    f = with_rule(affine, lambda params: (affine(params), None), lambda _, y: ({"w": y, "b": y},))
    message = failure(f, affine, {"w": X, "b": X})
    assert "gradient to argument[0]['w'], float32[3, 3]\n" in message


@pytest.mark.parametrize(
    "oracle, message",
    [
        (lambda x: cube(x) * (1 + 1e-5), "value of output, float32[3, 3]\n"),
        (lambda x: jnp.where(x == 3, jnp.inf, cube(x)), "27, but inf by the oracle: inf ulps"),
        (lambda x: cube(x)[:1], "shape [3, 3], but [1, 3] by the oracle"),
        (lambda x: (cube(x), x), "PyTreeDef(*), not PyTreeDef((*, *))"),
    ],
    ids=["off", "infinite", "shape", "structure"],
)
def test_wrong_value(oracle, message):
    assert message in failure(cube_with(), oracle, X)


def test_integer_outputs_are_compared():
    def low(x):
        return x.sum(-1), x.argmin(-1)

    def high(x):
        return x.sum(-1), x.argmax(-1)

    assert "value of output[1], int32[3]" in failure(low, high, X)


def test_ulps_are_of_the_largest_entry_or_of_each():
    def off(x):
        return cube(x) + 1e-3

    x = jnp.array([1.0, 100.0])
    check_rule(cube_with(), off, x)
    assert "at [0]: 1, but 1.001 by the oracle" in failure(cube_with(), off, x, per_entry=True)


def test_sum_rounded_to_16_bits_is_found():
    def rough(x):
        return x[0] + x[1] + x[2]

    def fine(x):
        return x.astype(jnp.float32).sum().astype(x.dtype)

    x = jnp.array([256.0, 1.0, 1.0])
    check_rule(fine, rough, x, dtypes=["bfloat16"], ulps=0.5)
    message = failure(rough, rough, x, dtypes=["bfloat16"], ulps=0.5)
    assert message.startswith("rough: value of output, bfloat16[]\n  at []: 256, but 258")


def test_gradient_in_another_dtype():
    f = cube_with(bwd=lambda x, y_bar: ((3 * x * x * y_bar).astype(jnp.float32),))
    message = failure(f, cube, X, dtypes=["bfloat16"])
    assert message.endswith("argument[0], bfloat16[3, 3]\n  came as float32[3, 3]")


def test_residuals():
    hoarder = cube_with(lambda x: (cube(x), (x, x * x)), lambda kept, y_bar: (3 * kept[1] * y_bar,))
    check_rule(hoarder, cube, X, residuals=[X, X])
    check_rule(hoarder, cube, X, residuals=72)
    message = failure(hoarder, cube, X, residuals=[jax.ShapeDtypeStruct((3, 3), jnp.float32)])
    assert message.endswith("72 bytes, float32[3, 3], float32[3, 3]; not float32[3, 3]")
    assert "not at most 71 bytes" in failure(hoarder, cube, X, residuals=lambda x: 71)


def test_broken_under_jit():
    f = cube_with(bwd=lambda x, y_bar: (3 * x * x * y_bar if x[0, 0] > 0 else y_bar,))
    assert failure(f, cube, X).startswith("cube: jit\n  raised TracerBoolConversionError: ")


def test_broken_under_vmap():
    def batched_by(rule):
        slope = custom_vmap(lambda x: 3 * x * x)
        slope.def_vmap(lambda size, batched, x: (rule(x), True))
        return cube_with(bwd=lambda x, y_bar: (slope(x) * y_bar,))

    check_rule(batched_by(lambda x: 3 * x * x), cube, X, order=1)
    mixes_rows = batched_by(lambda x: jnp.broadcast_to(3 * x[:1] * x[:1], x.shape))
    message = failure(mixes_rows, cube, X)
    assert message.startswith("cube: vmap over argument[0], float32[3, 3]: argument[0]")
    raises = batched_by(lambda x: x.reshape(X.shape))
    assert "vmap over argument[0], float32[3, 3]\n  raised " in failure(raises, cube, X)


def test_broken_under_vmap_over_one_of_two():
    def hadamard(a, x):
        return a * x

    to_a = custom_vmap(hadamard)
    to_a.def_vmap(lambda size, batched, x, y_bar: (x * y_bar, True))  # as if x always were
    f = with_rule(
        hadamard,
        lambda a, x: (a * x, (a, x)),
        lambda kept, y_bar: (to_a(kept[1], y_bar), kept[0] * y_bar),
    )
    message = failure(f, hadamard, A, X)
    assert message.startswith("hadamard: vmap over argument[0], float32[3, 3]\n  raised ")


@pytest.mark.parametrize(
    "bwd",
    [
        lambda x, y_bar: (3 * x * lax.stop_gradient(x) * y_bar,),
        lambda x, y_bar: (3 * x * x * lax.stop_gradient(y_bar),),
    ],
    ids=["to the argument", "to the cotangent"],
)
def test_wrong_second_order(bwd):
    f = cube_with(bwd=bwd)
    check_rule(f, cube, X, order=1)
    assert failure(f, cube, X).startswith("cube: reverse over reverse: ")


def test_residual_cut_off_by_stop_gradient():
    f = cube_with(lambda x: (cube(x), lax.stop_gradient(x)))
    assert failure(f, cube, X).startswith("cube: reverse over reverse: argument[0]")


def test_forward_pass_calls_the_decorated_function():
    f = cube_with(lambda x: (f(x), x))
    assert failure(f, cube, X).startswith("cube: forward over reverse\n  raised TypeError: ")


@pytest.mark.parametrize(
    "bwd, where",
    [
        (lambda x, where, y_bar: 3 * x * x * y_bar, "gradient to "),
        (lambda x, where, y_bar: jnp.where(where, 3 * x * x, 1e-30) * y_bar, "gradient to masked "),
        (lambda x, where, y_bar: where.astype(x.dtype) * 3 * x * x * y_bar, "nan in masked "),
        (lambda x, where, y_bar: jnp.where(where, 3 * x * x * y_bar, 0), "nan in masked "),
    ],
    ids=["no mask", "almost 0", "0 · NaN", "0 · NaN in second order"],
)
def test_forgotten_mask(bwd, where):
    message = failure(masked_cubes_with(bwd), masked_cubes, X, WHERE, masked=OUT)
    assert message.startswith(f"masked_cubes: {where}")


def test_value_reads_what_is_masked():
    def f(x, where):
        return (where.astype(x.dtype) * cube(x)).sum(-1)

    message = failure(f, masked_cubes, X, WHERE, masked=OUT)
    assert message.startswith("f: nan in masked entries of argument[0]: output, float32[3]\n")


def test_nothing_to_differentiate():
    with pytest.raises(TypeError, match="check_rule: cube must have a floating argument"):
        check_rule(cube, cube, jnp.arange(3))


@pytest.mark.parametrize(
    "got, want, axis, ulps",
    [
        (np.float32([1, 3]), [1, 3 + 2**-22], None, [0, 1]),
        (np.float32([1, 4]), [1 + 2**-23, 4], (), [1, 0]),
        (np.float32([[1, 4], [1, 1]]), [[1, 4], [1 + 2**-23, 2]], 1, [[0, 0], [0.5, 2**22]]),
        (np.float16([INF, -INF, 1]), [1e5, -1e5, 1], (), [0, 0, 0]),
        (np.float16([0, 2**-24]), [2**-24, 2**-23], (), [1, 1]),
        (np.float32([NAN, NAN, INF, 1, 1]), [NAN, 1, 1, INF, NAN], None, [0, INF, INF, INF, INF]),
        (np.float64([1]), [DIGITS.mpf(1) + DIGITS.mpf(2) ** -53], (), [0.5]),
        (np.int32([1, 2]), [1, 3], (), [0, INF]),
    ],
)
def test_errors_in_ulps(got, want, axis, ulps):
    np.testing.assert_allclose(errors_in_ulps(got, want, axis), ulps, rtol=1e-6)
