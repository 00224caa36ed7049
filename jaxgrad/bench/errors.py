"""How far a contender is off, at the very arguments it was timed on.

Rows know nothing of each other, nor do the heads of attention: a few are taken out and computed
anew in float64. An error is relative to the largest entry of its row, of its head in attention. It
counts units in the last place of the dtype of the arguments, for a float32 loss of 16-bit logits
too.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.bench import peers, subjects
from jaxgrad.bench.measure import FUSED, INTEGER
from jaxgrad.bench.race import Case
from jaxgrad.bench.truth import FLOAT64, TRUTH
from jaxgrad.testing import errors_in_ulps

ROWS = 4


def error_in_ulps(case: Case, args: Sequence[jax.Array], results: Any) -> float | None:
    """The largest error of the value, and of the gradients that are per row; None: not known."""
    subject = case.subject
    value, gradients = results if case.what == "gradient" else (results, ())
    found = [value[1] if subject.is_loss else value, *gradients]
    if subject.family is subjects.HEADS:
        take, truth, axis = _head, _attention, None
    else:
        take, truth, axis = _few_rows, _of_rows, -1
    known = truth(case, [take(a, case.shape) for a in args])
    eps = float(jnp.finfo(case.dtype).eps)
    errors = []
    for got, want in zip(found, known, strict=False):
        if len(got.shape) == 0:  # a mean over all rows
            continue
        few = take(got, case.shape, exact=False)
        own = float(jnp.finfo(few.dtype).eps)
        ulps = errors_in_ulps(few, want, axis if want.ndim > 1 else ())
        errors.append(float(ulps.max()) * own / eps)
    return max(errors, default=None)


def _few_rows(a, shape, exact=True):
    a = _on_host(a[:ROWS] if a.shape[:1] == shape[:1] else a)
    return a.astype(np.float64) if exact and jnp.issubdtype(a.dtype, jnp.floating) else a


def _head(a, shape, exact=True):
    a = _on_host(a[0, :, 0])
    return a.astype(np.float64) if exact else a


def _on_host(a):
    if hasattr(a, "detach"):  # a tensor of PyTorch; NumPy knows no bfloat16 but JAX's
        a = jax.dlpack.from_dlpack(a.detach().contiguous())
    return np.asarray(a)


def _of_rows(case, args):
    subject, kernel = case.subject, case.subject.kernel
    l_bar = np.full(len(args[0]), 1 / case.shape[0])
    if kernel == "linear_log_probs":
        x, w, labels = args
        loss, *gradients = TRUTH[FUSED](FLOAT64, -l_bar, x, w, 0.0, labels)
        return -loss, gradients[0]
    if kernel == FUSED:
        x, w, labels = args
        return TRUTH[FUSED](FLOAT64, l_bar, x, w, 0.0, labels)[:2]
    if kernel == "softmax_vjp":
        return (peers.softmax_vjp(*args),)
    if subject.variant == subjects.CAPPED:
        x, labels = args
        z = peers.soft_cap(x, peers.CAP)
        loss, z_bar = TRUTH[INTEGER](FLOAT64, l_bar, np.asarray(z), labels)
        return loss, z_bar / np.cosh(x / peers.CAP) ** 2
    if subject.is_loss or case.what == "forward":
        return TRUTH[kernel](FLOAT64, l_bar if subject.is_loss else np.zeros(1), *args)
    *args, y_bar = args
    return TRUTH[kernel](FLOAT64, y_bar, *args)


def _attention(case, args):
    q, k, v, *o_bar = args
    z = q @ k.T / np.sqrt(q.shape[-1])
    if case.subject.variant == "causal":
        z = np.where(np.tri(*z.shape, dtype=bool), z, -np.inf)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = p @ v
    if not o_bar:
        return (o,)
    p_bar = o_bar[0] @ v.T
    z_bar = p * (p_bar - (p * p_bar).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return o, z_bar @ k, z_bar.T @ q, p.T @ o_bar[0]
