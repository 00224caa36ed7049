"""The twins: every mode, every order, the same rule, at the same residuals and memory."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNELS, weights
from formulas import PLAIN, check_every_order, close_to, push, transformed
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
    "tanh",
    "soft_cap",
    "cross_entropy-where",
    "softmax_cross_entropy-where-rule",
    "softmax_cross_entropy_integer-where-rule-ignore_index",
)
FIRST = {kernel.name: kernel for kernel in reversed(KERNELS)}  # with the fewest options
ROWS = [name for name in PLAIN if name not in ("softmax_jacobian", "softmax_vjp")]
every_rule = pytest.mark.parametrize(
    "kernel", [kernel for kernel in KERNELS if repr(kernel) in RULES], ids=repr
)
close_on_mesh = functools.partial(
    jax.tree.map, functools.partial(assert_allclose, rtol=1e-12, atol=1e-12, strict=True)
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

    paths = [weighted(along(f, primals, v)) for f in (function, plain)]
    check_every_order(*paths, third=kernel is FIRST[kernel.name])
    close(*jax.jit(lambda: [jax.grad(weighted(f), n)(*primals) for f in (function, default)])())


@every_rule
def test_under_transformations(kernel, x64, unoptimised):
    function, primals = split(kernel, twin(kernel))
    close_to(*jax.jit(transformed, static_argnums=0)(along(function, primals, tangents(primals))))


@every_kernel
def test_residuals_are_those_of_the_rule(kernel):
    def kept(module):
        function, primals = split(kernel, getattr(module, kernel.name), "bfloat16")
        closure = jax.eval_shape(lambda *primals: jax.vjp(function, *primals)[1], *primals)
        return sorted(f"{z.dtype}{z.shape}" for z in jax.tree.leaves(closure))

    assert kept(forward_mode) == kept(jaxgrad)


@pytest.mark.parametrize("name", ROWS)
def test_reverse_mode_needs_the_memory_of_the_rule(name):
    """In bfloat16, where a widened copy would show."""
    x, labels = jnp.zeros((64, 1024), "bfloat16"), jnp.zeros(64, jnp.int32)
    rest = {
        INTEGER: (labels,),
        "softmax_cross_entropy": (x,),
        "cross_entropy": (x,),
        "soft_cap": (2.0,),
        "logsumexp": (-1,),
    }.get(name, ())

    def peak(module):
        function = getattr(module, name)
        pull = lambda x, y_bar: jax.vjp(lambda x: function(x, *rest), x)[1](y_bar)
        y_bar = jax.eval_shape(lambda: function(x, *rest))
        memory = jax.jit(pull).lower(x, y_bar).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + x.nbytes

    assert peak(forward_mode) <= 1.1 * peak(jaxgrad)


@pytest.mark.parametrize(
    "name, x, kept",
    [
        ("softmax", [[-np.inf, -np.inf], [-np.inf, 1.0]], [0, 0]),
        ("log_softmax", [[-np.inf, -np.inf], [-np.inf, 1.0]], [0, 0]),
        ("logsumexp", [[-np.inf, -np.inf]], [0]),
        ("tanh", [[-np.inf, np.inf]], [0]),
    ],
)
def test_edges(name, x, kept, unoptimised):
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


def test_ignored_and_unknown_labels(unoptimised):
    logits = jnp.array([[jnp.nan, 1.0], [1.0, 2.0], [1.0, 2.0]])
    labels = jnp.array([-1, 0, 7])
    f = functools.partial(
        forward_mode.softmax_cross_entropy_with_integer_labels, labels=labels, ignore_index=-1
    )
    loss, loss_dot = jax.jvp(f, (logits,), (jnp.ones_like(logits),))
    assert_allclose(loss_dot, [0, 0, np.nan], atol=1e-7)
    assert loss[0] == 0


def test_what_is_masked_has_no_tangent_in_forward_over_reverse(unoptimised):
    x, where = jnp.arange(3.0), jnp.array([True, True, False])
    f = lambda x: jaxgrad.log_softmax(x, where=where)
    y, y_dot = jax.jvp(lambda x: jax.vjp(f, x)[0], (x,), (x,))
    assert y[2] == -jnp.inf
    assert y_dot[2] == 0


def cut(module, axis_name, names, s, a):
    """A number of each kernel whose classes may be cut over an axis."""
    over = lambda z: z if axis_name is None else jax.lax.psum(z, axis_name)
    x, t, h, w = (a[k] * (1 + s * jnp.cos(a[k])) for k in ("x", "t", "h", "w"))
    rule = {"label_smoothing": 0.1 + s, "z_loss": 0.1, "temperature": 0.7 + s}
    call = lambda name, *args, **kwargs: getattr(module, name)(*args, axis_name=axis_name, **kwargs)
    head = functools.partial(call, "linear_softmax_cross_entropy", h, w, chunk_size=(2, 4))
    rows = {
        "softmax": lambda: over((call("softmax", x, where=a["where"]) * t).sum()),
        "log_softmax": lambda: over((call("log_softmax", x) * t).sum()),
        "logsumexp": lambda: call("logsumexp", x, axis=-1).sum(),
        "factors": lambda: call("logsumexp", x, axis=-1, b=t).sum(),
        "dense": lambda: call("softmax_cross_entropy", x, t, logit_soft_cap=2.0 + s, **rule).sum(),
        "integer": lambda: call(INTEGER, x, a["labels"], **rule).sum(),
        "in total": lambda: head(t, reduction="mean", **rule),
        "token by token": lambda: weigh(*head(a["labels"], h.sum() * w[0], return_aux=True)),
        "sparse": lambda: head(forward_mode.SparseLabels(a["labels"][:, None], h[:, :1])).sum(),
    }
    return jnp.stack([rows[name]() for name in names or rows])


def weigh(loss, aux):
    return loss.sum() + jnp.sin(aux.lse).sum() + jnp.cos(aux.entropy).sum()


def test_classes_cut_over_an_axis(x64, unoptimised, standard_promotion):
    """Of a mesh, or of a vmap: the derivatives of one device."""
    if jax.device_count() < 4:
        pytest.skip("a mesh of four devices needs as many")
    normal = np.random.default_rng(0).standard_normal
    a = {"x": normal((2, 8)), "t": normal((2, 8)) ** 2, "h": normal((2, 3)), "w": normal((3, 8))}
    a |= {"labels": jnp.array([1, 6]), "where": normal((2, 8)) < 1}
    classes = {k: jax.P(None, "i") if k in ["x", "t", "w", "where"] else jax.P() for k in a}
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = {k: z.reshape(-1, 4, 2).swapaxes(0, 1) if classes[k] else z for k, z in a.items()}
    in_axes = (None, {k: 0 if classes[k] else None for k in a})
    at = jnp.zeros(())

    def on_mesh(*names):
        on_shards = functools.partial(cut, forward_mode, "i", names)
        specs = {"in_specs": (jax.P(), classes), "out_specs": jax.P()}
        return lambda s: jax.shard_map(on_shards, mesh=mesh, **specs)(s, a)

    def mapped(*names):
        on_shards = functools.partial(cut, forward_mode, "i", names)
        return lambda s: jax.vmap(on_shards, in_axes, axis_name="i")(s, parts)[0]

    def whole(*names):
        return lambda s: cut(forward_mode, None, names, s, a)

    def total(f):
        return lambda s: (f(s) * jnp.cos(jnp.arange(len(f(s))))).sum()

    once = ("factors", "dense", "integer", "token by token", "sparse")
    twice = ("softmax", "log_softmax", "logsumexp", "in total")

    def derivatives(of):
        forward = push(of())(at)
        rest = jax.grad(total(of(*once)))(at)
        return forward, rest, push(jax.grad(total(of(*twice))))(at)

    def in_vmap(of):
        f = of("log_softmax", "integer")
        return push(f)(at), jax.grad(total(f))(at)

    found, expected = (
        jax.jit(lambda shards=shards, to=to: (derivatives(shards), in_vmap(to)))()
        for shards, to in ((on_mesh, mapped), (whole, whole))
    )
    close_on_mesh(found, expected)


def test_reverse_mode_inside_of_vmap_adds_up_the_shards(unoptimised):
    x = jnp.arange(6.0).reshape(3, 2)
    f = lambda x: forward_mode.logsumexp(x, axis=-1, axis_name="i")
    found = jax.vmap(jax.grad(f), axis_name="i")(x)
    assert_allclose(found, 3 * jax.nn.softmax(x, None), rtol=1e-6)
