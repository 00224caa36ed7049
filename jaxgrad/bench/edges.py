"""What is due at infinities, NaN, masks, and labels that name no class.

A row is those of its entries that take part: not masked, and above -inf. The others have
probability 0 and gradient 0. NaN or +inf among them makes NaN of the row, and of no other row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgrad.bench.measure import CLASSES, DENSE, INTEGER, ROWS, Point, Row
from jaxgrad.bench.truth import FLOAT64, TRUTH

INF, NAN = np.inf, np.nan
IGNORED = -100
Y_BAR = np.array([1.0, 0.5, -1.5, 2.0, -0.25, 0.75, 1.25, -1.0])


class Edge(NamedTuple):
    """Logits, masks and labels of four classes; four more have the same logits and no label."""

    x: tuple[float, ...] = (1.0, 0.0, 2.0, 3.0)
    where: tuple[bool, ...] = (True,) * 4
    t: tuple[float, ...] = (0.625, 0.0, 0.375, 0.0)
    label: int = 0


def rows(dtype: str) -> Iterator[Row]:
    """The rows of one dtype."""
    big = 6e4 if dtype == "float16" else 1e30
    plain = {
        "all -inf": Edge((-INF,) * 4),
        "some -inf": Edge((1.0, -INF, 2.0, -INF)),
        "-inf at the label": Edge((1.0, -INF, 2.0, 0.0), t=(0.5, 0.5, 0.0, 0.0), label=1),
        f"logits of {big:.0e}": Edge((float(jnp.dtype(dtype).type(big)), -1.0, 0.0, 1.0)),
        "+inf": Edge((1.0, INF, 2.0, 3.0)),
        "NaN": Edge((1.0, NAN, 2.0, 3.0)),
        "beside these rows": Edge(),
    }
    masked = {
        "where all False": Edge((1.0, NAN, 2.0, 3.0), (False,) * 4),
        "masked NaN and inf": Edge((1.0, NAN, 3.0, INF), (True, False, True, False)),
    }
    of_labels = {"label -1": Edge(label=-1), "label = classes": Edge(label=CLASSES)}
    ignored = {"ignore_index on NaN": Edge((1.0, NAN, 2.0, 3.0), label=IGNORED)}
    for kernel in ("softmax", "log_softmax", "logsumexp", DENSE):
        yield from _rows(kernel, dtype, plain)
        yield from _rows(kernel, dtype, masked, masked=True)
    yield from _rows(INTEGER, dtype, plain | of_labels)
    yield from _rows(INTEGER, dtype, masked | ignored, masked=True, ignore_index=IGNORED)
    yield from _of_entries(dtype)


def _rows(kernel, dtype, edges, masked=False, ignore_index=None):
    x, where, t, label = map(np.array, zip(*edges.values(), strict=True))
    x, where, t = np.hstack([x, x]), np.hstack([where, where]), np.hstack([t, 0 * t])
    per_class = kernel in ("softmax", "log_softmax")
    y_bar = np.where(where & (x > -INF), Y_BAR, 0) if per_class else np.ones(len(x))
    due = [_due(kernel, *row) for row in zip(x, where, t, label, y_bar, strict=True)]
    args = {DENSE: (x, t), INTEGER: (x, label)}.get(kernel, (x,))
    point = Point(
        kernel,
        tuple(map(_fill, args)),
        _fill(y_bar),
        _fill(where) if masked else None,
        ignore_index,
        tuple(_fill(np.array(part)) for part in zip(*due, strict=True)),
    )
    for i, name in enumerate(edges):
        yield Row(point, "value, gradient", dtype, name, 0, "wrong", (0, 1), i)


def _fill(rows):
    """Over and over, up to the shape of other points: a shape more is a compilation more."""
    return np.resize(rows, (ROWS, *rows.shape[1:]))


def _due(kernel, x, where, t, label, y_bar):
    """Value and gradient of one row."""
    if kernel == INTEGER:
        t = (np.arange(CLASSES) == label).astype(np.float64)
        if label == IGNORED:
            return 0.0, 0 * t
    known = kernel != INTEGER or t.any()
    t, part = np.where(where, t, 0), where & (x != -INF)
    p, log_p, lse = np.zeros(CLASSES), np.full(CLASSES, -INF), -INF
    if part.any():
        with np.errstate(over="ignore", invalid="ignore"):
            p[part], log_p[part], lse = (
                TRUTH[name](FLOAT64, np.zeros(1), x[part])[0]
                for name in ("softmax", "log_softmax", "logsumexp")
            )
    value, gradient = {
        "softmax": (p, p * (y_bar - (p * y_bar).sum())),
        "log_softmax": (log_p, y_bar - p * y_bar.sum()),
        "logsumexp": (lse, p * y_bar),
    }.get(kernel, (-(t[t > 0] * log_p[t > 0]).sum(), t.sum() * p - t if part.any() else 0 * t))
    if known and (x[part] < INF).all():
        return value, gradient
    return x[part].max() if kernel == "logsumexp" else value * NAN, gradient * NAN


def _of_entries(dtype):
    x = np.resize([INF, -INF, 0.0, NAN], (ROWS, CLASSES))
    one, cap = np.ones_like(x), np.full_like(x, 30)
    y, slope = np.sign(x), np.where(np.isinf(x), 0, 1 + x)
    tanh = Point("tanh", (x,), one, due=(y, slope))
    soft_cap = Point("soft_cap", (x, cap), one, due=(cap * y, slope, y))
    for i, name in enumerate(["+inf", "-inf", "0", "NaN"]):
        yield Row(tanh, "value, gradient", dtype, name, 0, "wrong", (0, 1), (0, i))
        yield Row(soft_cap, "value, gradients", dtype, name, 0, "wrong", (0, 1, 2), (0, i))
    z = np.resize([0.0, 0.5, 0.5, 0.0], (ROWS, CLASSES))
    t = np.resize([[0.0, 0.75, 0.25, 0.0, 0, 0, 0, 0], [0.5, 0.5, 0.0, 0.0, 0, 0, 0, 0]], z.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        nats = -np.log(z)
        due = np.where(t > 0, t * nats, 0).sum(-1), np.where(t > 0, -t / z, 0), nats
    point = Point("cross_entropy", (z, t), np.ones(ROWS), due=due)
    for i, name in enumerate(["z = 0, label 0", "z = 0, label > 0"]):
        yield Row(point, "value, gradients", dtype, name, 0, "wrong", (0, 1, 2), i)
