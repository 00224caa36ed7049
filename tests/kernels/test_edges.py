"""What every kernel gives at infinities, NaN, masks, extremes and labels that name no class."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import DTYPES, Kernel, as_double, as_dtype

INF, NAN = np.inf, np.nan
ALL = (True,) * 4
IGNORED = -7


class Edge(NamedTuple):
    """A row of logits, with a mask, and labels as a distribution and as an index."""

    logits: tuple[float, ...]
    where: tuple[bool, ...] = ALL
    distribution: tuple[float, ...] = (0.625, 0.0, 0.375, 0.0)
    index: int = 0
    digits: int = 150


def edges(dtype):
    """Every edge by name; the huge ones as huge as ``dtype`` allows."""
    huge, tiny = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    big = min(1e30, huge)
    digits = 150 if huge < 1e60 else 1000
    some = (True, False, True, False)
    second, third = (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)
    return {
        "all -inf": Edge((-INF,) * 4),
        "all -inf but one": Edge((-INF, -INF, 2.0, -INF), ALL, third, 2),
        "some -inf, their label 0": Edge((1.0, -INF, 2.0, -INF)),
        "some -inf, one the label": Edge((1.0, -INF, 2.0, -INF), ALL, second, 1),
        "some -inf, part of the label": Edge((1.0, -INF, 2.0, 0.0), ALL, (0.5, 0.5, 0.0, 0.0)),
        "where all False": Edge((1.0, 2.0, 3.0, 4.0), (False,) * 4),
        "where all False, over NaN": Edge((NAN, INF, -INF, 0.0), (False,) * 4),
        "masked": Edge((1.0, 9.0, 3.0, 4.0), (True, False, True, True)),
        "masked NaN and inf": Edge((1.0, NAN, 3.0, INF), some),
        "masked label": Edge((1.0, 5.0, 3.0, 4.0), (True, False, True, True), second, 1),
        "masked to -inf": Edge((-INF, 5.0, -INF, 4.0), some),
        "one valid class": Edge((3.0, 5.0, NAN, 4.0), (True, False, False, False)),
        "+inf": Edge((1.0, INF, 2.0, 3.0)),
        "+inf the label": Edge((INF, 1.0, 2.0, 3.0)),
        "+inf twice": Edge((INF, INF, 2.0, 3.0)),
        "+inf and -inf": Edge((INF, -INF, 2.0, 3.0)),
        "NaN": Edge((1.0, NAN, 2.0, 3.0)),
        "NaN and inf": Edge((-INF, NAN, INF, 3.0)),
        "±1e4": Edge((1e4, -1e4, 0.0, 1e4)),
        "1e4 in common": Edge((1e4, 1e4 + 64.0, 1e4 + 64.0, 1e4 + 128.0)),
        "1e30": Edge((big, -1.0, 0.0, 1.0), digits=digits),
        "-1e30 in common": Edge((-big,) * 4, digits=digits),
        "float max": Edge((huge, 1.0, 0.0, -1.0), digits=digits),
        "float max twice": Edge((huge, 1.0, huge, -huge), digits=digits),
        "float lowest": Edge((-huge, 1.0, 0.5, 3.0), digits=digits),
        "float lowest twice": Edge((-huge, 1.0, -huge, 3.0), digits=digits),
        "equal": Edge((2.0, 2.0, 2.0, 2.0)),
        "zeros": Edge((0.0, -0.0, 0.0, -0.0)),
        "tiny": Edge((tiny, 0.0, 0.0, 0.0)),
        "gap 10": Edge((10.0, 0.0, -1.0, -2.0), ALL, (1.0, 0.0, 0.0, 0.0), 0),
        "gap 20": Edge((0.0, 20.0, 0.0, -1.0), ALL, second, 1),
        "gap 40": Edge((0.0, -1.0, 40.0, 0.5), ALL, third, 2),
        "gap 80": Edge((80.0, 0.0, 1.0, 2.0)),
        "gap 200": Edge((0.0, 200.0, 0.0, 0.0), ALL, second, 1),
        "label 0 throughout": Edge((1.0, 2.0, 3.0, 4.0), distribution=(0.0,) * 4),
        "label -1": Edge((1.0, 2.0, 3.0, 4.0), index=-1),
        "label beyond the last": Edge((1.0, 2.0, 3.0, 4.0), index=4),
        "label far out": Edge((1.0, 2.0, 3.0, 4.0), index=-100),
        "ignored": Edge((1.0, 2.0, 3.0, 4.0), index=IGNORED),
        "ignored, over NaN": Edge((1.0, NAN, INF, 4.0), index=IGNORED),
    }


DENSE = {"logits": "logits", "labels": "distribution"}
INTEGER = {"logits": "logits", "labels": "index"}
RULE = {"label_smoothing": 0.125, "z_loss": 0.0625, "temperature": 1.25}
CAPPED = {"z_loss": 0.0625, "logit_soft_cap": 4.0}
IGNORE = {"ignore_index": IGNORED}
_integer = "softmax_cross_entropy_with_integer_labels"

# Each argument is given as the part of an edge that it takes.
KERNELS = (
    Kernel("softmax", {"x": "logits"}, (0,), {}),
    Kernel("log_softmax", {"x": "logits"}, (0,), {}),
    Kernel("logsumexp", {"a": "logits"}, (0,), {"axis": -1}),
    Kernel("softmax_cross_entropy", DENSE, (0,), {}),
    Kernel("softmax_cross_entropy", DENSE, (0,), RULE),
    Kernel("softmax_cross_entropy", DENSE, (0,), CAPPED),
    Kernel(_integer, INTEGER, (0,), IGNORE),
    Kernel(_integer, INTEGER, (0,), IGNORE | RULE),
    Kernel(_integer, INTEGER, (0,), IGNORE | CAPPED),
)


def arguments(kernel, table, dtype):
    rows = (
        np.array([getattr(edge, part) for edge in table.values()])
        for part in kernel.makers.values()
    )
    return [as_dtype(z, dtype) for z in rows]


def with_mask(kernel):
    return dataclasses.replace(kernel, makers=kernel.makers | {"where": "where"})


def weights(of_row):
    """A cotangent or tangent that treats no two entries of a row alike."""
    return np.array([0.75, 1.5, 1.25, 0.5]) if of_row else np.array(0.75)


def outcome(kernel, *args):
    """Value, gradient, and Hessian-vector product by forward over reverse mode."""

    def spread(row, like):
        return jnp.broadcast_to(jnp.asarray(row, like.dtype), like.shape)

    def gradient(x):
        y, pull = jax.vjp(lambda x: kernel.function(x, *args[1:]), x)
        return pull(spread(weights(y.ndim == x.ndim), y))[0], y

    x = jnp.asarray(args[0])
    g, hvp, y = jax.jvp(gradient, (x,), (spread(weights(True), x),), has_aux=True)
    return y, g, hvp


@functools.cache
def expected(kernel, dtype):
    """The same of every edge by name, in 50 digits."""
    kernel, results = with_mask(kernel), {}
    for digits in {edge.digits for edge in edges(dtype).values()}:
        table = {name: edge for name, edge in edges(dtype).items() if edge.digits == digits}
        args = [as_double(z) for z in arguments(kernel, table, dtype)]
        with oracles.mp.workdps(digits):
            y = oracles.in_50_digits(kernel.twin, *args)
            y_bar, tangent = weights(y.ndim == 2), weights(True)
            g = oracles.derivative(kernel.twin, args, 0, y_bar)
            hvp = oracles.second_derivative(kernel.twin, args, 0, y_bar, tangent)
        g, hvp = (by_definition(kernel, args, y, z) for z in (g, hvp))
        results |= dict(zip(table, zip(y, g, hvp, strict=True), strict=True))
    return results


def by_definition(kernel, args, y, slope):
    """0 for an empty row, whose limit depends on the path; NaN where the value is."""
    counts = args[-1] & ("logit_soft_cap" in kernel.options or args[0] > -INF)
    nan = np.isnan(y).any(tuple(range(1, y.ndim)))
    return np.where(nan[:, None], NAN, np.where(counts.any(-1, keepdims=True), slope, 0))


# In eps: of each value, of the largest gradient in a row. A 16-bit result is rounded once.
BARS = {"value": 2.5, "gradient": 4.0, "HVP": 2.0}


def one_by_one(f):
    return lambda *args: [np.stack(z) for z in zip(*map(jax.jit(f), *args), strict=True)]


PLAIN = [kernel for kernel in KERNELS if kernel.options.keys() <= {"axis", *IGNORE}]
CASES = [
    (kernel, dtype)
    for kernel in KERNELS
    for dtype in DTYPES
    if dtype != "float16" or kernel in PLAIN  # else bfloat16 stands for it
]


@pytest.mark.parametrize("kernel, dtype", CASES)
def test_logits(kernel, dtype):
    """All edges are rows of one array: where one could spoil another, it would."""
    compare(kernel, jax.jit, dtype)


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize("kernel", PLAIN)
def test_logits_however_a_batch_is_made(kernel):
    """Without a mask, by vmap, and row by row: no matter of the options."""
    compare(kernel, jax.jit, "float32", masked=False)
    compare(kernel, lambda f: jax.jit(jax.vmap(f)), "float32")
    compare(kernel, one_by_one, "bfloat16")


def compare(kernel, transform, dtype, masked=True):
    table = {name: edge for name, edge in edges(dtype).items() if masked or edge.where == ALL}
    if "label_smoothing" in kernel.options:  # its sum of distances overflows, though no mean does
        del table["float lowest twice"]
    called = with_mask(kernel) if masked else kernel
    with jax.enable_x64(dtype == "float64"):
        found = transform(functools.partial(outcome, called))(*arguments(called, table, dtype))
    wrong = []
    for name, outcomes in zip(table, zip(*found, strict=True), strict=True):
        wanted = expected(kernel, dtype)[name]
        for what, y, y_ in zip(BARS, outcomes, wanted, strict=True):
            error = oracles.error(y, y_, axis=() if what == "value" else -1,
                                  least=1.0 if what == "HVP" else 0.0)  # fmt: skip
            if error > (BARS[what] if jnp.finfo(y.dtype).bits > 16 else 0.5):
                wrong.append(f"{name}: {what} {y}, {error:.3} eps from {y_}")
    assert not wrong, "\n".join(wrong)
