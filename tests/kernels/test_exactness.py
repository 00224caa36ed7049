"""Every kernel in every dtype beside its twin in 50 digits: values, gradients, and their dtypes."""

import functools

import jax
import jax.numpy as jnp
import oracles
import pytest
from cases import DTYPES, KERNELS, as_double, as_dtype, weights

# In eps, for what is not rounded to 16 bits: of each value, and of the largest gradient in a row.
VALUE, GRADIENT = 4.0, 4.0
# A 16-bit result is the exact one rounded once, but for ties that an error in float32 decides.
ROUNDED = 0.51
# Sums of products that cancel, so that only the largest entry of a row keeps its digits.
PRODUCTS = ("softmax_jacobian", "softmax_vjp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_value_and_gradient(kernel, dtype):
    args = kernel.arguments(dtype)
    doubles = tuple(map(as_double, args))
    products, wide = kernel.name in PRODUCTS, dtype in ("float32", "float64")
    with jax.enable_x64(dtype == "float64"):
        function = functools.partial(_of_primals, kernel, args)
        y, pull = jax.vjp(function, *(jnp.asarray(args[i]) for i in kernel.wrt))
        y_bar = as_dtype(weights(y.shape), y.dtype)
        bars = pull(jnp.asarray(y_bar))
    assert y.dtype == ("float32" if kernel.is_loss and not wide else dtype)
    bar = 2 * VALUE if products else VALUE if jnp.finfo(y.dtype).bits > 16 else ROUNDED
    expected = oracles.in_50_digits(kernel.twin, *doubles)
    assert oracles.error(y, expected, axis=-1 if products else ()) < bar
    for i, x_bar in zip(kernel.wrt, bars, strict=True):
        assert x_bar.dtype == args[i].dtype
        bar = GRADIENT if wide or products else ROUNDED
        row = {"axis": -1} if x_bar.ndim and (wide or products) else {}
        least = 0.0 if x_bar.ndim else 1.0  # a sum over all rows, which may cancel
        expected = oracles.derivative(kernel.twin, doubles, i, as_double(y_bar))
        assert oracles.error(x_bar, expected, **row, least=least) < bar, list(kernel.makers)[i]


def _of_primals(kernel, args, *primals):
    given = dict(zip(kernel.wrt, primals, strict=True))
    return kernel.function(*(given.get(i, z) for i, z in enumerate(args)))
