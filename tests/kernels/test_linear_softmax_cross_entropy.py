"""The fused head against the plain composition, written here once more in the plainest form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.special import xlogy

from jaxgrad import (
    SparseLabels,
    linear_log_probs,
    linear_softmax_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from jaxgrad.kernels.loss_options import make_rule

pytestmark = pytest.mark.usefixtures("unoptimised")

T, D, V, K = 7, 5, 23, 3

FACTORS = {
    "labels": ("integer", "dense", "sparse"),
    "reduction": (None, "sum", "mean"),
    "chunk_size": (None, (3, 8), (7, 5), (2, 23)),
    "vocab_axis": (-1, 0),
    "bias": (False, True),
    "where": (None, "classes", "tokens"),
    "weights": (False, True),
    "ignore": (False, True),
    "label_smoothing": (0.0, 0.2),
    "z_loss": (0.0, 0.1),
    "temperature": (1.0, 0.7),
    "logit_soft_cap": (None, 1.5),
}


def covering(factors):
    """Cases in which every two values of two factors meet at least once."""
    names = list(factors)
    todo = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    while todo:
        case = {}
        for (a, i), (b, j) in sorted(todo):
            if case.get(a, i) == i and case.get(b, j) == j:
                case |= {a: i, b: j}
        case = {n: case.get(n, 0) for n in names}
        todo = {p for p in todo if not all(case[n] == i for n, i in p)}
        yield {n: factors[n][i] for n, i in case.items()}


CASES = list(covering(FACTORS))


def test_every_pair_of_options_is_covered():
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(str(c[a]), str(c[b])) for c in CASES}
        assert len(met) == len(FACTORS[a]) * len(FACTORS[b])
    assert len(CASES) < 40


def problem(case, dtype=jnp.float64, t=T, v=V):
    """Differentiable arguments, and the rest, of one case."""
    rng = np.random.default_rng(0)
    args = {
        "x": rng.standard_normal((t, D)),
        "w": rng.standard_normal((D, v) if case["vocab_axis"] else (v, D)),
    }
    rest = {n: case[n] for n in ("reduction", "chunk_size", "vocab_axis")}
    index, indices = rng.integers(0, v, t), rng.integers(0, v, (t, K))
    if case["where"] is not None:
        where = rng.random((v,) if case["where"] == "classes" else (t, v)) < 0.7
        where[..., v // 2] = True
        index = np.where(np.broadcast_to(where, (t, v))[np.arange(t), index], index, v // 2)
        rest["where"] = where
    if case["ignore"] and case["labels"] != "dense":
        rest["ignore_index"] = 3 if case["z_loss"] else -100
        index[2 % t] = indices[2 % t] = indices[5 % t, 1] = rest["ignore_index"]
    if case["labels"] == "dense":
        args["labels"] = 0.9 * rng.dirichlet(np.ones(v), t)
    elif case["labels"] == "sparse":
        args["probs"] = rng.random((t, K))
        rest["indices"] = indices
    else:
        rest["labels"] = index
    if case["bias"]:
        args["bias"] = rng.standard_normal(v)
    if case["weights"]:
        args["weights"] = rng.random(t)
    for name in ("label_smoothing", "z_loss", "temperature", "logit_soft_cap"):
        if case[name] != FACTORS[name][0]:
            args[name] = case[name]
    rest = {n: jnp.asarray(z) if isinstance(z, np.ndarray) else z for n, z in rest.items()}
    return {n: jnp.asarray(z, dtype) for n, z in args.items()}, rest


def fused(args, rest, **more):
    args, rest = dict(args), dict(rest)
    if "probs" in args:
        args["labels"] = SparseLabels(rest.pop("indices"), args.pop("probs"))
    return linear_softmax_cross_entropy(**args, **rest, **more)


def plain(args, rest):
    """loss, lse, entropy and argmax by the logits; no other line of the package runs here."""
    a, r = dict(args), dict(rest)
    z = a["x"] @ (a["w"] if r["vocab_axis"] else a["w"].T) + a.get("bias", 0.0)
    if "logit_soft_cap" in a:
        z = a["logit_soft_cap"] * jnp.tanh(z / a["logit_soft_cap"])
    z = z / a.get("temperature", 1.0)
    valid = jnp.broadcast_to(r.get("where", True), z.shape)
    ignore, counted = r.get("ignore_index"), jnp.ones(len(z), bool)
    if "labels" in a:
        q = a["labels"]
    elif "probs" in a:
        kept = r["indices"] != ignore if ignore is not None else jnp.ones((len(z), K), bool)
        q = (
            jax.nn.one_hot(r["indices"], z.shape[1], dtype=z.dtype)
            * jnp.where(kept, a["probs"], 0.0)[..., None]
        ).sum(1)
        counted = kept.any(1)
    else:
        q = jax.nn.one_hot(r["labels"], z.shape[1], dtype=z.dtype)
        counted = r["labels"] != ignore if ignore is not None else counted
    q = jnp.where(valid, q, 0.0)
    s = q.sum(-1, keepdims=True)
    eps = a.get("label_smoothing", 0.0)
    q = jnp.where(valid, (1 - eps) * q + eps * s / valid.sum(-1, keepdims=True), 0.0)
    lse = jax.nn.logsumexp(z, -1, where=valid, keepdims=True)
    log_p = jnp.where(valid, z - lse, 0.0)
    loss = -(q * log_p).sum(-1) + a.get("z_loss", 0.0) * lse[:, 0] ** 2
    p = jnp.where(valid, jnp.exp(log_p), 0.0)
    rows = [jnp.where(counted, n, 0.0) for n in (loss, lse[:, 0], -xlogy(p, p).sum(-1))]
    weights = jnp.where(counted, a.get("weights", jnp.ones(len(z))), 0.0)
    loss = {
        None: lambda: rows[0] * a.get("weights", 1.0),
        "sum": lambda: (weights * rows[0]).sum(),
        "mean": lambda: (weights * rows[0]).sum() / jnp.where(counted.any(), weights.sum(), 1.0),
    }[r["reduction"]]()
    return loss, rows[1], rows[2], jnp.where(valid, z, -jnp.inf).argmax(-1)


def scalar(loss):
    """Some function of the losses with a cotangent that differs from token to token."""
    return (loss * jnp.cos(jnp.arange(loss.size, dtype=loss.dtype).reshape(loss.shape))).sum()


def close(ours, theirs, rtol=1e-12, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


def check(args, rest):
    """Loss and gradients; without a gradient, the loss again and what comes with it."""

    def theirs(a):
        loss, *aux = plain(a, rest)
        return scalar(loss), (loss, *aux)

    @jax.jit
    def ours(a):
        slope = jax.value_and_grad(lambda a: scalar(fused(a, rest)))(a)
        return slope, fused(a, rest, return_aux=True), unfused(a, rest)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        (value, expected), bars = jax.jit(jax.value_and_grad(theirs, has_aux=True))(args)
    slope, (loss, aux), loss_unfused = ours(args)
    close(slope, (value, bars))
    close((loss, aux.lse, aux.entropy), expected[:3])
    counted = expected[1] != 0
    close(np.where(counted, aux.argmax, 0), np.where(counted, expected[3], 0))
    close(aux.z_loss, args.get("z_loss", 0.0) * aux.lse**2)
    if loss_unfused is not None:
        close(loss, loss_unfused)


def unfused(a, r):
    """The losses by the kernel that takes logits, where there is one."""
    if r["reduction"] is not None or "indices" in r:
        return None
    logits = a["x"] @ (a["w"] if r["vocab_axis"] else a["w"].T)
    if "bias" in a:
        logits += a["bias"][None]
    options = {n: a[n] for n in make_rule.__annotations__ if n in a}
    if "where" in r:
        options["where"] = jnp.broadcast_to(r["where"], logits.shape)
    if "ignore_index" in r:
        options["ignore_index"] = r["ignore_index"]
    if "labels" in a:
        loss = softmax_cross_entropy(logits, a["labels"], **options)
    else:
        loss = softmax_cross_entropy_with_integer_labels(logits, r["labels"], **options)
    return loss * a.get("weights", 1.0)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_all_results_are_those_of_the_logits(case, x64):
    check(*problem(case))


@settings(max_examples=3)
@given(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FACTORS.items()}),
    st.tuples(st.integers(1, 9), st.integers(1, 19)),
    st.tuples(st.integers(1, 10), st.integers(1, 20)),
)
def test_so_they_are_for_any_sizes_and_options(case, sizes, chunk_size):
    with jax.enable_x64(True):
        case |= {"chunk_size": chunk_size}
        check(*problem(case, t=sizes[0], v=sizes[1]))


def everything(**more):
    """A case with every option in use."""
    return {
        "labels": "integer",
        "reduction": None,
        "chunk_size": (3, 8),
        "vocab_axis": -1,
        "bias": True,
        "where": "tokens",
        "weights": True,
        "ignore": True,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "temperature": 0.7,
        "logit_soft_cap": 1.5,
    } | more


def test_aux_has_a_gradient_without_a_reduction(x64):
    args, rest = problem(everything())

    def theirs(a):
        _, lse, entropy, _ = plain(a, rest)
        return scalar(lse) + scalar(entropy**2) + scalar(a["z_loss"] * lse**2)

    def ours(a):
        _, aux = fused(a, rest, return_aux=True)
        return scalar(aux.lse) + scalar(aux.entropy**2) + scalar(aux.z_loss)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(jax.grad(theirs))(args)
    close(jax.jit(jax.grad(ours))(args), expected)


def test_aux_has_none_with_a_reduction():
    args, rest = problem(everything(reduction="mean"), jnp.float32)
    bar = jax.jit(jax.grad(lambda a: fused(a, rest, return_aux=True)[1].lse.sum()))(args)
    assert all((z == 0).all() for z in jax.tree.leaves(bar))


@pytest.mark.parametrize(
    "labels, reduction",
    (("integer", "mean"), ("sparse", None)),
)
def test_second_order_both_ways(labels, reduction, x64):
    args, rest = problem(everything(labels=labels, reduction=reduction))
    dot = jax.tree.map(np.cos, args)

    def forward(f):
        return jax.jvp(jax.grad(f), (args,), (dot,))[1]

    def reverse(f):
        def slope(a):
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(f)(a), dot)))

        return jax.grad(slope)(args)

    ours = lambda a: scalar(fused(a, rest))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(lambda: forward(lambda a: scalar(plain(a, rest)[0])))()
    for found in jax.jit(lambda: (forward(ours), reverse(ours)))():
        close(found, expected, 1e-9, 1e-9)


def test_second_order_where_tiles_tie(x64):
    """With w = 0 every tile has the same maximum, which moves with the logits of none of them."""
    x, v, labels = small(t=3, v=7, dtype=jnp.float64)

    def product(loss):
        return jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (v,))[1])(jnp.zeros((D, 7)))

    expected = product(lambda w: -jax.nn.log_softmax(x @ w)[jnp.arange(3), labels].mean())
    found = product(lambda w: linear_softmax_cross_entropy(x, w, labels, chunk_size=(2, 3)).mean())
    close(found, expected)


REDUCTIONS = (None, "mean")


def small(t=4, v=6, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(dtype) for shape in ((t, D), (D, v)))
    return x, w, rng.integers(0, v, t)


@functools.cache
def gradient(reduction, **more):
    """Loss and both gradients, as one program."""

    def of(x, w, labels, **arrays):
        def f(x, w):
            loss = linear_softmax_cross_entropy(x, w, labels, reduction=reduction, **arrays, **more)
            return loss.sum(), loss

        (_, loss), bars = jax.value_and_grad(f, (0, 1), has_aux=True)(x, w)
        return loss, *bars

    return jax.jit(of)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token(reduction):
    x, w, labels = small(t=0)
    loss, x_bar, w_bar = gradient(reduction)(x, w, labels)
    assert loss.shape == ((0,) if reduction is None else ())
    assert (loss == 0).all() and x_bar.shape == (0, D) and (w_bar == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_is_certain(reduction):
    for got in gradient(reduction)(*small(v=1)):
        assert (got == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_tokens_change_nothing(reduction):
    """Even with NaN in them; and all of them ignored are worth 0."""
    x, w, labels = small()
    ignoring = gradient(reduction, ignore_index=-100, chunk_size=(3, 4))
    for got in ignoring(x * np.nan, w, np.full(4, -100)):
        assert (got == 0).all()
    one = np.arange(4) == 1
    loss, x_bar, w_bar = ignoring(np.where(one[:, None], np.nan, x), w, np.where(one, -100, labels))
    loss_, x_bar_, w_bar_ = gradient(reduction)(x[~one], w, labels[~one])
    close(loss if reduction else loss[~one], loss_, 1e-6)
    close((x_bar[~one], w_bar), (x_bar_, w_bar_), 1e-5, 1e-6)
    assert (x_bar[1] == 0).all()


@pytest.mark.parametrize("bad", (-1, 6))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_label_out_of_range_is_nan_for_its_token_alone(bad, reduction):
    x, w, labels = small()
    labels[1] = bad
    loss, x_bar, w_bar = gradient(reduction, ignore_index=-100, chunk_size=(3, 4))(x, w, labels)
    if reduction is None:
        assert np.isnan(loss).tolist() == [False, True, False, False]
    else:
        assert np.isnan(loss)
    assert np.isnan(x_bar).any(1).tolist() == [False, True, False, False]
    assert np.isfinite(w_bar).all() and (w_bar != 0).any()


def test_a_sparse_label_out_of_range_is_nan_for_its_token_alone():
    x, w, _ = small()
    labels = SparseLabels(jnp.array([[0, 1], [2, 6], [3, -1], [-1, -1]]), jnp.full((4, 2), 0.5))
    loss, x_bar, w_bar = gradient(None, ignore_index=-1)(x, w, labels)
    assert np.isnan(loss).tolist() == [False, True, False, False]
    assert loss[3] == 0 and (x_bar[3] == 0).all() and np.isfinite(w_bar).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_classes_but_one_masked_is_certain_and_all_masked_is_zero(reduction):
    x, w, _ = small()
    where = np.eye(4, 6, dtype=bool) & (np.arange(4) < 3)[:, None]
    for got in gradient(reduction, chunk_size=(2, 4))(x, w, np.arange(4), where=where):
        assert (got == 0).all()


def test_a_class_of_bias_minus_infinity_is_never_predicted():
    x, w, _ = small()
    bias = np.where(np.arange(6) == 2, -np.inf, np.float32(0))
    loss, x_bar, w_bar = gradient(None, chunk_size=(4, 2))(x, w, np.arange(4), bias=bias)
    assert np.isinf(loss).tolist() == [False, False, True, False]
    assert np.isfinite(x_bar).all() and np.isfinite(w_bar).all()
    without = np.array([0, 1, 3, 4, 5])
    close(loss[0], gradient(None)(x[:1], w[:, without], np.array([0]))[0][0], 1e-6)


def test_a_label_masked_is_infinite_with_a_finite_gradient():
    x, w, labels = small()
    where = np.arange(6) != labels[0]
    loss, x_bar, w_bar = gradient(None, chunk_size=(4, 4))(x, w, labels, where=where)
    assert np.isposinf(loss[0]) and np.isfinite(x_bar).all() and np.isfinite(w_bar).all()


def test_a_winning_label_keeps_its_digits():
    x, w = np.ones((1, 1), np.float32), np.float32(20 * (np.arange(9) == 5))[None]
    for chunk_size in ((1, 9), (1, 4)):
        loss, x_bar, _ = gradient("sum", chunk_size=chunk_size)(x, w, np.array([5]))
        np.testing.assert_allclose(loss, 8 * np.exp(-20.0), rtol=1e-6)
        np.testing.assert_allclose(x_bar[0, 0], -20 * 8 * np.exp(-20.0), rtol=1e-6)


@pytest.mark.parametrize("reduction", (None, "mean"))
def test_transformations(reduction, standard_promotion):
    x, w, labels = small(t=6, v=9)

    def f(x, w, labels):
        return linear_softmax_cross_entropy(
            x, w, labels, reduction=reduction, chunk_size=(4, 4)
        ).sum()

    grad = jax.value_and_grad(f, (0, 1))
    jitted = jax.jit(grad)
    plain = jitted(x, w, labels)
    some = x[:, None], np.stack([w] * 6), labels[:, None]
    each = [jitted(*z) for z in zip(*some, strict=True)]

    @jax.jit
    def transformed(x, w, labels, some):
        def accumulate(total, batch):
            return jax.tree.map(jnp.add, total, jax.grad(f, 1)(batch[0], w, batch[1])), None

        scanned, _ = jax.lax.scan(accumulate, jnp.zeros_like(w), some[::2])
        remade = jax.value_and_grad(jax.checkpoint(f), (0, 1))(x, w, labels)
        return remade, jax.vmap(grad)(*some), scanned

    remade, mapped, scanned = transformed(x, w, labels, some)
    close(remade, plain, 1e-6, 1e-6)
    close(mapped, jax.tree.map(lambda *z: np.stack(z), *each), 1e-5, 1e-6)
    close(scanned, sum(np.asarray(bars[1]) for _, bars in each), 1e-5, 1e-6)
    with jax.debug_nans(True), jax.checking_leaks():
        close(grad(x, w, labels), plain, 1e-6, 1e-6)
    given = jnp.copy(w)
    step = jax.jit(lambda w, x, labels: w - grad(x, w, labels)[1][1], donate_argnums=0)
    exported = jax.export.deserialize(jax.export.export(step)(w, x, labels).serialize())
    close(exported.call(w, x, labels), w - plain[1][1], 1e-6, 1e-6)
    close(step(given, x, labels), w - plain[1][1], 1e-6, 1e-6)
    assert given.is_deleted()


def test_leading_dimensions_are_tokens():
    x, w, labels = small(t=6)
    flat = linear_softmax_cross_entropy(x, w, labels)
    shaped = linear_softmax_cross_entropy(x.reshape(2, 3, D), w, labels.reshape(2, 3))
    close(shaped, flat.reshape(2, 3), 1e-6)
    close(linear_softmax_cross_entropy(x[0], w, labels[0]), flat[0], 1e-6)


def test_log_probs_and_entropy(x64):
    x, w, labels = small(dtype=jnp.float64)
    labels[2] = -100
    log_softmax = lambda x, w: jax.nn.log_softmax(x @ w / 0.5)

    def ours(x, w):
        log_p, entropy = linear_log_probs(
            x, w, labels, temperature=0.5, ignore_index=-100, return_entropy=True
        )
        return scalar(jnp.stack([log_p, entropy]))

    def theirs(x, w):
        log_p = log_softmax(x, w)
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        rows = jnp.stack([log_p[jnp.arange(4), labels], entropy])
        return scalar(jnp.where((labels == -100)[None], 0.0, rows))

    close(*jax.jit(lambda: [jax.value_and_grad(f, (0, 1))(x, w) for f in (ours, theirs)])())


def test_errors_name_the_argument():
    x, w, labels = jnp.ones((3, 4)), jnp.ones((4, 5)), jnp.zeros(3, int)
    for error, match, args, more in (
        (ValueError, r"x must be float\[..., 5\]", (x, w, labels), {"vocab_axis": 0}),
        (ValueError, r"labels must be int\[3\] or float\[3, 5\]", (x, w, labels[:2]), {}),
        (ValueError, r"w must be \[d, v\]", (x, w[None], labels), {}),
        (ValueError, r"bias must be float\[5\]", (x, w, labels, jnp.ones(4)), {}),
        (ValueError, r"where must be bool", (x, w, labels, None, labels), {}),
        (ValueError, r"weights must be float\[3\]", (x, w, labels), {"weights": jnp.ones(2)}),
        (ValueError, r"reduction must be None", (x, w, labels), {"reduction": "max"}),
        (ValueError, r"chunk_size must be positive", (x, w, labels), {"chunk_size": 0}),
        (ValueError, r"temperature must be above 0", (x, w, labels), {"temperature": 0.0}),
        (ValueError, r"ignore_index needs", (x, w, jnp.ones((3, 5))), {"ignore_index": 0}),
        (
            ValueError,
            r"labels must be SparseLabels",
            (x, w, SparseLabels(jnp.zeros((3, 2), int), jnp.ones((3, 1)))),
            {},
        ),
        (TypeError, r"x must be real", (x.astype(complex), w, labels), {}),
    ):
        with pytest.raises(error, match=f"linear_softmax_cross_entropy: {match}"):
            linear_softmax_cross_entropy(*args, **more)
    with pytest.raises(TypeError, match="linear_log_probs: labels must be integer"):
        linear_log_probs(x, w, x[:, 0])
