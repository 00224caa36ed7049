"""The fused head against the plain composition, written here once more in the plainest form."""

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


def problem(case, rng, dtype=jnp.float64, t=T, v=V):
    """Differentiable arguments, and the rest, of one case."""
    k = jax.random.split(rng, 8)
    args = {
        "x": jax.random.normal(k[0], (t, D), dtype),
        "w": jax.random.normal(k[1], (D, v) if case["vocab_axis"] else (v, D), dtype),
    }
    rest = {n: case[n] for n in ("reduction", "chunk_size", "vocab_axis")}
    index = jax.random.randint(k[2], (t,), 0, v)
    indices = jax.random.randint(k[3], (t, K), 0, v)
    where = None
    if case["where"] is not None:
        shape = (v,) if case["where"] == "classes" else (t, v)
        where = jax.random.bernoulli(k[4], 0.7, shape)
        where = jnp.where(jnp.arange(v) == v // 2, True, where)
        index = jnp.where(jnp.broadcast_to(where, (t, v))[jnp.arange(t), index], index, v // 2)
        rest["where"] = where
    if case["ignore"] and case["labels"] != "dense":
        rest["ignore_index"] = 3 if case["z_loss"] else -100
        index = index.at[2 % t].set(rest["ignore_index"])
        indices = indices.at[2 % t].set(rest["ignore_index"]).at[5 % t, 1].set(rest["ignore_index"])
    if case["labels"] == "dense":
        args["labels"] = jax.nn.softmax(jax.random.normal(k[5], (t, v), dtype)) * 0.9
    elif case["labels"] == "sparse":
        args["probs"] = jax.random.uniform(k[5], (t, K), dtype)
        rest["indices"] = indices
    else:
        rest["labels"] = index
    if case["bias"]:
        args["bias"] = jax.random.normal(k[6], (v,), dtype)
    if case["weights"]:
        args["weights"] = jax.random.uniform(k[7], (t,), dtype)
    for name in ("label_smoothing", "z_loss", "temperature", "logit_soft_cap"):
        if case[name] != FACTORS[name][0]:
            args[name] = jnp.asarray(case[name], dtype)
    return args, rest


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
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        theirs = jax.jit(jax.value_and_grad(lambda a: scalar(plain(a, rest)[0])))(args)
    ours = jax.jit(jax.value_and_grad(lambda a: scalar(fused(a, rest))))(args)
    close(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_value_and_every_gradient_are_those_of_the_logits(case, rng, x64):
    check(*problem(case, rng))


@settings(max_examples=3)
@given(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FACTORS.items()}),
    st.tuples(st.integers(1, 9), st.integers(1, 19)),
    st.tuples(st.integers(1, 10), st.integers(1, 20)),
)
def test_so_they_are_for_any_sizes_and_options(case, sizes, chunk_size):
    with jax.enable_x64(True):
        case |= {"chunk_size": chunk_size}
        check(*problem(case, jax.random.key(1), t=sizes[0], v=sizes[1]))


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_undifferentiated_it_agrees_with_the_logits_and_the_unfused_losses(case, rng, x64):
    args, rest = problem(case, rng)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        theirs = plain(args, rest)
    loss, aux = fused(args, rest, return_aux=True)
    close((loss, aux.lse, aux.entropy), theirs[:3])
    counted = theirs[1] != 0
    close(jnp.where(counted, aux.argmax, 0), jnp.where(counted, theirs[3], 0))
    close(aux.z_loss, args.get("z_loss", 0.0) * aux.lse**2)
    if case["reduction"] is None and case["labels"] != "sparse":
        logits = args["x"] @ (args["w"] if case["vocab_axis"] else args["w"].T)
        if "bias" in args:
            logits += args["bias"][None]
        options = {n: args[n] for n in make_rule.__annotations__ if n in args}
        if "where" in rest:
            options["where"] = jnp.broadcast_to(rest["where"], (T, V))
        if "ignore_index" in rest:
            options["ignore_index"] = rest["ignore_index"]
        if case["labels"] == "dense":
            unfused = softmax_cross_entropy(logits, args["labels"], **options)
        else:
            unfused = softmax_cross_entropy_with_integer_labels(logits, rest["labels"], **options)
        close(loss, unfused * args.get("weights", 1.0))


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


def test_aux_has_a_gradient_without_a_reduction(rng, x64):
    args, rest = problem(everything(), rng)

    def theirs(a):
        _, lse, entropy, _ = plain(a, rest)
        return scalar(lse) + scalar(entropy**2) + scalar(a["z_loss"] * lse**2)

    def ours(a):
        _, aux = fused(a, rest, return_aux=True)
        return scalar(aux.lse) + scalar(aux.entropy**2) + scalar(aux.z_loss)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = jax.grad(theirs)(args)
    close(jax.grad(ours)(args), expected)


def test_aux_has_none_with_a_reduction(rng):
    args, rest = problem(everything(reduction="mean"), rng, jnp.float32)
    bar = jax.grad(lambda a: fused(a, rest, return_aux=True)[1].lse.sum())(args)
    assert all((z == 0).all() for z in jax.tree.leaves(bar))


@pytest.mark.parametrize(
    "labels, reduction",
    (("integer", "mean"), ("sparse", None)),
)
def test_second_order_both_ways(labels, reduction, rng, x64):
    args, rest = problem(everything(labels=labels, reduction=reduction), rng)
    dot = jax.tree.map(jnp.cos, args)

    def ways(f):
        def slope(a):
            return sum(
                (g * t).sum()
                for g, t in zip(jax.tree.leaves(jax.grad(f)(a)), jax.tree.leaves(dot), strict=True)
            )

        return jax.jvp(jax.grad(f), (args,), (dot,))[1], jax.grad(slope)(args)

    forward, reverse = jax.jit(lambda: ways(lambda a: scalar(fused(a, rest))))()
    close(forward, reverse, 1e-9, 1e-9)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(lambda: ways(lambda a: scalar(plain(a, rest)[0])))()[0]
    close(forward, expected, 1e-9, 1e-9)


def test_second_order_where_tiles_tie(rng, x64):
    """With w = 0 every tile has the same maximum, which moves with the logits of none of them."""
    x, v = jax.random.normal(rng, (3, 4)), jax.random.normal(jax.random.key(1), (4, 7))
    labels = jnp.array([1, 0, 6])

    def product(loss):
        return jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (v,))[1])(jnp.zeros((4, 7)))

    expected = product(lambda w: -jax.nn.log_softmax(x @ w)[jnp.arange(3), labels].mean())
    found = product(lambda w: linear_softmax_cross_entropy(x, w, labels, chunk_size=(2, 3)).mean())
    close(found, expected)


REDUCTIONS = (None, "mean")


def small(rng, t=4, v=6, dtype=jnp.float32):
    k = jax.random.split(rng, 3)
    x, w = jax.random.normal(k[0], (t, D), dtype), jax.random.normal(k[1], (D, v), dtype)
    return x, w, jax.random.randint(k[2], (t,), 0, v)


def with_gradient(x, w, labels, reduction, **more):
    def f(x, w):
        loss = linear_softmax_cross_entropy(x, w, labels, reduction=reduction, **more)
        return loss.sum(), loss

    (_, loss), bars = jax.value_and_grad(f, (0, 1), has_aux=True)(x, w)
    return loss, *bars


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token(reduction, rng):
    x, w, labels = small(rng, t=0)
    loss, x_bar, w_bar = with_gradient(x, w, labels, reduction)
    assert loss.shape == ((0,) if reduction is None else ())
    assert (loss == 0).all() and x_bar.shape == (0, D) and (w_bar == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_is_certain(reduction, rng):
    x, w, labels = small(rng, v=1)
    for got in with_gradient(x, w, labels, reduction):
        assert (got == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_tokens_ignored_is_zero_even_with_nan(reduction, rng):
    x, w, _ = small(rng)
    labels = jnp.full(4, -100)
    for got in with_gradient(x * jnp.nan, w, labels, reduction, ignore_index=-100):
        assert (got == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_ignored_token_changes_nothing(reduction, rng):
    x, w, labels = small(rng)
    nan = jnp.where(jnp.arange(4)[:, None] == 1, jnp.nan, x)
    loss, x_bar, w_bar = with_gradient(
        nan, w, labels.at[1].set(-1), reduction, ignore_index=-1, chunk_size=(3, 4)
    )
    rest = jnp.array([0, 2, 3])
    loss_, x_bar_, w_bar_ = with_gradient(x[rest], w, labels[rest], reduction)
    close(loss if reduction else loss[rest], loss_, 1e-6)
    close((x_bar[rest], w_bar), (x_bar_, w_bar_), 1e-5, 1e-6)
    assert (x_bar[1] == 0).all()


@pytest.mark.parametrize("bad", (-1, 6))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_label_out_of_range_is_nan_for_its_token_alone(bad, reduction, rng):
    x, w, labels = small(rng)
    loss, x_bar, w_bar = with_gradient(
        x, w, labels.at[1].set(bad), reduction, ignore_index=-100, chunk_size=(3, 4)
    )
    if reduction is None:
        assert jnp.isnan(loss).tolist() == [False, True, False, False]
    else:
        assert jnp.isnan(loss)
    assert jnp.isnan(x_bar).any(1).tolist() == [False, True, False, False]
    assert jnp.isfinite(w_bar).all() and (w_bar != 0).any()


def test_a_sparse_label_out_of_range_is_nan_for_its_token_alone(rng):
    x, w, _ = small(rng)
    labels = SparseLabels(jnp.array([[0, 1], [2, 6], [3, -1], [-1, -1]]), jnp.full((4, 2), 0.5))
    loss, x_bar, w_bar = with_gradient(x, w, labels, None, ignore_index=-1)
    assert jnp.isnan(loss).tolist() == [False, True, False, False]
    assert loss[3] == 0 and (x_bar[3] == 0).all() and jnp.isfinite(w_bar).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_classes_but_one_masked_is_certain_and_all_masked_is_zero(reduction, rng):
    x, w, _ = small(rng)
    where = jnp.eye(4, 6, dtype=bool) & (jnp.arange(4) < 3)[:, None]
    w = w.at[:, 5].set(jnp.nan)  # masked throughout
    for got in with_gradient(
        x, w.at[:, 5].set(0), jnp.arange(4), reduction, where=where, chunk_size=(2, 4)
    ):
        assert (got == 0).all()


def test_a_class_of_bias_minus_infinity_is_never_predicted(rng):
    x, w, _ = small(rng)
    bias = jnp.where(jnp.arange(6) == 2, -jnp.inf, 0.0)
    loss, x_bar, w_bar = with_gradient(
        x, w, jnp.array([0, 1, 2, 3]), None, bias=bias, chunk_size=(4, 2)
    )
    assert jnp.isinf(loss).tolist() == [False, False, True, False]
    assert jnp.isfinite(x_bar).all() and jnp.isfinite(w_bar).all()
    without = jnp.array([0, 1, 3, 4, 5])
    close(loss[0], with_gradient(x[:1], w[:, without], jnp.array([0]), None)[0][0], 1e-6)


def test_a_label_masked_is_infinite_with_a_finite_gradient(rng):
    x, w, labels = small(rng)
    where = jnp.arange(6) != labels[0]
    loss, x_bar, w_bar = with_gradient(x, w, labels, None, where=where, chunk_size=(4, 4))
    assert jnp.isposinf(loss[0]) and jnp.isfinite(x_bar).all() and jnp.isfinite(w_bar).all()


def test_a_winning_label_keeps_its_digits(rng):
    x, w = jnp.ones((1, 1)), jnp.zeros((1, 9)).at[0, 5].set(20.0)
    for chunk_size in ((1, 9), (1, 4)):
        loss, x_bar, _ = with_gradient(x, w, jnp.array([5]), "sum", chunk_size=chunk_size)
        np.testing.assert_allclose(loss, 8 * np.exp(-20.0), rtol=1e-6)
        np.testing.assert_allclose(x_bar[0, 0], -20 * 8 * np.exp(-20.0), rtol=1e-6)


@pytest.mark.parametrize("reduction", (None, "mean"))
def test_transformations(reduction, rng, standard_promotion):
    x, w, labels = small(rng, t=6, v=9)

    def f(x, w, labels):
        return linear_softmax_cross_entropy(
            x, w, labels, reduction=reduction, chunk_size=(4, 4)
        ).sum()

    grad = jax.value_and_grad(f, (0, 1))
    plain = grad(x, w, labels)
    close(jax.jit(grad)(x, w, labels), plain, 1e-6, 1e-6)
    close(jax.value_and_grad(jax.checkpoint(f), (0, 1))(x, w, labels), plain, 1e-6, 1e-6)
    some = x[:, None], jnp.stack([w] * 6), labels[:, None]
    each = [grad(*z) for z in zip(*some, strict=True)]
    close(jax.vmap(grad)(*some), jax.tree.map(lambda *z: jnp.stack(z), *each), 1e-5, 1e-6)

    def accumulate(total, batch):
        return jax.tree.map(jnp.add, total, jax.grad(f, 1)(batch[0], w, batch[1])), None

    scanned, _ = jax.lax.scan(accumulate, jnp.zeros_like(w), some[::2])
    close(scanned, sum(bars[1] for _, bars in each), 1e-5, 1e-6)
    exported = jax.export.export(jax.jit(grad))(x, w, labels)
    close(jax.export.deserialize(exported.serialize()).call(x, w, labels), plain, 1e-6, 1e-6)
    with jax.debug_nans(True), jax.checking_leaks():
        close(grad(x, w, labels), plain, 1e-6, 1e-6)
    given = jnp.copy(w)
    step = jax.jit(lambda w, x, labels: w - grad(x, w, labels)[1][1], donate_argnums=0)
    close(step(given, x, labels), w - plain[1][1], 1e-6, 1e-6)
    assert given.is_deleted()


def test_leading_dimensions_are_tokens(rng):
    x, w, labels = small(rng, t=6)
    flat = linear_softmax_cross_entropy(x, w, labels)
    shaped = linear_softmax_cross_entropy(x.reshape(2, 3, D), w, labels.reshape(2, 3))
    close(shaped, flat.reshape(2, 3), 1e-6)
    close(linear_softmax_cross_entropy(x[0], w, labels[0]), flat[0], 1e-6)


def test_log_probs_and_entropy(rng, x64):
    x, w, labels = small(rng, dtype=jnp.float64)
    labels = labels.at[2].set(-100)
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

    close(jax.value_and_grad(ours, (0, 1))(x, w), jax.value_and_grad(theirs, (0, 1))(x, w))


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
