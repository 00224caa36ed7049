"""AdamW: optax's where it is installed, else the same in a few lines."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Schedule = Callable[[ArrayLike], Array]


class Optimiser(NamedTuple):
    """``state = init(params)``; ``params, state = update(grads, state, params)``."""

    name: str
    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


def adamw(schedule: Schedule, weight_decay: float = 0.01) -> Optimiser:
    """AdamW with b1 = 0.9, b2 = 0.999 and a learning rate that depends on the step.

    Args:
      schedule: From the number of updates made, ``int32[]``, to the learning rate.
      weight_decay: Times the learning rate: what every update takes off the parameters.
    """
    try:
        import optax
    except ImportError:
        return plain_adamw(schedule, weight_decay)
    adam = optax.adamw(schedule, weight_decay=weight_decay)

    def update(grads, state, params):
        updates, state = adam.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Optimiser("optax.adamw", adam.init, update)


def plain_adamw(schedule: Schedule, weight_decay: float = 0.01) -> Optimiser:
    """:func:`adamw` without optax."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.int32(0), zeros, zeros

    def update(grads, state, params):
        count, mean, square = state
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, square, grads)
        in_mean, in_square = (1 - b ** (count + 1).astype(jnp.float32) for b in (0.9, 0.999))

        def moved(p, m, s):
            direction = (m / in_mean) / (jnp.sqrt(s / in_square) + 1e-8)
            return p - schedule(count) * (direction + weight_decay * p)

        return jax.tree.map(moved, params, mean, square), (count + 1, mean, square)

    return Optimiser("adamw", init, update)


def warm_up_and_decay(peak: float, steps: int) -> Schedule:
    """Up to ``peak`` in the first tenth of the steps, then down to a tenth of it along a cosine."""
    warm_up = max(1, steps // 10)

    def schedule(count: ArrayLike) -> Array:
        done = jnp.asarray(count, jnp.float32)
        rest = jnp.clip((done - warm_up) / max(1, steps - warm_up), 0, 1)
        return peak * jnp.minimum((done + 1) / warm_up, 0.55 + 0.45 * jnp.cos(math.pi * rest))

    return schedule
