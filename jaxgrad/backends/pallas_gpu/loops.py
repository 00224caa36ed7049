"""Loops over the tiles of x w, [t, d] × [d, v], as Pallas kernels for GPU, by way of Triton.

A program computes the logits of a tile in registers, chunk of d by chunk of d, and a body of plain
JAX reads them there. Programs share nothing:

    sums:    a program for some tokens × a range of classes; its sums over these classes go out
    x̄:       a program for a tile, which goes out

Products with x̄ are left to the library that is there for them.

JAX has deprecated this way to Triton with version 0.11, in which it still works.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxgrad.backends.pallas_gpu import tiles
from jaxgrad.backends.pallas_gpu.tiles import Operands

Product = Callable[[Array, Array], Array]


def sums(
    start: Callable[[int], Any],
    product: Product,
    body: Callable[..., Any],
    operands: Operands,
    vocab_axis: int,
    tile: tuple[int, int] | None = None,
    interpret: bool = False,
) -> Any:
    """Sums over classes: ``carry = body(carry, logits, rows, scalars, column, where)`` at a tile.

    Args:
      start: The carry for so many tokens before any class: arrays of [tokens, 1].
      product: Of x and w, some tokens × some classes for some of the features.
      body: Given the logits of a tile, what there is of its tokens, the first class of it, and
        which of its entries exist, ``bool[tokens, classes]``, None for all.
      operands: Of the whole.
      vocab_axis: The axis of ``operands.w`` that counts classes.
      tile: Tokens and classes of a tile; None to choose.
      interpret: Whether to run it in Pallas's interpreter.

    Returns:
      The carries of ranges of classes, from the first on: arrays of [ranges, t, 1]. Their number is
      a power of two.
    """
    plan = tiles.plan("sums", operands, vocab_axis, tile)
    per_split = -(-plan.tiles[1] // plan.splits)

    def kernel(operands, out):
        i, split = pl.program_id(0), pl.program_id(1)
        rows, scalars = _read_rows(plan, operands, i)

        def visit(j, carry):
            for column, logits, where in _logits(plan, product, operands, vocab_axis, i, j):
                carry = body(carry, logits, rows, scalars, column, where)
            return carry

        first = split * per_split
        last = jnp.minimum(first + per_split, plan.tiles[1])
        carry = lax.fori_loop(first, last, visit, start(plan.tokens))
        for ref, z in zip(jax.tree.leaves(out), jax.tree.leaves(carry), strict=True):
            ref[...] = z[:, 0]

    zero = jax.eval_shape(lambda: start(plan.tokens))
    padded = plan.tiles[0] * plan.tokens
    out = _call(
        kernel,
        "sums",
        plan,
        operands,
        interpret,
        grid=(plan.tiles[0], plan.splits),
        out_shape=jax.tree.map(
            lambda z: jax.ShapeDtypeStruct((plan.splits, padded), z.dtype), zero
        ),
        out_specs=jax.tree.map(
            lambda _: pl.BlockSpec((None, plan.tokens), lambda i, split: (split, i)), zero
        ),
    )
    return jax.tree.map(lambda z: z[:, : plan.t, None], out)


def bars(
    product: Product,
    body: Callable[..., Array],
    name: str,
    operands: Operands,
    dtype: Any,
    sums_columns: bool,
    vocab_axis: int,
    tile: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[Array, Array | None]:
    """x̄ of all tokens and classes, ``body(logits, rows, scalars, column, where)`` at each tile.

    Args:
      product: As in :func:`sums`, and so are the others.
      body: Gives float32.
      name: Of the largest tile, in ``tiles.LARGEST``.
      dtype: Of x̄.
      sums_columns: Whether to return Σ x̄ over tokens too, which no rounding of x̄ enters.
    """
    plan = tiles.plan(name, operands, vocab_axis, tile)

    def kernel(operands, out):
        i, j = pl.program_id(0), pl.program_id(1)
        rows, scalars = _read_rows(plan, operands, i)
        parts = _logits(plan, product, operands, vocab_axis, i, j)
        for part, (column, logits, exists) in enumerate(parts):
            x_bar = body(logits, rows, scalars, column, exists)
            where = _all(exists, _before(plan.t, plan.tokens, i * plan.tokens, x_bar.shape, 0))
            here = pl.ds(part * x_bar.shape[1], x_bar.shape[1])
            plgpu.store(out[0].at[:, here], x_bar.astype(dtype), mask=where)
            if sums_columns:
                x_bar = x_bar if where is None else jnp.where(where, x_bar, 0)
                out[1][here] = x_bar.sum(0)

    rows, columns = plan.tiles
    x_bar = jax.ShapeDtypeStruct((plan.t, plan.v), dtype)
    total = jax.ShapeDtypeStruct((rows, columns * plan.classes), jnp.float32)
    x_bar, totals = _call(
        kernel,
        "bars",
        plan,
        operands,
        interpret,
        grid=plan.tiles,
        out_shape=(x_bar, total if sums_columns else None),
        out_specs=(
            pl.BlockSpec((plan.tokens, plan.classes), lambda i, j: (i, j)),
            pl.BlockSpec((None, plan.classes), lambda i, j: (i, j)) if sums_columns else None,
        ),
    )
    return x_bar, totals.sum(0)[: plan.v] if sums_columns else None


def _call(kernel, name, plan, operands, interpret, grid, out_shape, out_specs):
    inputs = operands._replace(
        rows=jax.tree.map(lambda z: z[:, 0], operands.rows),
        scalars=jax.tree.map(lambda z: z.reshape(1), operands.scalars),
    )
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=(jax.tree.map(_whole, inputs),),
        out_specs=(out_specs,),
        out_shape=(out_shape,),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name=f"linear_softmax_cross_entropy_{name}",
    )(inputs)[0]


def _whole(z):  # addresses are computed in the kernel, and what lies beyond the end is masked there
    return pl.BlockSpec(z.shape, lambda *_: (0,) * len(z.shape))


def _read_rows(plan, operands, i):
    where = _before(plan.t, plan.tokens, i * plan.tokens, (plan.tokens,), 0)
    here = pl.ds(i * plan.tokens, plan.tokens)
    rows = jax.tree.map(lambda ref: _load(ref.at[here], where)[:, None], operands.rows)
    return rows, jax.tree.map(lambda ref: ref[0], operands.scalars)


def _logits(plan, product, operands, vocab_axis, i, j):
    """x w + b of a tile in its parts, each with its first class and which of its entries exist.

    x, w and b are 0 beyond their ends.
    """
    rows, width = pl.ds(i * plan.tokens, plan.tokens), plan.classes // plan.parts
    columns = [j * plan.classes + part * width for part in range(plan.parts)]
    of_x, of_w = (plan.tokens, plan.features), (plan.features, width)
    of_w = of_w if vocab_axis == 1 else of_w[::-1]

    def chunk(k, totals):
        features = pl.ds(k * plan.features, plan.features)
        x = _load(
            operands.x.at[rows, features],
            _before(plan.t, plan.tokens, i * plan.tokens, of_x, 0),
            _before(plan.d, plan.features, k * plan.features, of_x, 1),
        )

        def w(column):
            place = (features, pl.ds(column, width))
            return _load(
                operands.w.at[place if vocab_axis == 1 else place[::-1]],
                _before(plan.v, plan.classes, column, of_w, vocab_axis),
                _before(plan.d, plan.features, k * plan.features, of_w, 1 - vocab_axis),
            )

        return [
            total + product(x, w(column)) for total, column in zip(totals, columns, strict=True)
        ]

    def with_bias(logits, column):
        if operands.bias is None:
            return logits
        exists = _before(plan.v, plan.classes, column, (width,), 0)
        return logits + _load(operands.bias.at[pl.ds(column, width)], exists)[None, :]

    zeros = [jnp.zeros((plan.tokens, width), jnp.float32) for _ in columns]
    totals = lax.fori_loop(0, plan.chunks, chunk, zeros)
    return [
        (column, with_bias(z, column), _before(plan.v, plan.classes, column, z.shape, 1))
        for z, column in zip(totals, columns, strict=True)
    ]


def _load(ref, *inside):
    where = _all(*inside)
    if where is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=where, other=jnp.zeros((), ref.dtype))


def _all(*masks):
    masks = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, masks) if masks else None


def _before(total, size, first, shape, axis):
    """Which entries from ``first`` on exist; None for all, as where the tile divides the whole."""
    if total % size == 0:
        return None
    return lax.broadcasted_iota(jnp.int32, shape, axis) < total - first
