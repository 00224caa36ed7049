"""Loops over the tiles of x w, [t, d] × [d, v], as Pallas kernels for TPU.

A body of plain JAX is run on each tile, some tokens × some classes with all d features. What these
loops decide is what stays in the vector memory of the chip, VMEM, from one tile to the next:

    sums:       for tokens: for classes     sums over classes stay; w streams by
    gradients:  for classes: for tokens     float32 gradients stay, of w for a tile of classes, of x
                                            for all tokens; each is written to memory once

Where the gradient of x is too large to stay, tokens come in blocks, a call each. That of w is then
handed from call to call in float32, the one array of its size beside the result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxgrad.backends.pallas_tpu import tiles
from jaxgrad.backends.pallas_tpu.tiles import Gradients, Operands


def sums(
    start: Callable[[int], Any],
    body: Callable[..., Any],
    merge: Callable[[Any, Any, Any], Any],
    operands: Operands,
    vocab_axis: int,
    tile: tuple[int, int] | None = None,
    interpret: Any = False,
) -> Any:
    """Sums over classes: ``carry = merge(scalars, carry, body(operands, column, where))``.

    Args:
      start: The carry for so many tokens before any class: arrays of [tokens, 1].
      body: Given the operands of a tile, the first class of it, and which of its entries exist,
        ``bool[tokens, classes]``, None for all: what the tile adds, arrays of [tokens, 1].
      merge: Adds it, entry by entry: the arrays come turned, [1, tokens], so as to fill registers.
      operands: Of the whole.
      vocab_axis: The axis of ``operands.w`` that counts classes.
      tile: Tokens and classes of a tile; None to choose.
      interpret: As ``pallas_call`` takes it.

    Returns:
      The carry for all tokens.
    """
    plan = tiles.for_sums(tiles.plan(operands, vocab_axis, interpret), tile)
    zero = jax.eval_shape(lambda: _turned(start(plan.tokens)))

    def kernel(operands, out, carry):
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _():
            _write(carry, _turned(start(plan.tokens)))

        tile, where = _read_operands(operands), _exists(plan, None, j)
        more = _turned(body(tile, j * plan.classes, where))
        _write(carry, merge(tile.scalars, _read(carry), more))

        @pl.when(j == pl.num_programs(1) - 1)
        def _():
            _write(out, _read(carry))

    out = _call(
        kernel,
        plan,
        "sums",
        operands,
        grid=plan.tiles,
        at=lambda i, j: (i, j),
        outputs=jax.tree.map(lambda z: jax.ShapeDtypeStruct((1, plan.t), z.dtype), zero),
        out_specs=jax.tree.map(lambda _: pl.BlockSpec((1, plan.tokens), lambda i, j: (0, i)), zero),
        scratch=jax.tree.map(lambda z: pltpu.VMEM(z.shape, z.dtype), zero),
        products=1,
    )
    return _turned(out)


def gradients(
    body: Callable[..., Gradients],
    operands: Operands,
    dtypes: Gradients,
    vocab_axis: int,
    tile: tuple[int, int] | None = None,
    interpret: Any = False,
) -> Gradients:
    """Gradients over tokens and classes: ``bars = body(bars, operands, column, where)`` at each.

    Args:
      body: Adds what a tile contributes, in float32; else as in :func:`sums`.
      operands: Of the whole.
      dtypes: Of the gradients; None for one that is not wanted.
      vocab_axis: The axis of ``operands.w`` that counts classes.
      tile: Tokens and classes of a tile; None to choose.
      interpret: As ``pallas_call`` takes it.
    """
    plan = tiles.plan(operands, vocab_axis, interpret)
    plan, size = tiles.for_gradients(plan, dtypes, tile)
    if size >= plan.t:
        return _block(body, operands, dtypes, plan, None)
    wide = jnp.dtype(jnp.float32)
    handed_on = dtypes._replace(w=dtypes.w and wide, bias=dtypes.bias and wide)
    count = plan.t // size

    def block(w_bar, some):
        part = operands._replace(x=some[0], rows=some[1])
        bars = _block(body, part, handed_on, plan, w_bar)
        return bars.w, (bars.x, bars.bias)

    zero = None if dtypes.w is None else jnp.zeros_like(operands.w, jnp.float32)
    given = operands.x, operands.rows
    full = jax.tree.map(lambda z: z[: count * size].reshape(count, size, -1), given)
    w_bar, (x_bar, bias_bar) = lax.scan(block, zero, full)
    x_bar = None if x_bar is None else x_bar.reshape(count * size, -1)
    bias_bar = None if bias_bar is None else bias_bar.sum(0)
    if plan.t % size:
        w_bar, last = block(w_bar, jax.tree.map(lambda z: z[count * size :], given))
        x_bar = None if x_bar is None else jnp.concatenate([x_bar, last[0]])
        bias_bar = None if bias_bar is None else bias_bar + last[1]
    return _cast(Gradients(x_bar, w_bar, bias_bar), dtypes)


def _block(body, operands, dtypes, plan, before):
    """The gradients from some of the tokens, that of w added to ``before``."""
    plan = plan._replace(t=len(operands.x))
    rows = plan.tiles[0] * plan.tokens
    at = lambda j, i: (i, j)
    of_w, of_bias = _block_of_w(plan, at), pl.BlockSpec((plan.classes,), lambda j, i: (j,))
    shape_of_w: Any = of_w.block_shape

    def kernel(operands, before, out, total):
        j, i = pl.program_id(0), pl.program_id(1)
        here = pl.ds(pl.multiple_of(i * plan.tokens, plan.tokens), plan.tokens)

        @pl.when(j == 0)
        def _():
            if out.x is not None:
                out.x[here, :] = jnp.zeros((plan.tokens, plan.d), jnp.float32)

        @pl.when(i == 0)
        def _():
            _write(total, jax.tree.map(lambda ref: jnp.zeros(ref.shape, ref.dtype), total))

        so_far = Gradients(None if out.x is None else out.x[here, :], *_read(total))
        tile = _without_rest(plan, _read_operands(operands), i, j)
        bars = body(so_far, tile, j * plan.classes, _exists(plan, i, j))
        if out.x is not None:
            out.x[here, :] = bars.x
        _write(total, bars[1:])

        @pl.when(i == pl.num_programs(1) - 1)
        def _():
            w_bar, bias_bar = _read(total)
            _write(out[1:], (w_bar if before is None else w_bar + before[...], bias_bar))

    def wanted(x, w, bias):
        return Gradients(
            *(
                z if dtype is not None else None
                for z, dtype in zip((x, w, bias), dtypes, strict=True)
            )
        )

    bars = _call(
        kernel,
        plan,
        "gradients",
        operands,
        before,
        grid=plan.tiles[::-1],
        at=at,
        outputs=wanted(
            jax.ShapeDtypeStruct((rows, plan.d), jnp.float32),
            jax.ShapeDtypeStruct(operands.w.shape, dtypes.w or jnp.float32),
            jax.ShapeDtypeStruct((plan.v,), jnp.float32),
        ),
        out_specs=wanted(
            pl.BlockSpec((rows, plan.d), lambda j, i: (0, 0), pipeline_mode=pl.Buffered(1)),
            of_w,
            of_bias,
        ),
        scratch=wanted(
            None,
            pltpu.VMEM(shape_of_w, jnp.float32),
            pltpu.VMEM((plan.classes,), jnp.float32),
        )[1:],
        products=1 + sum(z is not None for z in dtypes[:2]),
    )
    return _cast(bars._replace(x=None if bars.x is None else bars.x[: plan.t]), dtypes)


def _call(kernel, plan, name, operands, *before, grid, at, outputs, out_specs, scratch, products):
    one_a_row = pl.BlockSpec((plan.tokens,), lambda *g: at(*g)[:1])
    inputs = operands._replace(
        rows=jax.tree.map(lambda z: z[:, 0], operands.rows),
        scalars=jax.tree.map(lambda z: z.reshape(1, 1), operands.scalars),
    )
    in_specs = Operands(
        pl.BlockSpec((plan.tokens, plan.d), lambda *g: (at(*g)[0], 0)),
        _block_of_w(plan, at),
        None if operands.bias is None else pl.BlockSpec((plan.classes,), lambda *g: at(*g)[1:]),
        jax.tree.map(lambda _: one_a_row, operands.rows),
        jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), operands.scalars),
    )
    handed_on = bool(jax.tree.leaves(before))
    place = len(jax.tree.leaves(inputs)), len(jax.tree.leaves(outputs[:1]))
    outer, streamed = "parallel", plan.d * plan.v
    if name == "gradients":
        outer, streamed = "arbitrary", plan.t * plan.d
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=(in_specs, *(None if z is None else _block_of_w(plan, at) for z in before)),
        out_specs=(out_specs,),
        out_shape=(outputs,),
        scratch_shapes=(scratch,),
        input_output_aliases={place[0]: place[1]} if handed_on else {},
        cost_estimate=pl.CostEstimate(
            flops=2 * products * plan.t * plan.d * plan.v,
            transcendentals=plan.t * plan.v,
            bytes_accessed=(plan.t * plan.d + plan.d * plan.v + grid[0] * streamed) * plan.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(outer, "arbitrary"), vmem_limit_bytes=tiles.usable()
        ),
        interpret=plan.interpret,
        name=f"linear_softmax_cross_entropy_{name}",
    )(inputs, *before)[0]


def _block_of_w(plan, at):
    if plan.vocab_axis == 1:
        return pl.BlockSpec((plan.d, plan.classes), lambda *g: (0, at(*g)[1]))
    return pl.BlockSpec((plan.classes, plan.d), lambda *g: (at(*g)[1], 0))


def _cast(bars, dtypes):
    return Gradients(
        *(None if z is None else z.astype(to) for z, to in zip(bars, dtypes, strict=True))
    )


def _turned(columns):
    return jax.tree.map(jnp.transpose, columns)


def _read(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def _write(refs, values):
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[...] = value.astype(ref.dtype)


def _read_operands(operands):
    return _read(operands)._replace(
        rows=jax.tree.map(lambda ref: ref[...][:, None], operands.rows),
        scalars=jax.tree.map(lambda ref: ref[0, 0], operands.scalars),
    )


def _exists(plan, i, j):
    """Which entries of a tile exist; None for all, as where the tile divides the whole."""
    shape = (plan.tokens, plan.classes)
    some = (_before(plan.t, plan.tokens, i, shape, 0), _before(plan.v, plan.classes, j, shape, 1))
    some = [z for z in some if z is not None]
    return some[0] & some[1] if len(some) == 2 else some[0] if some else None


def _before(total, size, k, shape, axis):
    if k is None or total % size == 0:
        return None
    return lax.broadcasted_iota(jnp.int32, shape, axis) < total - k * size


def _without_rest(plan, tile, i, j):
    """Zeros where a tile reaches beyond the end: what is read there, times 0, need not be 0."""

    def cut(z, total, size, k, axis):
        inside = _before(total, size, k, z.shape, axis)
        return z if inside is None else jnp.where(inside, z, jnp.zeros((), z.dtype))

    return tile._replace(
        x=cut(tile.x, plan.t, plan.tokens, i, axis=0),
        w=cut(tile.w, plan.v, plan.classes, j, axis=plan.vocab_axis),
    )
