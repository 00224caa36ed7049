"""Soft-max and loss kernels for JAX with backward rules derived by hand."""

from .kernels.attention import dot_product_attention as dot_product_attention
from .kernels.cross_entropy import cross_entropy as cross_entropy
from .kernels.linear_log_probs import linear_log_probs as linear_log_probs
from .kernels.linear_softmax_cross_entropy import SparseLabels as SparseLabels
from .kernels.linear_softmax_cross_entropy import (
    linear_softmax_cross_entropy as linear_softmax_cross_entropy,
)
from .kernels.log_softmax import log_softmax as log_softmax
from .kernels.logsumexp import logsumexp as logsumexp
from .kernels.softmax import softmax as softmax
from .kernels.softmax import softmax_jacobian as softmax_jacobian
from .kernels.softmax import softmax_vjp as softmax_vjp
from .kernels.softmax_cross_entropy import softmax_cross_entropy as softmax_cross_entropy
from .kernels.softmax_cross_entropy_with_integer_labels import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from .kernels.tanh import soft_cap as soft_cap
from .kernels.tanh import tanh as tanh

__version__ = "0.1.0"

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
