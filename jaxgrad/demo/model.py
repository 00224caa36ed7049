"""A language model of one causal block, written once for any set of rules.

With E the embedding [v, d], tied to the head, and P the positions [t, d]:

    x_0 = E[word] + P
    x_1 = x_0 + attention(norm(x_0))
    x_2 = x_1 + gelu(norm(x_1) W_in) W_out
    loss = cross-entropy of norm(x_2) Eᵀ with the next word
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Params = dict[str, Array]


class Rules(NamedTuple):
    """The places where the model meets a derivative that someone wrote by hand.

    ``attention`` maps query, key and value ``[b, t, h, n]`` to ``[b, t, h, n]``; ``tanh`` is
    element-wise; ``loss`` maps hidden ``[b, t, d]``, embedding ``[v, d]`` and labels ``int[b, t]``
    to their mean loss.
    """

    attention: Callable[..., Any]
    tanh: Callable[..., Any]
    loss: Callable[..., Any]


class Sizes(NamedTuple):
    """How large the model is."""

    vocabulary: int
    context: int
    dim: int

    @property
    def heads(self) -> int:
        """As many heads of about 32 features as divide ``dim``."""
        return next(h for h in range(max(1, self.dim // 32), 0, -1) if self.dim % h == 0)


def init(rng: np.random.Generator, sizes: Sizes) -> Params:
    """Parameters in float32, drawn by NumPy: the same on every device, and nothing to compile."""
    d = sizes.dim
    n = d // sizes.heads
    shapes_and_fans = {
        "embedding": ((sizes.vocabulary, d), d),
        "positions": ((sizes.context, d), d),
        "qkv": ((d, 3, sizes.heads, n), d),
        "out": ((sizes.heads, n, d), d),
        "mlp_in": ((d, 4 * d), d),
        "mlp_out": ((4 * d, d), 4 * d),
    }
    matrices = {
        name: jnp.asarray(rng.normal(0, 1 / math.sqrt(fan), shape), jnp.float32)
        for name, (shape, fan) in shapes_and_fans.items()
    }
    return matrices | {f"norm_{i}": jnp.ones(d, jnp.float32) for i in range(3)}


def hidden(params: Params, words: Array, rules: Rules) -> Array:
    """What the head is applied to, ``[b, t, d]``, after ``words``, ``int[b, t]``."""
    x = params["embedding"][words] + params["positions"][None, : words.shape[-1]]
    q, k, v = jnp.einsum("btd,dchn->cbthn", rms_norm(x, params["norm_0"]), params["qkv"])
    x = x + jnp.einsum("bthn,hnd->btd", rules.attention(q, k, v), params["out"])
    x = x + gelu(rms_norm(x, params["norm_1"]) @ params["mlp_in"], rules.tanh) @ params["mlp_out"]
    return rms_norm(x, params["norm_2"])


def loss(params: Params, windows: Array, rules: Rules) -> Array:
    """Mean loss (nats per token) of every next word in ``windows``, ``int[b, t + 1]``."""
    x = hidden(params, windows[:, :-1], rules)
    return rules.loss(x, params["embedding"], windows[:, 1:])


def continuation(params: Params, words: Array, count: int, key: Array, rules: Rules) -> Array:
    """``count`` words drawn from the model to follow ``words``, ``int[t]``; never word 0."""

    def append(words, key):
        x = hidden(params, words[None], rules)[0, -1]
        logits = (params["embedding"] @ x).astype(jnp.float32).at[0].set(-jnp.inf)
        word = jax.random.categorical(key, logits / 0.7)
        return jnp.append(words[1:], word.astype(words.dtype)), word

    return jax.lax.scan(append, words, jax.random.split(key, count))[1]


def rms_norm(x: Array, scale: Array) -> Array:
    """``x`` over its root mean square, in float32."""
    x_ = x.astype(jnp.float32)
    inverse_root = jax.lax.rsqrt(jnp.square(x_).mean(-1, keepdims=True) + 1e-6)
    return (x_ * inverse_root).astype(x.dtype) * scale[None, None]


def gelu(x: Array, tanh: Callable[..., Any]) -> Array:
    """x Φ(x), with the usual tanh in place of Φ."""
    return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
