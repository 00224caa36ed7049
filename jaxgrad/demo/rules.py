"""The two sets of rules that the model is trained with: jaxgrad's, and plain JAX.

``JAXGRAD`` shows all that a model has to change. ``PLAIN`` is ``jax.nn`` and the formula of
``optax.softmax_cross_entropy_with_integer_labels``, differentiated by JAX.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

import jaxgrad
from jaxgrad.demo.model import Rules


def _plain_loss(hidden: Array, embedding: Array, labels: Array) -> Array:
    logits = jnp.einsum("btd,vd->btv", hidden, embedding)
    logits -= jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    at_label = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (jnp.log(jnp.exp(logits).sum(-1)) - at_label).astype(jnp.float32).mean()


JAXGRAD = Rules(
    attention=functools.partial(jaxgrad.dot_product_attention, is_causal=True),
    tanh=jaxgrad.tanh,
    loss=functools.partial(jaxgrad.linear_softmax_cross_entropy, vocab_axis=0, reduction="mean"),
)
PLAIN = Rules(
    attention=functools.partial(jax.nn.dot_product_attention, is_causal=True),
    tanh=jnp.tanh,
    loss=_plain_loss,
)
