"""The functions of ``jaxgrad``, open to every mode of differentiation.

Same names, arguments and results; the derivatives are the same by hand, given to JAX as forward
rules, which it transposes where it goes backward (``jaxgrad/modes.py``). Import from here for
``jax.jvp``, ``jax.jacfwd``, ``jax.linearize``, and whatever takes them: Gauss-Newton products,
differential equations, forward over forward.

With ``axis_name`` of a ``vmap``, reverse mode belongs outside of that ``vmap``. Inside, JAX adds up
the cotangents of all shards, and those of a loss that every shard returns count as often.
"""

import jax as jax
import jax.numpy as jnp  # noqa: F401, the examples of the functions use both

from jaxgrad import modes
from jaxgrad.kernels import attention as _attention
from jaxgrad.kernels import cross_entropy as _cross_entropy
from jaxgrad.kernels import linear_log_probs as _linear_log_probs
from jaxgrad.kernels import linear_softmax_cross_entropy as _linear_softmax_cross_entropy
from jaxgrad.kernels import log_softmax as _log_softmax
from jaxgrad.kernels import logsumexp as _logsumexp
from jaxgrad.kernels import softmax as _softmax
from jaxgrad.kernels import softmax_cross_entropy as _softmax_cross_entropy
from jaxgrad.kernels import (
    softmax_cross_entropy_with_integer_labels as _softmax_cross_entropy_with_integer_labels,
)
from jaxgrad.kernels import tanh as _tanh
from jaxgrad.kernels.linear_labels import SparseLabels as SparseLabels
from jaxgrad.kernels.softmax import softmax_jacobian as softmax_jacobian
from jaxgrad.kernels.softmax import softmax_vjp as softmax_vjp

cross_entropy = modes.twin(_cross_entropy.cross_entropy, __name__)
dot_product_attention = modes.twin(_attention.dot_product_attention, __name__)
linear_log_probs = modes.twin(_linear_log_probs.linear_log_probs, __name__)
linear_softmax_cross_entropy = modes.twin(
    _linear_softmax_cross_entropy.linear_softmax_cross_entropy, __name__
)
log_softmax = modes.twin(_log_softmax.log_softmax, __name__)
logsumexp = modes.twin(_logsumexp.logsumexp, __name__)
soft_cap = modes.twin(_tanh.soft_cap, __name__)
softmax = modes.twin(_softmax.softmax, __name__)
softmax_cross_entropy = modes.twin(_softmax_cross_entropy.softmax_cross_entropy, __name__)
softmax_cross_entropy_with_integer_labels = modes.twin(
    _softmax_cross_entropy_with_integer_labels.softmax_cross_entropy_with_integer_labels, __name__
)
tanh = modes.twin(_tanh.tanh, __name__)

__all__ = [
    "SparseLabels",
    "cross_entropy",
    "dot_product_attention",
    "linear_log_probs",
    "linear_softmax_cross_entropy",
    "log_softmax",
    "logsumexp",
    "soft_cap",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_jacobian",
    "softmax_vjp",
    "tanh",
]
