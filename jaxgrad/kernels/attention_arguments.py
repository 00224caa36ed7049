"""The arguments of attention, checked and brought to the five axes of its tiles."""

import math
import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxgrad import numerics
from jaxgrad.kernels.attention_tiles import Band, Masks, Terms

OF = "dot_product_attention"


class Sizes(NamedTuple):
    """The lengths of the axes."""

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    of: str  # the call, as errors name it


def band(local_window_size: Any, is_causal: bool, of: str = OF) -> Band:
    """The keys that a query sees by its place alone."""
    size = local_window_size
    sides = size if isinstance(size, tuple | list) else (size, size)
    try:
        left, right = (None if side is None else operator.index(side) for side in sides)
    except (TypeError, ValueError):
        raise ValueError(
            f"{of}: local_window_size must be an int or a pair of ints, got {size}"
        ) from None
    if is_causal:
        right = 0 if right is None else min(right, 0)
    return Band(left, right)


def arrays(query: Any, key: Any, value: Any, of: str = OF) -> tuple[Array, Array, Array]:
    """Query, key and value with four axes."""
    q, k, v = (
        numerics.as_float(x, of, name)
        for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    if q.ndim not in (3, 4):
        raise ValueError(
            f"{of}: query must be [B, T, N, H] or [T, N, H], got {numerics.describe(q)}"
        )
    batch, width = list(q.shape[:-3]), q.shape[-1]
    if k.ndim != q.ndim or list(k.shape[:-3]) != batch or k.shape[-1] != width:
        raise ValueError(
            f"{of}: key must be {_shape(batch, 'S', 'K', width)} for query of "
            f"{numerics.describe(q)}, got {numerics.describe(k)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{of}: value must be {_shape(k.shape[:-1], 'D')} for key of "
            f"{numerics.describe(k)}, got {numerics.describe(v)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{of}: the heads of query must be a multiple of those of key, got query "
            f"of {numerics.describe(q)} and key of {numerics.describe(k)}"
        )
    for x, name in ((k, "key"), (v, "value")):
        if x.dtype != q.dtype:
            raise TypeError(
                f"{of}: {name} must have the dtype of query, {q.dtype}, got {numerics.describe(x)}"
            )
    return (q, k, v) if batch or q.ndim == 4 else (q[None], k[None], v[None])


def _shape(*parts: Any) -> str:
    flat = [n for part in parts for n in (part if isinstance(part, list | tuple) else [part])]
    return f"[{', '.join(map(str, flat))}]"


def sizes(q: Array, k: Array, of: str = OF) -> Sizes:
    """The lengths of the axes of query and key."""
    return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], of)


def by_head(sizes: Sizes, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Query, key and value with the axes of the tiles, the group that shares a key head third."""
    group = sizes.heads // sizes.key_heads
    q = q.reshape(*q.shape[:2], sizes.key_heads, group, q.shape[3]).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3)[:, :, None] for x in (k, v))
    return q, k, v


def results(query: Any, o: Array, lse: Array, return_residual: bool) -> Any:
    """Output, and log-sum-exp if asked for, with the axes of ``query``: :func:`by_head` undone."""
    shape = jnp.shape(query)[:-1]
    o, lse = (x.transpose(0, 3, 1, 2, 4) for x in (o, lse))
    o = o.reshape(*shape, o.shape[-1])
    return (o, lse.reshape(shape)) if return_residual else o


def terms(sizes: Sizes, q: Array, bias: Any, scale: Any, cap: Any) -> Terms:
    """What makes logits of the products of queries and keys."""
    if bias is not None:
        bias = _five(sizes, numerics.as_float(bias, sizes.of, "bias"), "bias")
    scale = _scalar(
        sizes, q, 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale, "scale"
    )
    return Terms(bias, scale, None if cap is None else _scalar(sizes, q, cap, "logits_soft_cap"))


def _scalar(sizes: Sizes, q: Array, x: Any, name: str) -> Array:
    x = numerics.as_float(x, sizes.of, name)
    if x.ndim:
        raise ValueError(f"{sizes.of}: {name} must be a scalar, got {numerics.describe(x)}")
    return x.astype(numerics.widen(q).dtype)


def masks(sizes: Sizes, mask: Any, query_lengths: Any, key_lengths: Any, segment_ids: Any) -> Masks:
    """Which keys which queries see by content."""
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(f"{sizes.of}: mask must be bool, got {numerics.describe(mask)}")
        mask = _five(sizes, mask, "mask")
    query_ids = key_ids = None
    if segment_ids is not None:
        pair = isinstance(segment_ids, tuple | list)
        query_ids, key_ids = segment_ids if pair else (segment_ids, segment_ids)
        query_ids = _segments(sizes, query_ids, sizes.queries, "queries")[:, None, None, :, None]
        key_ids = _segments(sizes, key_ids, sizes.keys, "keys")[:, None, None, None, :]
    return Masks(
        mask,
        _lengths(sizes, query_lengths, "query_seq_lengths"),
        _lengths(sizes, key_lengths, "key_value_seq_lengths"),
        query_ids,
        key_ids,
    )


def _five(sizes: Sizes, x: Array, name: str) -> Array:
    full = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    four = (1,) * (4 - x.ndim) + x.shape
    if x.ndim > 4 or any(a not in (1, b) for a, b in zip(four, full, strict=True)):
        raise ValueError(
            f"{sizes.of}: {name} must broadcast to [B, N, T, S] = {list(full)}, "
            f"got {numerics.describe(x)}"
        )
    group = sizes.heads // sizes.key_heads
    heads = (1, 1) if four[1] != sizes.heads else (sizes.key_heads, group)
    return x.reshape(four[0], *heads, *four[2:])


def _lengths(sizes: Sizes, x: Any, name: str) -> Array | None:
    if x is None:
        return None
    x = _integers(sizes, x, name)
    if x.shape != (sizes.batch,):
        raise ValueError(
            f"{sizes.of}: {name} must be int[{sizes.batch}], one per batch entry, "
            f"got {numerics.describe(x)}"
        )
    return x[:, None, None, None, None]


def _segments(sizes: Sizes, x: Any, length: int, which: str) -> Array:
    x = _integers(sizes, x, "segment_ids")
    if x.shape not in ((sizes.batch, length),) + (((length,),) if sizes.batch == 1 else ()):
        raise ValueError(
            f"{sizes.of}: segment_ids of the {which} must be int[{sizes.batch}, {length}], "
            f"got {numerics.describe(x)}"
        )
    return x.reshape(sizes.batch, length)


def _integers(sizes: Sizes, x: Any, name: str) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{sizes.of}: {name} must be integer, got {numerics.describe(x)}")
    return x.astype(jnp.int32)
