"""What the attention kernels read and write, and what of it belongs to one program.

A program has to do with one batch entry and one key head, and sees of all arrays what belongs to
them: the heads that share the key head, all queries and all keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxgrad.backends.pallas_gpu.attention_blocks import Cut


class Operands(NamedTuple):
    """What kernels read: whole, or what belongs to a batch entry and a key head."""

    q: Any  # [B, T, K, G, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, D]
    terms: Any  # bias [B, K, G, T, S], of which any may be 1; scale and cap [1]
    masks: Any  # mask as bias; lengths [B]; segments [B, T] and [B, S]
    o_bar: Any = None  # [B, T, K, G, D]
    numbers: Any = ()  # mean, m and 1 / S of a query, [B, K, G, T]


def operands(q: Any, k: Any, v: Any, terms: Any, masks: Any) -> Operands:
    """What kernels read, from arrays of five axes."""
    flat = lambda z: None if z is None else z.reshape(-1)
    by_batch = lambda z: None if z is None else z.reshape(len(z), -1)
    of_keys = lambda z: z[:, :, 0].transpose(0, 2, 1, 3)
    return Operands(
        by_place(q),
        of_keys(k),
        of_keys(v),
        terms._replace(scale=flat(terms.scale), cap=flat(terms.cap)),
        masks._replace(
            query_length=flat(masks.query_length),
            key_length=flat(masks.key_length),
            query_segment=by_batch(masks.query_segment),
            key_segment=by_batch(masks.key_segment),
        ),
    )


def by_place(x: Any) -> Any:
    """[B, T, K, G, H] from the five axes [B, K, G, T, H]: the public layout, heads in two axes."""
    return x.transpose(0, 3, 1, 2, 4)


def call(
    kernel: Callable[[Operands, Any], None],
    name: str,
    x: Operands,
    like: tuple[Any, ...],
    head_axes: tuple[int, ...],
    grid: tuple[int, int, int],
    group: int,
    cut: Cut,
    interpret: Any,
) -> Any:
    """Outputs ``like`` these, from ``kernel(operands, outputs)`` at each place of the grid.

    The grid has blocks, heads (``group`` of them for each key head) and batch entries.
    """
    at = lambda i, head, batch: (batch, lax.div(head, group) if group > 1 else head)
    part = lambda head_axis: lambda z: _part(z, at, head_axis)
    everywhere = lambda z: pl.BlockSpec((None,), lambda *_: (0,))
    by_head, by_batch = jax.tree.map(part(1), x), jax.tree.map(part(None), x)
    specs = Operands(
        part(2)(x.q),
        part(2)(x.k),
        part(2)(x.v),
        jax.tree.map(everywhere, x.terms)._replace(bias=by_head.terms.bias),
        by_batch.masks._replace(mask=by_head.masks.mask),
        jax.tree.map(part(2), x.o_bar),
        by_head.numbers,
    )
    return pl.pallas_call(
        lambda x, *out: kernel(_with_scalars(x), out),
        grid=grid,
        in_specs=(specs,),
        out_specs=tuple(part(axis)(z) for z, axis in zip(like, head_axes, strict=True)),
        out_shape=tuple(jax.ShapeDtypeStruct(z.shape, z.dtype) for z in like),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=interpret,
        name=f"dot_product_attention_{name}",
    )(x)


def _with_scalars(x):
    """``x`` with numbers in place of references to one: read here, none is in a loop."""
    read = lambda ref: None if ref is None else ref[...]
    return x._replace(
        terms=x.terms._replace(scale=read(x.terms.scale), cap=read(x.terms.cap)),
        masks=x.masks._replace(
            query_length=read(x.masks.query_length), key_length=read(x.masks.key_length)
        ),
    )


def _part(x, at, head_axis):
    """Of ``x``, what belongs to the batch entry and key head that ``at`` gives for a program."""
    axes = (0,) if head_axis is None else (0, head_axis)
    shape = tuple(None if axis in axes else n for axis, n in enumerate(x.shape))

    def index(*program):
        places = dict(zip((0, head_axis), at(*program), strict=True))
        return tuple(
            places[axis] if axis in axes and n > 1 else 0 for axis, n in enumerate(x.shape)
        )

    return pl.BlockSpec(shape, index)
