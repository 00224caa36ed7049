"""The twins: every mode, every order, the same rule, at the same residuals and memory."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNELS, weights
from formulas import PLAIN, derivative
from jax import lax
from numpy.testing import assert_allclose

import jaxgrad
from jaxgrad import forward_mode

every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=repr)
every_name = pytest.mark.parametrize("name", jaxgrad.__all__)
INTEGER = "softmax_cross_entropy_with_integer_labels"
# The fewest kernels that run every forward rule.
RULES = (
    "softmax-where",
    "log_softmax",
    "logsumexp-b-where",
    "soft_cap",
    "cross_entropy-where",
    "softmax_cross_entropy-where-rule",
    "softmax_cross_entropy_integer-where-rule-ignore_index",
)
ORDERS = ("", "f", "r", "ff", "fr", "rf", "rr", "fff", "rrr")
THIRD = ("softmax", "logsumexp", "soft_cap")
every_rule = pytest.mark.parametrize(
    "kernel", [kernel for kernel in KERNELS if repr(kernel) in RULES], ids=repr
)
close = functools.partial(
    jax.tree.map, functools.partial(assert_allclose, rtol=1e-10, atol=1e-10, strict=True)
)


def split(kernel, function, dtype="float64"):
    """``function`` of the kernel's differentiable arguments, finite; and those arguments."""
    args = tuple(map(jnp.asarray, kernel.arguments(dtype, shape=(2, 4))))

    def finite(*primals):
        given = dict(zip(kernel.wrt, primals, strict=True))
        named = {
            n: given.get(i, z) for i, (n, z) in enumerate(zip(kernel.makers, args, strict=True))
        }
        y = function(**named, **kernel.options)
        return jnp.where(jnp.isinf(y), 0, y)

    return finite, tuple(args[i] for i in kernel.wrt)


def loosely(function):
    """A formula under JAX's own rules of promotion, not the strict ones of the tests."""

    def formula(**arguments):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(**arguments)

    return formula


def twin(kernel):
    return getattr(forward_mode, kernel.name)


def tangents(primals):
    return tuple(jnp.asarray(weights((3, *z.shape))[i % 3] - 1) for i, z in enumerate(primals))


def weighted(function):
    def scalar(*primals):
        y = function(*primals)
        return (y * weights(y.shape)).sum()

    return scalar


def along(function, primals, v):
    """A function of one number, from which every derivative along v follows."""
    return lambda s: function(*(p + s * w for p, w in zip(primals, v, strict=True)))


@every_name
def test_every_name_has_its_twin(name):
    default, other = getattr(jaxgrad, name), getattr(forward_mode, name)
    assert other.__name__ == name
    assert inspect.signature(other) == inspect.signature(default)
    assert forward_mode.__all__ == jaxgrad.__all__
    if other is not default:
        assert pickle.loads(pickle.dumps(other)) is other
        assert f"jaxgrad.{name}" in other.__doc__
        assert "jaxgrad.forward_mode" in default.__doc__


@every_kernel
def test_derivatives_of_every_mode_and_order(kernel, x64, unoptimised):
    """Beside the plain formula, differentiated by JAX; first order beside the backward rule too."""
    function, primals = split(kernel, twin(kernel))
    default, _ = split(kernel, getattr(jaxgrad, kernel.name))
    plain, _ = split(kernel, loosely(PLAIN[kernel.name]))
    v = tangents(primals)
    n = tuple(range(len(primals)))

    def directional(f, modes):
        """The derivatives along v of the weighted sum of f, one order a mode."""
        return derivative(weighted(along(f, primals, v)), modes)

    @jax.jit
    def run():
        orders = ORDERS if repr(kernel) in THIRD else ORDERS[:-2]
        found = {modes: directional(function, modes) for modes in orders}
        true = [directional(plain, "f" * order) for order in range(len(orders[-1]) + 1)]
        expected = {modes: true[len(modes)] for modes in orders}
        gradients = [jax.grad(weighted(f), n)(*primals) for f in (function, default)]
        return found, expected, gradients

    found, expected, gradients = run()
    close(found, expected)
    close(*gradients)


@every_rule
def test_under_transformations(kernel, x64, unoptimised):
    """vmap, linearize, scan, remat, cond and shard_map of a jvp, and a jvp of each of them."""
    function, primals = split(kernel, twin(kernel))
    v = tangents(primals)
    push = lambda f: lambda s: jax.jvp(f, (s,), (jnp.ones_like(s),))
    path = along(function, primals, v)
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=jax.P("rows"), out_specs=jax.P("rows")
    )

    @jax.jit
    def run():
        s = jnp.arange(3.0) / 8
        one = [push(path)(x) for x in s]
        y, linear = jax.linearize(path, s[1])
        each = {
            "vmap of jvp": jax.vmap(push(path))(s),
            "jvp of vmap": push(jax.vmap(path))(s),
            "jvp of shard_map": push(rows(jax.vmap(path)))(s),
            "shard_map of jvp": rows(jax.vmap(push(path)))(s),
            "jvp of scan": push(lambda s: lax.scan(lambda c, x: (c, path(x)), 0, s)[1])(s),
        }
        at = {
            "jvp of remat": push(jax.checkpoint(path))(s[1]),
            "jvp of cond": push(lambda x: lax.cond(x < 1, path, lambda x: 0 * path(x), x))(s[1]),
            "linearize": (y, linear(jnp.ones(()))),
        }
        return each, at, jax.tree.map(lambda *z: jnp.stack(z), *one), one[1]

    each, at, all_expected, expected = run()
    for name, found in each.items():
        jax.tree.map(
            functools.partial(assert_allclose, rtol=1e-10, err_msg=name), found, all_expected
        )
    for name, found in at.items():
        jax.tree.map(functools.partial(assert_allclose, rtol=1e-10, err_msg=name), found, expected)


@every_kernel
def test_residuals_are_those_of_the_rule(kernel):
    def kept(module):
        function, primals = split(kernel, getattr(module, kernel.name), "bfloat16")
        closure = jax.eval_shape(lambda *primals: jax.vjp(function, *primals)[1], *primals)
        return sorted(f"{z.dtype}{z.shape}" for z in jax.tree.leaves(closure))

    assert kept(forward_mode) == kept(jaxgrad)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", INTEGER])
def test_reverse_mode_needs_the_memory_of_the_rule(name):
    x, labels = jnp.zeros((64, 1024)), jnp.zeros(64, jnp.int32)
    rest = (labels,) if name == INTEGER else ()

    def peak(module):
        function = getattr(module, name)
        pull = lambda x, y_bar: jax.vjp(lambda x: function(x, *rest), x)[1](y_bar)
        y_bar = jax.eval_shape(lambda: function(x, *rest))
        return jax.jit(pull).lower(x, y_bar).compile().memory_analysis().temp_size_in_bytes

    assert peak(forward_mode) <= 1.1 * peak(jaxgrad) + x.nbytes / 64


@pytest.mark.parametrize(
    "name, x, kept",
    [
        ("softmax", [[-np.inf, -np.inf], [-np.inf, 1.0]], [0, 0]),
        ("log_softmax", [[-np.inf, -np.inf], [-np.inf, 1.0]], [0, 0]),
        ("logsumexp", [[-np.inf, -np.inf]], [0]),
        ("tanh", [[-np.inf, np.inf]], [0]),
    ],
)
def test_edges(name, x, kept):
    function = getattr(forward_mode, name)
    function = functools.partial(function, axis=-1) if name == "logsumexp" else function
    for derive in jax.jacfwd, jax.jacrev:
        jacobian = derive(function)(jnp.asarray(x))
        assert np.isfinite(jacobian).all()
        assert not np.asarray(jacobian)[kept[0]].any()


def test_a_saturated_row_keeps_its_digits():
    x = jnp.array([20.0, 0.0, 1.0])
    for f in forward_mode.softmax, forward_mode.log_softmax:
        forward, backward = jax.jacfwd(f)(x), jax.jacrev(f)(x)
        with jax.enable_x64(True):
            expected = jax.jacrev(getattr(jaxgrad, f.__name__))(np.asarray(x, np.float64))
        assert_allclose(forward, expected, rtol=1e-6)
        assert_allclose(backward, expected, rtol=1e-6)
    _, slope = jax.jvp(lambda x: jax.jvp(forward_mode.tanh, (x,), (x,))[0], (12.0,), (1.0,))
    assert_allclose(slope, 4 * np.exp(-24.0), rtol=1e-6)


def test_ignored_and_unknown_labels():
    logits = jnp.array([[jnp.nan, 1.0], [1.0, 2.0], [1.0, 2.0]])
    labels = jnp.array([-1, 0, 7])
    f = functools.partial(
        forward_mode.softmax_cross_entropy_with_integer_labels, labels=labels, ignore_index=-1
    )
    loss, loss_dot = jax.jvp(f, (logits,), (jnp.ones_like(logits),))
    assert_allclose(loss_dot, [0, 0, np.nan], atol=1e-7)
    assert loss[0] == 0


def test_what_is_masked_has_no_tangent_in_forward_over_reverse():
    x, where = jnp.arange(3.0), jnp.array([True, True, False])
    f = lambda x: jaxgrad.log_softmax(x, where=where)
    y, y_dot = jax.jvp(lambda x: jax.vjp(f, x)[0], (x,), (x,))
    assert y[2] == -jnp.inf
    assert y_dot[2] == 0


def test_axis_name_is_refused():
    x = jnp.zeros((2, 3))
    with pytest.raises(NotImplementedError, match="axis_name"):
        jax.vmap(functools.partial(forward_mode.softmax, axis_name="i"), axis_name="i")(x)
