"""What jax.nn, jax.numpy and optax define the kernels give too: value, gradient, shape, type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PEERS, weights
from numpy.testing import assert_allclose

import jaxgrad

pytestmark = pytest.mark.usefixtures("unoptimised")

SHAPE = (2, 3, 4)
ROWS = ("softmax", "log_softmax", "logsumexp")
# Every axis, and a mask with every other one of them.
AXES = [
    (axis, at % 2 == 0)
    for at, axis in enumerate((0, 1, -3, -1, (0, 1), (1, -1), (2, 0), None, (), (-1,)))
]
DENSE = "softmax_cross_entropy"
INTEGER = "softmax_cross_entropy_with_integer_labels"


def logits(shape=SHAPE, dtype="float32"):
    return jnp.asarray(3 * np.random.default_rng(1).standard_normal(shape), dtype)


def mask(shape=SHAPE):
    where = np.random.default_rng(2).random(shape) < 0.5
    for axis in range(len(shape)):  # no row is empty along any axis
        where[(slice(None),) * axis + (0,)] = True
    return jnp.asarray(where)


def labels(shape=SHAPE, dtype="float32"):
    return jnp.asarray(np.random.default_rng(3).uniform(0.0, 1.0, shape), dtype)


def same(ours, theirs):
    for y, y_ in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (y.shape, y.dtype, y.weak_type) == (y_.shape, y_.dtype, y_.weak_type)
        tolerance = 8 * float(jnp.finfo(y.dtype).eps)
        double = np.complex128 if jnp.iscomplexobj(y) else np.float64
        assert_allclose(*(np.asarray(z, double) for z in (y, y_)), tolerance, tolerance)


def same_values(ours, theirs, *cases):
    """The same of every case, a function of either: one compilation holds them all."""
    for pair in jax.jit(lambda: [(case(ours), case(theirs)) for case in cases])():
        same(*pair)


def same_with_gradient(name, *args, wrt=(0,), **options):
    """The same, and the same products with cotangents that are 0 where the value is -inf."""

    def outcome(function):
        def of_primals(*primals):
            given = dict(zip(wrt, primals, strict=True))
            return function(*(given.get(i, z) for i, z in enumerate(args)), **options)

        y, pull = jax.vjp(of_primals, *(args[i] for i in wrt))
        y_bar = jnp.where(jnp.isinf(y), 0, jnp.asarray(weights(y.shape), y.dtype))
        return y, pull(y_bar)

    with jax.enable_x64(True):
        same(*jax.jit(lambda: [outcome(f) for f in (getattr(jaxgrad, name), PEERS[name])])())


@pytest.mark.parametrize("axis, masked", AXES, ids=repr)
@pytest.mark.parametrize("name", ROWS)
def test_axis(name, axis, masked):
    same_with_gradient(name, logits(), axis=axis, where=mask() if masked else None)


@pytest.mark.parametrize("name", ROWS)
def test_axis_of_another_type(name):
    for axis in (np.int64(1), [0, 1], [-1]):  # jax.nn.log_softmax takes no list
        plain = tuple(axis) if isinstance(axis, list) else int(axis)
        ours = getattr(jaxgrad, name)(logits(), axis=axis)
        same(ours, getattr(jaxgrad, name)(logits(), axis=plain))


@pytest.mark.parametrize("name", ROWS)
def test_mask_that_broadcasts(name):
    masks = mask()[0], mask()[0, 0], mask()[:, :, :1], True
    cases = [lambda f, where=where: f(logits(), -1, where=where) for where in masks]
    same_values(getattr(jaxgrad, name), PEERS[name], *cases)


X = np.array([[3, 0, 2, 1], [0, 1, 1, 0]])
INPUTS = {
    "int32": X.astype(np.int32),
    "int8": X.astype(np.int8),
    "float16": X.astype(np.float16),
    "float64, narrowed": X.astype(np.float64),
    "no rows": np.zeros((0, 4), np.float32),
    "no entries": np.zeros((3, 0), np.float32),
    "nothing": np.zeros((0, 0), np.float32),
    "float": 2.0,
    "int": 2,
    "scalar": np.float32(2.0),
    "weak": jnp.asarray(2.0),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # jax.nn casts -inf to int
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", ROWS)
def test_kinds_of_input(name, kind, standard_promotion):
    axes = (-1, None) if np.ndim(INPUTS[kind]) else (None,)
    cases = [lambda f, axis=axis: f(INPUTS[kind], axis) for axis in axes]
    same_values(getattr(jaxgrad, name), PEERS[name], *cases)


B = np.random.default_rng(4).uniform(-1.0, 1.5, SHAPE).astype(np.float32)
B[0, 1] = 0
FACTORS = {
    "of every entry": B,
    "of columns": B[0, 0],
    "of rows": B[:, :, :1],
    "of more axes": np.stack([B, -B]),
    "of integers": np.arange(4) - 1,
    "bool": B > 0,
    "float": 2.0,
    "negative": -1.0,
    "zero": 0.0,
}


@pytest.mark.parametrize("b", FACTORS)
def test_logsumexp_with_factors(b, standard_promotion):
    """Op by op, as the peer: whether products that cancel are fused with their sum decides 0."""
    for axis, keepdims, return_sign, where in (
        (-1, False, True, None),
        (-1, False, False, mask()),
        ((0, -1), True, True, mask()),
        (None, False, False, None),
    ):
        given = logits(), axis, FACTORS[b], keepdims, return_sign, where
        same(jaxgrad.logsumexp(*given), jax.nn.logsumexp(*given))


def test_gradient_of_logsumexp_with_factors():
    """Where no factor is 0: there jax.nn loses the gradient to it."""
    b = jnp.where(B == 0, 0.5, B)
    same_with_gradient("logsumexp", logits(), -1, abs(b), wrt=(0, 2))
    bars = jnp.ones(SHAPE[:2]), jnp.zeros(SHAPE[:2])

    def pulled(f):
        return jax.vjp(lambda a, b: f(a, -1, b, return_sign=True), logits(), b)[1](bars)

    same_values(jaxgrad.logsumexp, jax.nn.logsumexp, pulled)


@pytest.mark.parametrize("options", [{}, {"axis": -1, "return_sign": True}, {"b": B}], ids=list)
def test_complex_logsumexp(options, standard_promotion):
    a = logits() + 1j * logits()[::-1]
    cases = [lambda f: f(a, **options), lambda f: f(logits(), **options | {"b": 1j * B})]
    same_values(jaxgrad.logsumexp, jax.nn.logsumexp, *cases)


def test_tanh():
    cases = [lambda f, x=x: f(x) for x in INPUTS.values()]
    same_values(jaxgrad.tanh, jnp.tanh, *cases)


def test_complex_tanh(standard_promotion):
    z = logits() + 1j * logits()[::-1]
    slope = lambda f: jax.grad(f, holomorphic=True)(0.3 + 0.2j)
    same_values(jaxgrad.tanh, jnp.tanh, lambda f: f(z), slope)


@pytest.mark.parametrize("axis, masked", AXES, ids=repr)
def test_dense_losses_by_axis(axis, masked):
    """Where a mask hides entries optax has the gradient to their labels NaN: not compared."""
    where, wrt = (mask(), (0,)) if masked else (None, (0, 1))
    same_with_gradient(DENSE, logits(), labels(), axis, where, wrt=wrt)


@pytest.mark.parametrize(
    "shapes",
    [
        (SHAPE, (3, 4)),
        (SHAPE, (4,)),
        ((3, 4), SHAPE),
        (SHAPE, (2, 1, 4)),
        ((1, 1, 4), SHAPE),
        (SHAPE, ()),
    ],
    ids=repr,
)
def test_dense_labels_broadcast(shapes, standard_promotion):
    x, t = shapes
    same_with_gradient(DENSE, logits(x), labels(t), wrt=(0, 1))


def test_dense_labels_of_other_dtypes(standard_promotion):
    kinds = labels() > 0.5, (4 * labels()).astype("int32"), 1, labels(dtype="bfloat16")
    cases = [lambda f, t=t: f(logits(), t) for t in kinds]
    same_values(jaxgrad.softmax_cross_entropy, PEERS[DENSE], *cases)


INTEGER_AXES = (0, 1, -1, (0, 1), (1, 0), (2, 0), (-1, -2), (0, 1, 2), ())


@pytest.mark.parametrize("masked", ["none", "classes", "rows"])
@pytest.mark.parametrize("axis", INTEGER_AXES, ids=repr)
def test_integer_losses_by_axis(axis, masked):
    """Several axes number their classes in the order in which they are named."""
    rng = np.random.default_rng(5)
    axes = axis if isinstance(axis, tuple) else (axis,)
    classes = [SHAPE[a] for a in axes]
    rows = tuple(np.delete(SHAPE, axes))
    index = rng.integers(0, int(np.prod(classes)), rows)
    where = rng.random((*rows, int(np.prod(classes)))) < 0.5
    np.put_along_axis(where, index[..., None], True, -1)  # optax ignores a mask over the label
    where = np.moveaxis(where.reshape(*rows, *classes), range(-len(axes), 0), axes)
    where = {"none": None, "classes": jnp.asarray(where), "rows": jnp.asarray(index % 2 == 0)}
    same_with_gradient(INTEGER, logits(), jnp.asarray(index), axis, where[masked])


@pytest.mark.parametrize(
    "name, axis, where",
    [
        (DENSE, -1, mask()[..., 0]),
        (DENSE, 0, mask()[0]),
        (DENSE, (0, 2), mask()[0, :, 0]),
        (DENSE, -1, mask()[:1, :, 0]),
        (DENSE, -1, jnp.asarray(True)),
        (INTEGER, -1, mask()[:, :1, 0]),
    ],
    ids=lambda z: str(getattr(z, "shape", z)),
)
def test_mask_of_rows(name, axis, where, standard_promotion):
    """Of whole rows, or of the rank of the logits: optax tells them apart by rank."""
    t = labels() if name == DENSE else jnp.ones(SHAPE[:2], int)
    same_with_gradient(name, logits(), t, axis, where)


@pytest.mark.parametrize("x64", [False, True])
def test_labels_of_every_integer_dtype(x64):
    """More classes than the narrow dtypes can count."""
    x, index = logits((2, 300)), np.array([127, 3])
    dtypes = [kind + bits for kind in ("int", "uint") for bits in ("8", "16", "32", "64")]
    ours = jaxgrad.softmax_cross_entropy_with_integer_labels
    with jax.enable_x64(x64):
        found = jax.jit(lambda: [ours(x, index.astype(dtype)) for dtype in dtypes])()
        for loss in found:
            same(loss, PEERS[INTEGER](x, index.astype(np.int32)))


@pytest.mark.parametrize("shape", [(0, 4), (0,), (1, 1)])
def test_losses_of_few_classes_or_rows(shape):
    same_with_gradient(DENSE, logits(shape), labels(shape))
    if shape[-1]:
        same_with_gradient(INTEGER, logits(shape), jnp.zeros(shape[:-1], int))
