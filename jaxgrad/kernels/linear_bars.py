"""The cotangents of the fused head: which are asked for, zeros to sum them in, what goes back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal

from jaxgrad.kernels.linear_labels import SparseLabels
from jaxgrad.kernels.linear_tile import Bars, Head, Plan, Tokens, Wanted
from jaxgrad.kernels.row_rule import Rule


def zeros(plan: Plan, wanted: Wanted, head: Head, tokens: Tokens, rule: Rule) -> Bars:
    """What the tiles are summed in, 0 yet."""

    def zero(dtype, tree):
        like = lambda z: jnp.zeros_like(z, plan.accumulate)
        return None if dtype is None else jax.tree.map(like, tree)

    row_zero = jnp.zeros_like(tokens.x, plan.wide, shape=())
    labels = tokens.labels
    if isinstance(labels, SparseLabels):
        labels = labels._replace(indices=None)
    return Bars(
        zero(wanted.x, tokens.x),
        zero(wanted.w, head.w),
        zero(wanted.labels, labels),
        zero(wanted.bias, head.bias),
        None if wanted.rule is None else jax.tree.map(lambda _: row_zero, rule),
    )


def resized(x: Array | None, axis: int, size: int) -> Array | None:
    """Zeros like ``x``, but for the length of one axis."""
    shape = None if x is None else (*x.shape[:axis], size, *x.shape[axis + 1 :])
    return None if x is None else jnp.zeros_like(x, shape=shape)


def cast(bar: Any, dtype: Any) -> Any:
    """``bar`` in the dtype, if any, that it goes back in."""
    return jax.tree.map(lambda z: z.astype(dtype), bar)


def cotangents(wanted: Wanted, bars: Bars) -> tuple[Head, Tokens, Any]:
    """``bars`` in the places and the dtypes of the arguments."""
    head = Head(cast(bars.w, wanted.w), cast(bars.bias, wanted.bias))
    tokens = Tokens(cast(bars.x, wanted.x), cast(bars.labels, wanted.labels), None)
    return head, tokens, cast(bars.rule, wanted.rule)


def asked(head, tokens, rule):
    """Arguments of a rule with symbolic zeros, and the dtypes of those that are differentiated."""

    def primal(z):
        return isinstance(z, CustomVJPPrimal)

    def dtype(tree):
        leaves = [z for z in jax.tree.leaves(tree, is_leaf=primal) if z.perturbed]
        return leaves[0].value.dtype if leaves else None

    wanted = Wanted(*(dtype(z) for z in (tokens.x, head.w, tokens.labels, head.bias, rule)))
    return jax.tree.map(lambda z: z.value, (head, tokens, rule), is_leaf=primal), wanted
