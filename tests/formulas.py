"""The kernels written plainly in ``jax.numpy``: what JAX itself differentiates as a reference."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.test_util import check_jvp
from numpy.testing import assert_allclose

# Far enough for exp, and finite, so that JAX's own derivatives of the formulas are.
FAR = -1e4


def log_softmax(x, where=None):
    return jax.nn.log_softmax(x if where is None else jnp.where(where, x, FAR))


def softmax(x, where=None):
    return jnp.exp(log_softmax(x, where))


def masked_log_softmax(x, where=None):
    y = log_softmax(x, where)
    return y if where is None else jnp.where(where, y, -jnp.inf)


def logsumexp(a, axis, b=None, where=None):
    return jax.nn.logsumexp(a, axis, b if where is None else jnp.where(where, b, 0))


def jacobian(x):
    y = softmax(x)
    return y[..., :, None] * (jnp.eye(x.shape[-1]) - y[..., None, :])


def vjp(y, y_bar):
    return y * (y_bar - (y * y_bar).sum(-1, keepdims=True))


def cross_entropy(probs, labels, where):
    return -jnp.where(where, labels * jnp.log(jnp.where(where, probs, 1)), 0).sum(-1)


def dense(
    logits, labels, where=None, label_smoothing=0, z_loss=0, temperature=1, logit_soft_cap=None
):
    z = logits if logit_soft_cap is None else logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    z = z / temperature
    where = jnp.ones(z.shape, bool) if where is None else where
    t, valid = jnp.where(where, labels, 0), where.sum(-1, keepdims=True)
    q = (1 - label_smoothing) * t + label_smoothing * where * t.sum(-1, keepdims=True) / valid
    lse = jax.nn.logsumexp(jnp.where(where, z, FAR), -1)
    return -(q * log_softmax(z, where)).sum(-1) + z_loss * lse**2


def integer(logits, labels, ignore_index=None, **options):
    losses = dense(logits, jax.nn.one_hot(labels, logits.shape[-1]), **options)
    return losses if ignore_index is None else jnp.where(labels == ignore_index, 0, losses)


PLAIN = {
    "softmax": softmax,
    "softmax_jacobian": jacobian,
    "softmax_vjp": vjp,
    "log_softmax": masked_log_softmax,
    "logsumexp": logsumexp,
    "tanh": lambda x: jnp.tanh(x),
    "soft_cap": lambda x, cap: cap * jnp.tanh(x / cap),
    "cross_entropy": cross_entropy,
    "softmax_cross_entropy": dense,
    "softmax_cross_entropy_with_integer_labels": integer,
}


def push(f):
    """``f``, of one number, and its derivative, by forward mode."""
    return lambda s: jax.jvp(f, (s,), (jnp.ones_like(s),))


def forwards(f, orders=2):
    """``f``, of one number, and its derivatives, by forward mode throughout."""
    if orders == 0:
        return lambda s: (f(s),)
    lower = forwards(f, orders - 1)

    def of(s):
        values, slopes = push(lower)(s)
        return *values, slopes[-1]

    return of


def backwards(f, orders=2):
    """As :func:`forwards`, by reverse mode throughout."""
    if orders == 0:
        return lambda s: (f(s),)

    def last(s):
        *values, value = backwards(f, orders - 1)(s)
        return value, values

    def of(s):
        (value, values), slope = jax.value_and_grad(last, has_aux=True)(s)
        return *values, value, slope

    return of


def mixed(f):
    """Two orders by one mode over the other: forward over reverse, then reverse over forward."""
    return lambda s: (*push(jax.grad(f))(s), jax.grad(lambda s: push(f)(s)[1])(s))


def check_every_order(f, plain, third=True):
    """The derivatives of ``f``, of one number, at 0.

    The first two, by every composition of modes, are those of the formula ``plain``. By forward
    mode throughout, and by reverse mode throughout, each of them, and a ``third``, are differences
    of the one before, as ``check_grads`` of JAX takes them: of eps = 1e-4 in float64, off by
    eps² / 6 times the derivative two orders higher, of which none here is a thousand times the one
    checked.
    """
    at, orders = jnp.zeros(()), 3 if third else 2
    by_forward, by_reverse = jax.jit(forwards(f, orders)), jax.jit(backwards(f, orders))
    expected, (fr, rf) = jax.jit(lambda s: (forwards(plain)(s), mixed(f)(s)[1:]))(at)
    found = {
        "forward": by_forward(at)[:3],
        "reverse": by_reverse(at)[:3],
        "both": (*expected[:2], fr),
        "both, in turn": (*expected[:2], rf),
    }
    close_to(found, expected)
    for of in by_forward, by_reverse:
        lower = lambda s, of=of: of(s)[:-1]
        tangents = lambda s, s_dot, of=of: (of(*s)[:-1], tuple(s_dot[0] * z for z in of(*s)[1:]))
        check_jvp(lower, tangents, (at,), atol=1e-5, rtol=1e-5)


def transformed(f):
    """Of ``f``, of one number, and its derivative at two points: transformed, and plainly."""
    s = jnp.arange(2.0) / 8
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=jax.P("rows"), out_specs=jax.P("rows")
    )
    remat = jax.checkpoint(f)
    nothing = lambda x: jax.tree.map(jnp.zeros_like, jax.eval_shape(f, x))
    y, linear = jax.linearize(
        lambda s: lax.map(lambda x: lax.cond(x < 1, f, lambda x: nothing(x), x), s), s
    )
    found = {
        "vmap of jvp": jax.vmap(push(f))(s),
        "jvp of shard_map of vmap": push(rows(jax.vmap(f)))(s),
        "jvp of scan of remat": push(lambda s: lax.scan(lambda c, x: (c, remat(x)), 0, s)[1])(s),
        "linearize of map of cond": (y, linear(jnp.ones_like(s))),
    }
    each = [push(f)(x) for x in s]
    return found, jax.tree.map(lambda *z: jnp.stack(z), *each)


def close_to(found, expected):
    """What is found under every name is as expected, to rounding."""
    for name, each in found.items():
        compare = functools.partial(assert_allclose, rtol=1e-10, atol=1e-10, err_msg=name)
        jax.tree.map(compare, each, expected)
