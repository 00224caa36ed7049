"""The kernels written plainly in ``jax.numpy``: what JAX itself differentiates as a reference."""

import jax
import jax.numpy as jnp

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


def derivative(f, modes):
    """Of ``f``, of one number, at 0: an order for each mode, forward "f" or reverse "r"."""
    for mode in modes:
        f = {"f": jax.jacfwd, "r": jax.jacrev}[mode](f)
    return f(jnp.zeros(()))
