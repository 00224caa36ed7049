"""The two sets of rules that the model is trained with: jaxgrad's, and plain JAX.

``JAXGRAD`` shows all that a model has to change. ``PLAIN`` is ``jax.nn`` and the formula of
``optax.softmax_cross_entropy_with_integer_labels``, differentiated by JAX.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

import jaxgrad
from jaxgrad.demo.model import Rules


def _attention(softmax, query: Array, key: Array, value: Array) -> Array:
    t, n = query.shape[1], query.shape[-1]
    scores = jnp.einsum("bqhn,bkhn->bhqk", query, key) / math.sqrt(n)
    causal = jnp.tril(jnp.ones((t, t), bool))
    return jnp.einsum("bhqk,bkhn->bqhn", softmax(scores, where=causal[None, None]), value)


def _loss(cross_entropy, hidden: Array, embedding: Array, labels: Array) -> Array:
    return cross_entropy(jnp.einsum("btd,vd->btv", hidden, embedding), labels)


def _plain_cross_entropy(logits: Array, labels: Array) -> Array:
    logits -= jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    at_label = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.log(jnp.exp(logits).sum(-1)) - at_label


JAXGRAD = Rules(
    attention=functools.partial(_attention, jaxgrad.softmax),
    tanh=jaxgrad.tanh,
    loss=functools.partial(_loss, jaxgrad.softmax_cross_entropy_with_integer_labels),
)
PLAIN = Rules(
    attention=functools.partial(_attention, jax.nn.softmax),
    tanh=jnp.tanh,
    loss=functools.partial(_loss, _plain_cross_entropy),
)
