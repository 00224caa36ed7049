"""Every kernel under every transformation of JAX, alone and nested."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import KERNELS, as_double, weights
from jax import lax
from jax.test_util import check_grads
from numpy.testing import assert_allclose

pytestmark = pytest.mark.usefixtures("unoptimised")

every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=repr)
# The fewest kernels that run every rule: for what holds of a rule whatever its options are.
RULES = (
    "softmax-where",
    "log_softmax",
    "logsumexp",
    "logsumexp-b-where",
    "tanh",
    "soft_cap",
    "cross_entropy-where",
    "softmax_cross_entropy-where-rule",
    "softmax_cross_entropy_integer-where-rule-ignore_index",
)
every_rule = pytest.mark.parametrize(
    "kernel", [kernel for kernel in KERNELS if repr(kernel) in RULES], ids=repr
)
close = functools.partial(jax.tree.map, functools.partial(assert_allclose, rtol=1e-5, atol=1e-6))
close_in_double = functools.partial(
    jax.tree.map, functools.partial(assert_allclose, rtol=1e-12, atol=1e-12)
)


def split(kernel, dtype="float32"):
    """The kernel as a function of its differentiable arguments, and those arguments."""
    args = tuple(map(jnp.asarray, kernel.arguments(dtype)))

    def function(*primals):
        given = dict(zip(kernel.wrt, primals, strict=True))
        return kernel.function(*(given.get(i, z) for i, z in enumerate(args)))

    return function, tuple(args[i] for i in kernel.wrt)


def weighted(function):
    """The sum of the function's finite values, each with a weight of its own."""

    def scalar(*primals):
        y = function(*primals)
        return (jnp.where(jnp.isinf(y), 0, y) * jnp.asarray(weights(y.shape), y.dtype)).sum()

    return scalar


def gradient(function, primals):
    return jax.grad(weighted(function), tuple(range(len(primals))))


@functools.cache
def reference(kernel):
    """The function, its differentiable arguments, and its gradient by them."""
    function, primals = split(kernel)
    return function, primals, jax.jit(gradient(function, primals))(*primals)


def test_every_rule_has_its_kernel():
    assert set(RULES) <= set(map(repr, KERNELS))


@every_kernel
def test_jit_and_vmap(kernel):
    args = tuple(map(jnp.asarray, kernel.arguments("float32")))
    y = kernel.function(*args)
    close(jax.jit(kernel.function)(*args), y)
    mapped = jax.vmap(kernel.function, [None if z.ndim == 0 else 0 for z in args])
    close(jax.jit(mapped)(*args), y)


@every_kernel
def test_vmap_of_the_gradient_with_mixed_axes(kernel):
    args = kernel.arguments("float32")
    at, axes = kernel.wrt[0], [None] * len(args)
    columns, axes[at] = args[at].T, 1
    one_row = [z if z.ndim == 0 else z[0] for z in args]  # shared by the whole batch

    def gradient(*args):
        rest = functools.partial(_with, args, at)
        return jax.grad(weighted(lambda x: kernel.function(*rest(x))))(args[at])

    found = jax.jit(jax.vmap(gradient, axes, out_axes=1))(*_with(one_row, at, columns))
    of_one = jax.jit(gradient)
    close(found, np.stack([of_one(*_with(one_row, at, x)) for x in columns.T], axis=1))


def _with(args, at, x):
    return [x if i == at else z for i, z in enumerate(args)]


@every_kernel
def test_second_order(kernel, x64):
    """The Hessian by a vector in every mode, beside differences in 50 digits."""
    function, (x, *rest) = split(kernel, "float64")
    v = jnp.asarray(weights(x.shape)[::-1])
    slope = jax.grad(lambda x: weighted(function)(x, *rest))

    @jax.jit
    def products(x):
        return {
            "forward over reverse": jax.jvp(slope, (x,), (v,))[1],
            "reverse over reverse": jax.grad(lambda x: jnp.vdot(slope(x), v))(x),
            "jacfwd of the gradient": jnp.tensordot(jax.jacfwd(slope)(x), v, x.ndim),
            "jacrev of the gradient": jnp.tensordot(jax.jacrev(slope)(x), v, x.ndim),
        }

    args = tuple(map(as_double, kernel.arguments()))
    y = kernel.twin(*args)
    y_bar = np.where(np.isinf(y), 0, weights(y.shape))
    expected = oracles.second_derivative(kernel.twin, args, kernel.wrt[0], y_bar, v)
    for mode, product in products(x).items():
        assert_allclose(product, expected, rtol=1e-12, atol=1e-13, err_msg=mode)


@pytest.mark.parametrize(
    "kernel", [kernel for kernel in KERNELS if repr(kernel) in RULES[::2]], ids=repr
)
def test_check_grads(kernel, x64):
    """By every argument and by the cotangent; the bar is that of differences in float64."""
    function, primals = split(kernel, "float64")
    check_grads(weighted(function), primals, order=2, modes=["rev"], atol=1e-5, rtol=1e-5)


@every_kernel
def test_forward_mode_of_a_rule_is_refused_by_jax(kernel):
    function, primals = split(kernel)
    if kernel.name in ("softmax_jacobian", "softmax_vjp"):
        jax.jvp(function, primals, primals)  # plain functions, without a rule
        return
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(function, primals, primals)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(function)(*primals)


@every_rule
def test_jacrev(kernel):
    function, primals, _ = reference(kernel)

    @jax.jit
    def both_ways(*primals):
        y, pull = jax.vjp(function, *primals)
        y_bar = jnp.asarray(weights(y.shape), y.dtype)
        jacobians = jax.jacrev(function, tuple(range(len(primals))))(*primals)
        return tuple(jnp.tensordot(y_bar, j, y.ndim) for j in jacobians), pull(y_bar)

    close(*both_ways(*primals))


@every_rule
def test_scan(kernel):
    """As the body of a loop that JAX differentiates as a whole."""
    function, primals, _ = reference(kernel)

    def step(x, y):
        return x + 0.1 * jnp.resize(jnp.where(jnp.isinf(y), 0, y), x.shape)

    def loop(x, *rest):
        def body(x, _):
            y = function(x, *rest)
            return step(x, y), y

        return lax.scan(body, x, length=2)[1]

    def unrolled(x, *rest):
        y = function(x, *rest)
        return jnp.stack([y, function(step(x, y), *rest)])

    close(*jax.jit(lambda *z: [gradient(f, z)(*z) for f in (loop, unrolled)])(*primals))


@every_rule
def test_cond(kernel):
    function, primals, expected = reference(kernel)

    @jax.jit
    def taken_or_not(taken, *primals):
        def zeros(*primals):
            return jnp.zeros_like(function(*primals))

        return gradient(lambda *z: lax.cond(taken, function, zeros, *z), primals)(*primals)

    close(taken_or_not(True, *primals), expected)
    close(taken_or_not(False, *primals), jax.tree.map(jnp.zeros_like, primals))


@every_rule
def test_remat(kernel):
    function, primals, expected = reference(kernel)
    policies = jax.checkpoint_policies

    @jax.jit
    def gradients(*primals):
        return [
            gradient(jax.checkpoint(function, policy=policy), primals)(*primals)
            for policy in (
                policies.nothing_saveable,
                policies.everything_saveable,
                policies.dots_with_no_batch_dims_saveable,
            )
        ]

    for found in gradients(*primals):
        close(found, expected)


@every_rule
def test_remat_by_name(kernel):
    """A policy that names a kernel keeps what its rule would keep without a checkpoint."""
    function, primals = split(kernel)
    policy = jax.checkpoint_policies.save_only_these_names(kernel.name)

    def kept(function):
        return sum(z.nbytes for z in jax.tree.leaves(jax.vjp(function, *primals)[1]))

    outside = 3 * (1 + 4) if repr(kernel) == "logsumexp-b-where" else 0  # signs, after the rule
    assert kept(jax.checkpoint(function, policy=policy)) == kept(function) - outside


@every_rule
def test_export(kernel):
    function, primals, expected = reference(kernel)
    exported = jax.export.export(jax.jit(function))(*primals)
    loaded = jax.export.deserialize(exported.serialize(vjp_order=1))
    close(loaded.call(*primals), function(*primals))
    close(jax.jit(gradient(loaded.call, primals))(*primals), expected)


@every_rule
def test_donated_buffer(kernel):
    function, primals, (slope, *_) = reference(kernel)
    x = jnp.copy(primals[0])
    expected = x - slope
    step = jax.jit(lambda x, *rest: x - gradient(function, primals)(x, *rest)[0], donate_argnums=0)
    close(step(x, *primals[1:]), expected)
    assert x.is_deleted()


@every_rule
def test_debug_nans(kernel):
    """Eagerly, too."""
    function, primals, expected = reference(kernel)
    with jax.debug_nans(True):
        close(gradient(function, primals)(*primals), expected)


@every_rule
def test_shard_map(kernel):
    """Every axis of the mesh is manual: a rule must keep what varies over it."""
    function, primals, expected = reference(kernel)
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = tuple(jax.P("rows") if z.ndim else jax.P() for z in primals)
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=jax.P("rows"))
    close(jax.jit(gradient(sharded, primals))(*primals), expected)


@every_rule
def test_no_tracer_leaks(kernel):
    function, primals = split(kernel)
    with jax.checking_leaks():
        jax.jit(jax.hessian(weighted(function))).trace(*primals)


@every_kernel
def test_double_precision_mode_widens_nothing(kernel, x64):
    function, primals = split(kernel, "float32")
    y, bars = jax.eval_shape(lambda *z: (function(*z), gradient(function, z)(*z)), *primals)
    assert {z.dtype for z in (y, *bars)} == {jnp.dtype("float32")}
