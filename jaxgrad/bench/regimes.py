"""Where the kernels are measured, and the bars they are held to.

A bar on a relative error is one of float32; float64 has one of as many units in the last place. A
result of 16 bits is rounded from float32 once, and its bar counts units in its last place; losses
of 16-bit logits are float32, and held to its bar.
"""

from collections.abc import Iterator

import numpy as np

from jaxgrad.bench.measure import CLASSES, DENSE, FUSED, INTEGER, ROWS, Point, Row

MANY_CLASSES = 70_000
"""More than float16 can count."""


def rows(dtype: str) -> Iterator[Row]:
    """The rows of one dtype; the same numbers for all, up to rounding."""
    for regime in (_saturated, _gaps, _offsets, _ordinary, _many_classes, _fused_head):
        yield from regime(np.random.default_rng(0), dtype)


def _bar(dtype: str, relative: float, ulps: float = 1) -> tuple[float, str]:
    """A bar and its unit."""
    if _is_narrow(dtype):
        return ulps, "ulp"
    return relative * (2.0**-29 if dtype == "float64" else 1), "relative"


def _row_bar(dtype):
    bar, unit = _bar(dtype, 1e-6)
    return bar, "ulp of the row" if unit == "ulp" else "of the row"


def _loss_bar(dtype):
    return _bar("float32" if _is_narrow(dtype) else dtype, 1e-6)


def _is_narrow(dtype):
    return dtype in ("float16", "bfloat16")


def _cotangent(rng, *shape):  # the same number in every dtype
    return rng.integers(1, 64, shape) / 32 * rng.choice([-1, 1], shape)


def _saturated(rng, dtype):
    """tanh and soft-cap as far out as their derivative is a number."""
    end = {"float16": 8.5, "bfloat16": 43, "float32": 43, "float64": 350}[dtype]
    bar = _bar(dtype, 4e-7)
    for name, low, high in ("|u| < 3", 0, 3), ("3 < |u| < 8", 3, 8), ("|u| > 8", 8, end):
        u = rng.uniform(low, high, (ROWS, CLASSES)) * rng.choice([-1, 1], (ROWS, CLASSES))
        cap, one = rng.uniform(20, 40, u.shape), np.ones_like(u)
        tanh, soft_cap = Point("tanh", (u,), one), Point("soft_cap", (cap * u, cap), one)
        yield Row(tanh, "value", dtype, name, *_bar(dtype, 1e-6))
        yield Row(tanh, "gradient", dtype, name, *bar, outputs=(1,))
        yield Row(soft_cap, "value", dtype, name, *_bar(dtype, 1e-6))
        yield Row(soft_cap, "gradient", dtype, name, *bar, outputs=(1,))
        to_cap = bar if low else _bar(dtype, 1e-6)  # it goes as u³ near 0: three roundings of u
        yield Row(soft_cap, "gradient to cap", dtype, name, *to_cap, outputs=(2,))


def _gaps(rng, dtype):
    """One class wins by a gap.

    Every x - max x is exact here: it is cancellation that is measured. Where it is not, its
    rounding takes up to half a unit in the last place of the gap from the others.
    """
    bar, bar_2 = _bar(dtype, 1e-6), _bar(dtype, 1e-6, ulps=2)
    for gap in (10, 15, 20):
        label, name = rng.integers(0, CLASSES, ROWS), f"gap {gap}"
        winner = np.arange(CLASSES) == label[:, None]
        others = np.where(winner, -np.inf, rng.integers(-128, 0, (ROWS, CLASSES)) / 64)
        x = np.where(winner, gap, others - others.max(-1, keepdims=True))
        t, y_bar = winner.astype(np.float64), _cotangent(rng, ROWS, CLASSES)
        l_bar = y_bar[:, 0]
        point = Point("log_softmax", (x,), y_bar)
        yield Row(point, "winning class", dtype, name, *bar, entries=winner)
        for point in Point(DENSE, (x, t), l_bar), Point(INTEGER, (x, label), l_bar):
            yield Row(point, "label winning", dtype, name, *_loss_bar(dtype))
            yield Row(point, "gradient at label", dtype, name, *bar, outputs=(1,), entries=winner)
        point = Point("softmax", (x,), t)
        yield Row(point, "gradient, v = e_winner", dtype, name, *bar_2, outputs=(1,))
        if _is_narrow(dtype):
            point = Point("softmax", (x,), y_bar)
            yield Row(point, "gradient", dtype, name, *bar_2, outputs=(1,))
        else:  # from a y of 16 bits nothing better can be made
            yield Row(Point("softmax_vjp", (x, t), t), "v = e_winner", dtype, name, *bar_2)


def _offsets(rng, dtype):
    """All logits lie far from 0."""
    for offset, name in (1e3, "offset 1e3"), (1e5, "offset 1e5"):
        if offset > 65504 and dtype == "float16":
            continue
        x = 3 * rng.standard_normal((ROWS, CLASSES)) + offset
        label, t = rng.integers(0, CLASSES, ROWS), rng.dirichlet(np.ones(CLASSES), ROWS)
        y_bar = _cotangent(rng, ROWS, CLASSES)
        l_bar = y_bar[:, 0]
        yield Row(Point(INTEGER, (x, label), l_bar), "loss", dtype, name, *_loss_bar(dtype))
        yield Row(Point(DENSE, (x, t), l_bar), "loss", dtype, name, *_loss_bar(dtype))
        yield Row(Point("softmax", (x,), y_bar), "value", dtype, name, *_bar(dtype, 1e-6))
        bar = _bar(dtype, 1e-6, ulps=0.51)
        yield Row(Point("logsumexp", (x,), l_bar), "value", dtype, name, *bar)


def _ordinary(rng, dtype):
    """Nothing special."""
    name, x = "any", 3 * rng.standard_normal((ROWS, CLASSES))
    label, (t, z) = rng.integers(0, CLASSES, ROWS), rng.dirichlet(np.ones(CLASSES), (2, ROWS))
    y_bar, bar, row_bar = _cotangent(rng, ROWS, CLASSES), _bar(dtype, 1e-6), _row_bar(dtype)
    l_bar = y_bar[:, 0]
    for point in Point("softmax", (x,), y_bar), Point("log_softmax", (x,), y_bar):
        yield Row(point, "value", dtype, name, *row_bar)
        yield Row(point, "gradient", dtype, name, *row_bar, outputs=(1,))
    constant = Point("softmax", (x,), np.ones_like(x), due=(x, 0 * x))
    absolute = _loss_bar(dtype)[0], "absolute"
    yield Row(constant, "gradient, v constant", dtype, name, *absolute, outputs=(1,))
    point = Point("logsumexp", (x,), l_bar)
    yield Row(point, "value", dtype, name, *_bar(dtype, 1e-6, ulps=0.51))
    yield Row(point, "gradient", dtype, name, *row_bar, outputs=(1,))
    for point in Point(DENSE, (x, t), l_bar), Point(INTEGER, (x, label), l_bar):
        yield Row(point, "loss", dtype, name, *_loss_bar(dtype))
        yield Row(point, "gradient", dtype, name, *row_bar, outputs=(1,))
    point = Point("cross_entropy", (z, t), l_bar)
    yield Row(point, "value", dtype, name, *_loss_bar(dtype))
    yield Row(point, "gradients", dtype, name, *bar, outputs=(1, 2))
    yield Row(Point("softmax_jacobian", (x,), x), "value", dtype, name, *row_bar)


def _many_classes(rng, dtype):
    """The sum of exponentials is beyond float16."""
    if dtype != "float16":
        return
    x, name = rng.random((1, MANY_CLASSES)), f"{MANY_CLASSES} classes"
    y_bar, l_bar = _cotangent(rng, 1, MANY_CLASSES), np.ones(1)
    for kernel, bar in ("softmax", y_bar), ("logsumexp", l_bar):
        yield Row(Point(kernel, (x,), bar), "value", dtype, name, 1, "ulp")
        yield Row(Point(kernel, (x,), bar), "gradient", dtype, name, 1, "ulp", outputs=(1,))
    point = Point(INTEGER, (x, np.array([5])), l_bar)
    yield Row(point, "loss", dtype, name, *_loss_bar(dtype))
    yield Row(point, "gradient", dtype, name, 1, "ulp", outputs=(1,))


def _fused_head(rng, dtype):
    """A head of 16 bits; a bias shifts all of its logits alike."""
    if dtype != "bfloat16":
        return
    tokens, features, classes = 64, 32, 256
    x = rng.standard_normal((tokens, features))
    w = rng.standard_normal((features, classes)) * 4 / np.sqrt(features)
    label = rng.integers(0, classes, tokens)
    for name, shift in ("std 4", 0.0), ("std 4, offset 20", 20.0):
        point = Point(FUSED, (x, w, np.full(classes, shift), label), np.ones(tokens))
        yield Row(point, "gradients to x, w", dtype, name, 2e-3, "of the norm", (1, 2))
