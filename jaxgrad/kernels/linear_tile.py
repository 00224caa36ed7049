r"""One tile of the fused head: some tokens × some classes, forward and backward.

    x_ij = ⟨h_i, w_j⟩ + b_j                                            (1)
    h̄_i += Σ_j x̄_ij w_j        w̄_j += Σ_i x̄_ij h_i       b̄_j += Σ_i x̄_ij     (2)

for tokens i and classes j, with x̄ by the row rule. A tile of logits is all of them that exists.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgrad import backends, numerics, sharding, tiling
from jaxgrad.kernels import row_rule
from jaxgrad.kernels.linear_labels import (
    IGNORED,
    UNKNOWN,
    Labels,
    SparseLabels,
    entries,
    is_dense,
    is_integer,
)
from jaxgrad.kernels.loss_options import add_rules
from jaxgrad.kernels.row_rule import Part, Rule


class Plan(NamedTuple):
    """What is known when the loops are traced."""

    v: int
    vocab_axis: int
    ignores: bool  # whether an ignore_index is given
    tile: tuple[int, int]  # tokens, classes
    wide: Any  # dtype of logits and of everything in a row
    accumulate: Any  # dtype of the sums over tiles
    precision: Any
    entropy: bool = False
    argmax: bool = False
    gauss_newton: bool = False  # whether (2) takes h and w for constants
    axis_name: sharding.AxisName = None  # that the classes are cut over
    fsdp_axis: sharding.AxisName = None  # that the features of w are cut over
    keeps_logits: bool = False  # whether a loss that is reduced makes its gradients in the forward
    implementation: str = "xla"


class Head(NamedTuple):
    """The layer."""

    w: Array
    bias: Array | None


class Tokens(NamedTuple):
    """What enters the layer and is expected of it, one row a token."""

    x: Array
    labels: Labels
    where: Array | None  # [1, v] or [t, v]
    first: Array | None = None  # [1, 1], the index of this shard's first class
    turned: Array | None = None  # x transposed, where w̄ is [d, v] and to be made of that


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """The dtypes that cotangents go back in; None where nobody asks for one."""

    x: Any
    w: Any
    labels: Any
    bias: Any
    rule: Any


class Bars(NamedTuple):
    """Cotangents, summed as the tiles come by; None where nobody asks."""

    x: Any = None
    w: Any = None
    labels: Any = None  # SparseLabels without indices for SparseLabels
    bias: Any = None
    rule: Any = None


def row_state(plan: Plan, labels: Labels) -> tuple[Array | None, Array | None]:
    """Which tokens are ignored, and which have a label out of range: ``bool[t, 1]`` or None."""
    if is_dense(labels):
        return None, None
    index = labels.indices if isinstance(labels, SparseLabels) else labels
    ignored = (index == IGNORED).all(1, keepdims=True) if plan.ignores else None
    return ignored, (index == UNKNOWN).any(1, keepdims=True)


def logits(plan: Plan, head: Head, x: Array, start: Any, size: int) -> Array:
    """(1)"""
    x_ij = product(plan, x, _classes(plan, head.w, start, size))
    if head.bias is None:
        return x_ij
    return x_ij + tiling.take(head.bias, start, size, 0).astype(plan.wide)[None]


def product(plan: Plan, x: Array, w: Array) -> Array:
    """⟨h_i, w_j⟩ of (1), for some of the features or for all."""
    return _dot(plan, x, 1, w, 1 - plan.vocab_axis).astype(plan.wide)


def targets(plan: Plan, labels: Labels, start: Any, size: int) -> Array:
    """The targets of these classes as the row rule takes them."""
    if isinstance(labels, SparseLabels):
        probs = labels.probs.astype(plan.wide)
        at, _ = entries(labels, start, size)
        rows = jnp.arange(len(probs))[:, None]
        return jnp.zeros((len(probs), size), plan.wide).at[rows, at].add(probs, mode="drop")
    if is_dense(labels):
        return tiling.take(labels, start, size, 1)
    return start + lax.broadcasted_iota(jnp.int32, (len(labels), size), 1) == labels


def nothing(plan: Plan, tokens: Tokens, rule: Rule) -> tuple[Part, Array]:
    """What :func:`measure` gives for no classes."""
    zero = jnp.zeros_like(tokens.x, plan.wide, shape=(len(tokens.x), 1))
    some = zero if rule.label_smoothing is not None else None
    moment = zero if plan.entropy else None
    part = Part(zero - jnp.inf, zero - 1, zero, zero, spread=some, count=some, moment=moment)
    return part, jnp.zeros_like(zero, jnp.int32)


def measure(plan: Plan, tokens: Tokens, rule: Rule, x: Array, start: Any) -> tuple[Part, Array]:
    """The sums of this tile, and its best class."""
    where = _columns(tokens.where, start, x.shape[1])
    labels = _own(tokens)
    if is_integer(tokens.labels):
        in_kernel = plan.implementation != "xla"
        part = row_rule.measure(rule, x, None, where, (1,), plan.entropy, in_kernel)
        inside = (labels >= start) & (labels < start + x.shape[1])
        gap = _gap(plan, rule, x, labels - start, inside, part.top, where)
        part = part._replace(gap=gap, mass=inside.astype(plan.wide))
    else:
        t = targets(plan, labels, start, x.shape[1])
        part = row_rule.measure(rule, x, t, where, (1,), plan.entropy)
    if not plan.argmax:
        return part, jnp.zeros_like(part.top, jnp.int32)
    best = lax.argmax(numerics.masked(x, where), 1, jnp.int32)
    return part, start + best[:, None]


def _gap(plan, rule, x, at, inside, top, where):
    """How far the class ``at`` is below the ``top`` of each token, 0 if it is not in the tile."""
    some = None
    if plan.implementation != "xla" or backends.platform() != "cpu":
        t = lax.broadcasted_iota(jnp.int32, x.shape, 1) == at
        chosen = jnp.where(t, numerics.masked(x, where), 0).sum(1, keepdims=True)
    else:  # picked: no pass over the tile, which would not fuse there
        at = jnp.where(inside, at, 0)
        chosen = jnp.take_along_axis(x, at, 1)
        if where is not None:
            some = jnp.take_along_axis(jnp.broadcast_to(where, x.shape), at, 1)
    return jnp.where(inside, -row_rule.below(rule, chosen, top, some), 0)


def merge_shards(
    plan: Plan, tokens: Tokens, rule: Rule, part: Part, best: Array, some: Array | None
) -> tuple[Part, Array, Array | None]:
    """The sums and the best class of all shards, and whether any has ``some`` class."""
    if plan.axis_name is None:
        return part, best, some
    some = None if some is None else some.astype(plan.wide)
    whole, some = row_rule.merge_shards(rule, part, plan.axis_name, some)
    if plan.argmax:
        best = sharding.first(
            best + jnp.asarray(tokens.first), part.top == whole.top, plan.axis_name
        )
    else:
        best = jnp.zeros_like(whole.top, jnp.int32)
    return whole, best, None if some is None else some > 0


def pull_back(
    plan: Plan,
    wanted: Wanted,
    bars: Bars,
    head: Head,
    tokens: Tokens,
    x: Array,
    rule: Rule,
    part: Part,
    row_bars: tuple[Array, Array | None, Array | None],
    start: tuple[Any, Any],
    x_at: Any,
    w_at: Any,
) -> Bars:
    """``bars`` with the cotangents of this tile added.

    Args:
      x: The logits of the tile.
      row_bars: l̄, L̄ and H̄, [tokens, 1] each.
      start: The first token and the first class of the tile.
      x_at: Where the tokens stand in ``bars.x``.
      w_at: Where the classes stand in ``bars.w`` and ``bars.bias``.
    """
    if plan.gauss_newton:
        head, tokens = lax.stop_gradient((head, tokens))
    row, column = start
    where = _columns(tokens.where, column, x.shape[1])
    labels = _own(tokens)
    t = targets(plan, labels, column, x.shape[1])
    z_bar = row_rule.gradient(rule, x, t, where, part, *row_bars)
    x_bar = row_rule.to_logits(rule, x, where, z_bar)
    if wanted.rule is not None:
        rule_bar = jax.tree.map(jnp.sum, row_rule.to_rule(rule, x, where, part, z_bar))
        bars = bars._replace(rule=add_rules(bars.rule, rule_bar))
    if wanted.labels is not None:
        t_bar = row_rule.to_targets(rule, x, t, where, part, row_bars[0])
        if isinstance(labels, SparseLabels):
            at, inside = entries(labels, column, x.shape[1])
            t_bar = jnp.take_along_axis(t_bar, jnp.where(inside, at, 0), 1)
            probs_bar = tiling.add(bars.labels.probs, jnp.where(inside, t_bar, 0), row, 0)
            bars = bars._replace(labels=SparseLabels(None, probs_bar))
        else:
            bars = bars._replace(labels=tiling.add(bars.labels, t_bar, row, column))
    if wanted.bias is not None:
        bars = bars._replace(bias=tiling.add(bars.bias, x_bar.sum(0), w_at))
    return add_products(plan, wanted, bars, head, tokens, x_bar, column, x_at, w_at)


def add_products(plan, wanted, bars, head, tokens, x_bar, start, x_at, w_at) -> Bars:
    """``bars`` with the products of (2) added, for the classes of ``x_bar`` from ``start`` on."""
    x, turned = tokens.x, tokens.turned
    dtype = bar_dtype(plan, x)
    if wanted.x is not None:
        w = _classes(plan, head.w, start, x_bar.shape[1])
        h_bar = _dot(plan, x_bar, 1, w, plan.vocab_axis, rounds=dtype == w.dtype)
        bars = bars._replace(x=tiling.add(bars.x, h_bar, x_at, 0))
    if wanted.w is not None:
        w_bar = _rows_product(plan, x, turned, x_bar, rounds=dtype == x.dtype)
        bars = bars._replace(w=tiling.add(bars.w, w_bar, *along(plan, w_at)))
    return bars


def _rows_product(plan, x, turned, x_bar, rounds):
    """Σ_i h_i x̄_ij, as w lies."""
    left, right = (x, x_bar) if plan.vocab_axis == 1 else (x_bar, x)
    if plan.vocab_axis == 0 and plan.implementation == "xla" and backends.platform() == "cpu":
        turned = (tiling.factor(left, x.dtype) if rounds else left).T
    if turned is None:
        return _dot(plan, left, 0, right, 0, rounds)
    # XLA's CPU is slow to contract the first axis of the left factor. Were the transpose folded
    # into the product, XLA might be left one that it cannot run.
    return _dot(plan, lax.optimization_barrier(turned), 1, right, 0, rounds)


def bar_dtype(plan: Plan, x: Array) -> Any:
    """What x̄ enters (2) in: bfloat16 if x is that; float16 is too coarse below 6e-5."""
    return x.dtype if jnp.finfo(x.dtype).nmant < 10 else plan.wide


def along(plan: Plan, start: Any) -> tuple[Any, Any]:
    """The corner in ``w`` of the classes from ``start`` on."""
    return (0, start) if plan.vocab_axis == 1 else (start, 0)


def _own(tokens):
    """Labels whose indices count from the first class of this shard."""
    labels = tokens.labels
    if tokens.first is None or is_dense(labels):
        return labels
    if isinstance(labels, SparseLabels):
        return labels._replace(indices=labels.indices - tokens.first)
    return labels - tokens.first


def _classes(plan, w, start, size):
    return w if start is None else tiling.take(w, start, size, plan.vocab_axis)


def _columns(where, start, size):
    return None if where is None else tiling.take(where, start, size, 1)


def _dot(plan, a, a_axis, b, b_axis, rounds=False):
    """A product of tiles, contracted over one axis of each; ``rounds``: a wide one may be."""
    if a.dtype != b.dtype and not rounds:
        a, b = a.astype(plan.wide), b.astype(plan.wide)
    axes = ((a_axis,), (b_axis,)), ((), ())
    branches = plan.implementation == "xla"
    return tiling.product(a, b, axes, plan.wide, plan.precision, branches)
