"""Kernels on a mesh of eight devices: one device's results, and no collectives but those it takes.

Most comparisons compile one function that holds several kernels: compilation is what they cost.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import AxisType, NamedSharding
from meshes import abstract, close, collectives, mesh_of, sends_in_branches, sent

import jaxgrad
from jaxgrad import SparseLabels, forward_mode, linear_softmax_cross_entropy
from jaxgrad.parallel import sharded

T, D, V = 8, 6, 16

pytestmark = pytest.mark.usefixtures("eight_devices", "standard_promotion")


def arrays(rng):
    k = jax.random.split(rng, 9)
    f64 = functools.partial(jax.random.normal, dtype=jnp.float64)
    x = 3 * f64(k[0], (T, V))
    x = x.at[1, 3].set(60.0).at[2].set(-2.0).at[4, 5:].set(-jnp.inf)  # a winner, ties, infinities
    where = jax.random.bernoulli(k[1], 0.7, (T, V)).at[3].set(False).at[1, 3].set(True)
    labels = jnp.array([3, 3, 5, 7, -100, 1, 15, 0])
    at_label = (jnp.arange(V) == labels[:, None]) & (jnp.arange(T)[:, None] != 3)
    return {
        "x": x,
        "finite": jnp.where(x == -jnp.inf, 0, x),
        "where": where,
        "label_where": where | at_label,
        "labels": labels,
        "b": f64(k[2], (T, V)),
        "t": jax.nn.softmax(f64(k[3], (T, V))),
        "h": f64(k[4], (T, D)),
        "w": 2 * f64(k[5], (D, V)),
        "bias": f64(k[6], (V,)),
        "weights": jax.random.uniform(k[7], (T,), jnp.float64),
        "indices": jax.random.randint(k[8], (T, 3), 0, V).at[5, 1].set(-100),
        "rule": {
            "label_smoothing": jnp.float64(0.1),
            "z_loss": jnp.float64(0.1),
            "temperature": jnp.float64(0.7),
            "logit_soft_cap": jnp.float64(30.0),
        },
    }


SPECS = {
    **dict.fromkeys(("x", "finite", "where", "label_where", "b", "t"), P("data", "model")),
    **dict.fromkeys(("labels", "h", "weights", "indices"), P("data")),
    "w": P(None, "model"),
    "bias": P("model"),
    "rule": P(),
}


def finite(z):
    return jnp.where(jnp.isfinite(z), z, 0)


def rows_of(a, axis_name):
    """A number a row from every row kernel; rows that are cut over ``axis_name`` are added up."""
    over = lambda z: z if axis_name is None else lax.psum(z, axis_name)
    call = lambda f, *args, **kwargs: f(*args, **kwargs, axis_name=axis_name)
    where, some = a["where"], a["label_where"]
    y = call(jaxgrad.softmax, a["x"], where=where)
    z = call(jaxgrad.log_softmax, a["finite"], where=where)
    lse, sign = call(jaxgrad.logsumexp, a["x"], axis=-1, b=a["b"], return_sign=True, where=where)
    integer = functools.partial(
        call, jaxgrad.softmax_cross_entropy_with_integer_labels, labels=a["labels"]
    )
    return {
        "softmax": over((y * a["t"]).sum(-1)),
        "log_softmax": over((finite(z) * a["t"]).sum(-1)),
        "logsumexp": finite(call(jaxgrad.logsumexp, a["x"], axis=-1)),
        "factors": finite(lse) * sign,
        "dense": call(jaxgrad.softmax_cross_entropy, a["finite"], a["t"], where=where, **a["rule"]),
        "integer": integer(logits=a["finite"], where=some, ignore_index=-100, **a["rule"]),
        "plain": finite(integer(logits=a["finite"])),
    }


def head_of(a, axis_name, chunk_size=None):
    """The fused head with labels of three kinds, and with both schedules."""
    call = functools.partial(
        linear_softmax_cross_entropy, a["h"], a["w"], chunk_size=chunk_size, axis_name=axis_name
    )
    integer = functools.partial(
        call, a["labels"], a["bias"], (a["bias"] > -1.0), ignore_index=-100, return_aux=True
    )
    loss, aux = integer(**a["rule"])
    sparse = SparseLabels(a["indices"], a["weights"][:, None] * jnp.ones((1, 3)))
    rows = {
        "loss": finite(loss),
        "aux": aux.lse + jnp.sin(aux.entropy) + aux.z_loss,
        "dense": call(a["t"]),
        "sparse": call(sparse, ignore_index=-100, label_smoothing=0.1),
    }
    total = integer(weights=a["weights"], reduction="sum", **a["rule"])[0]
    return rows, (finite(total), aux.argmax)


def scalar(rows):
    return sum((rows[k] * jnp.cos(jnp.arange(T) + i)).sum() for i, k in enumerate(sorted(rows)))


def differentiable(a):
    return {k: z for k, z in a.items() if jnp.issubdtype(jax.tree.leaves(z)[0].dtype, jnp.floating)}


def on_mesh(function, mesh, out_specs):
    def call(a):
        body = functools.partial(function, axis_name="model")
        specs = {k: SPECS[k] for k in a}
        return jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=out_specs)(a)

    return call


def hessian_vector(f, a):
    return jax.jvp(jax.grad(f), (a,), (jax.tree.map(lambda z: jnp.sin(finite(z)), a),))[1]


def compiled(function, a):
    """``function`` for ``a``, which waits for no shard in a branch that another may not take."""
    traced = jax.jit(function).trace(a)
    assert not sends_in_branches(traced)
    return traced.lower().compile()


def gradient_of_gradient(f, a):
    """Whose second pass runs backward through what is in the first."""
    g = lambda a: sum(jnp.sin(finite(z)).sum() for z in jax.tree.leaves(jax.grad(f)(a)))
    return jax.grad(g)(a)


def test_row_kernels(x64, unoptimised, rng):
    a = arrays(rng)
    wrt = differentiable(a)

    def measured(rows):
        def some(names, part):
            found = rows(a | part)
            return scalar({k: found[k] for k in names or found})

        all_rows, of_log_softmax = (functools.partial(some, z) for z in (None, ["log_softmax"]))
        return lambda part: (
            rows(a | part),
            jax.grad(all_rows)(part),
            hessian_vector(of_log_softmax, {"finite": part["finite"]}),
        ), functools.partial(gradient_of_gradient, all_rows)

    expected = jax.jit(measured(functools.partial(rows_of, axis_name=None))[0])(wrt)
    found, second_order = measured(on_mesh(rows_of, mesh_of(data=2, model=4), P("data")))
    close(compiled(found, wrt)(wrt), expected)
    assert not sends_in_branches(jax.jit(second_order).trace(wrt))


def test_fused_head(x64, unoptimised, rng):
    a = arrays(rng)
    wrt = differentiable(a)

    def measured(head):
        def f(part):
            rows, (total, best) = head(a | part)
            return scalar(rows) + jnp.sum(total), (rows, best)

        return jax.value_and_grad(f, has_aux=True)

    def on_shards(a, axis_name):
        rows, (total, best) = head_of(a, axis_name, chunk_size=(3, 3))
        return rows, (lax.psum(total, "data"), best)

    out_specs = (P("data"), (P(), P("data")))
    on_mesh_ = measured(on_mesh(on_shards, mesh_of(data=2, model=4), out_specs))
    expected = jax.jit(measured(functools.partial(head_of, axis_name=None)))(wrt)
    close(compiled(on_mesh_, wrt)(wrt), expected)


def problem():
    """Tokens, weights, logits, and queries of eight heads; labels, and a cotangent each loss."""
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = ((64, 8), (8, V), (64, V), (8, 4, 8, 2))
    h, w, x, q = (jax.random.normal(*z, jnp.float64) for z in zip(keys, shapes, strict=True))
    return (h, 2 * w, 3 * x, q), jnp.arange(64) * 7 % V, jnp.cos(jnp.arange(64.0))


def losses(head, labels, c):
    """Of (tokens, weights): Σ c l, the same by a scan that keeps nothing, and the mean of l."""

    def total(h, w):
        return (head(h, w, labels) * c).sum()

    def scanned(h, w):
        @jax.checkpoint
        def step(total, some):
            h, labels, c = some
            return total + (head(h, w, labels) * c).sum(), None

        parts = jax.tree.map(lambda z: z.reshape(2, 32, *z.shape[1:]), (h, labels, c))
        return lax.scan(step, 0.0, parts)[0]

    def mean(h, w):
        return head(h.reshape(8, 8, -1), w, labels.reshape(8, 8), reduction="mean")

    return total, scanned, mean


def with_gradients(f):
    return jax.value_and_grad(f, (0, 1))


def to_second_order(f):
    """Value, gradients, and the product of the Hessian with a vector."""
    return lambda h, w: jax.jvp(with_gradients(f), (h, w), (jnp.cos(h), jnp.sin(w)))


@functools.cache
def in_one_place():
    """What :func:`in_every_position` finds, by JAX's own functions on one device."""
    arrays, labels, c = problem()

    def head(h, w, labels, reduction=None):
        log_p = jax.nn.log_softmax(h @ w)
        loss = -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
        return loss if reduction is None else loss.mean()

    def all_of_them(h, w, x, q):
        total, _, mean = losses(head, labels, c)
        by_c, by_mean = with_gradients(total)(h, w), with_gradients(mean)(h, w)
        integer = lambda x: (head(x, jnp.eye(V), labels) * c).sum()
        p = lambda q: jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, q) / np.sqrt(2))
        attention = lambda q: jnp.sin(jnp.einsum("bnts,bsnh->btnh", p(q), q)).sum()
        return {
            "outside": to_second_order(total)(h, w),
            "inside": by_c,
            "classes over two axes": by_c,
            "sequence and features": by_mean,
            "partly manual": by_c,
            "cut logits": jax.value_and_grad(integer)(x),
            "cut heads": jax.value_and_grad(attention)(q),
        }

    return jax.tree.map(np.asarray, jax.jit(all_of_them)(*arrays))


def in_every_position(mesh, labels, c):
    """The same on a mesh of the axes data and model."""
    head, explicit = linear_softmax_cross_entropy, mesh.axis_types[0] == AxisType.Explicit
    of = functools.partial(sharded, head, None if explicit else mesh)

    def inside(axis_names):
        tokens = P("data") if "data" in axis_names else P()

        def on_device(h, w, labels, c):
            with_axis = functools.partial(head, axis_name="model")
            value, bars = with_gradients(losses(with_axis, labels, c)[0])(h, w)
            return lax.psum(value, "data") if "data" in axis_names else value, bars

        specs = (tokens, P(None, "model"), tokens, tokens)
        out_specs = (P(), (tokens, P(None, "model")))
        mapped = jax.shard_map(
            on_device, mesh=mesh, in_specs=specs, out_specs=out_specs, axis_names=axis_names
        )
        return lambda h, w: mapped(cut(h, P("data")), w, labels, c)

    def cut(z, spec):
        placed = NamedSharding(mesh, spec)
        return (
            jax.sharding.reshard(z, placed) if explicit else lax.with_sharding_constraint(z, placed)
        )

    def integer(x):
        loss = jaxgrad.softmax_cross_entropy_with_integer_labels
        return (loss(cut(x, P("data", "model")), cut(labels, P("data"))) * c).sum()

    def attention(q):
        q = cut(q, P("data", None, "model"))
        return jnp.sin(jaxgrad.dot_product_attention(q, q, q)).sum()

    def all_of_them(h, w, x, q):
        both = {"batch_axes": "data", "vocab_axis_name": "model"}
        rows = {"batch_axes": "data", "sequence_axes": "model", "fsdp_axis": "data"}
        _, scanned, _ = losses(of(**both), labels, c)
        found = {
            "outside": to_second_order(scanned),
            "classes over two axes": with_gradients(
                losses(of(vocab_axis_name=("data", "model")), labels, c)[0]
            ),
            "sequence and features": with_gradients(losses(of(**rows), labels, c)[2]),
        }
        if not explicit:  # inside of shard_map an axis is manual, of whichever kind it was
            found["inside"] = inside({"data", "model"})
            if mesh.shape["model"] > 1:  # of one device, XLA refuses even a bare psum
                found["partly manual"] = inside({"model"})
        return {name: f(h, w) for name, f in found.items()} | {
            "cut logits": jax.value_and_grad(integer)(x),
            "cut heads": jax.value_and_grad(attention)(q),
        }

    return all_of_them


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
def test_every_position(x64, unoptimised, sizes, kind):
    mesh = mesh_of(kind, data=sizes[0], model=sizes[1])
    arrays, labels, c = problem()
    with jax.set_mesh(mesh):
        found = jax.jit(in_every_position(mesh, labels, c))(*arrays)
    expected = in_one_place()
    close(found, {name: expected[name] for name in found})


def test_eager(x64, unoptimised, rng):
    x = 3 * jax.random.normal(rng, (T, V), jnp.float64)
    spec = P("data", "model")
    on_mesh = jax.shard_map(
        functools.partial(jaxgrad.softmax, axis_name="model"),
        mesh=mesh_of(data=2, model=4),
        in_specs=spec,
        out_specs=spec,
    )
    f = lambda softmax, x: jnp.sin(3 * softmax(x)).sum()
    close(
        jax.grad(functools.partial(f, on_mesh))(x),
        jax.grad(functools.partial(f, jax.nn.softmax))(x),
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_what_plain_jit_sends(kind):
    """Sharded arguments, no axis named: a number or two a row, never a row."""
    mesh = mesh_of(kind, data=2, model=4)
    logits = abstract(mesh, (64, 256), P("data", "model"))
    labels = abstract(mesh, (64,), P("data"), jnp.int32)
    heads = abstract(mesh, (4, 64, 4, 8), P("data", None, "model"))

    def f(logits, labels, q):
        integer = jaxgrad.softmax_cross_entropy_with_integer_labels(logits, labels)
        log_p = jaxgrad.log_softmax(logits) * jaxgrad.softmax(logits)
        o = jaxgrad.dot_product_attention(q, q, q, is_causal=True)
        return integer.sum() + log_p.sum() + o.sum()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(f, (0, 2))).lower(logits, labels, heads).compile()
    found = collectives(step)
    assert {op for op, _, _ in found} == {"all-reduce"}
    shapes = {shape for _, shapes, _ in found for shape in shapes}
    assert shapes <= {"f32[32]", "f32[32,1]", "pred[]", "f32[]"}


@pytest.mark.parametrize("module", [jaxgrad, forward_mode], ids=["default", "forward"])
def test_sixteen_bits(module):
    """What keeps wide copies apart must keep what varies over the mesh apart too: traced alone."""
    x, labels = jnp.zeros((T, V), "bfloat16"), jnp.zeros(T, jnp.int32)
    integer = functools.partial(module.softmax_cross_entropy_with_integer_labels, labels=labels)
    cut = P(None, "model")
    for function, out in (
        (module.softmax, cut),
        (module.log_softmax, cut),
        (functools.partial(module.logsumexp, axis=-1), P()),
        (lambda x, **over: module.softmax_cross_entropy(x, x, **over), P()),
        (lambda x, **over: integer(x, **over), P()),
    ):
        over = functools.partial(function, axis_name="model")
        mapped = jax.shard_map(over, mesh=mesh_of(model=8), in_specs=cut, out_specs=out)
        x_bar = jax.eval_shape(jax.grad(lambda x, f=mapped: f(x).sum().astype(jnp.float32)), x)
        assert x_bar.dtype == x.dtype


def test_attention_inside_shard_map_sums_outside_of_its_branches():
    """Keys and bias are the same on all shards, whose tiles past the diagonal are branches."""

    def f(q, k, bias):
        o = jaxgrad.dot_product_attention(q, k, k, bias, is_causal=True)
        return lax.psum((o * o).sum(), "data")

    f = jax.shard_map(f, mesh=mesh_of(data=8), in_specs=(P("data"), P(), P()), out_specs=P())
    shapes = ((8, 1024, 1, 4), (1, 1024, 1, 4), (1, 1, 1024, 1024))
    args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    second_order = jax.jit(lambda *a: gradient_of_gradient(lambda a: f(*a), a)).trace(*args)
    assert {in_branch for _, _, in_branch in sent(second_order)} == {False}


def test_gradient_inside_vmap(x64, unoptimised, rng):
    a = arrays(rng)
    f = lambda x, axis_name: jaxgrad.softmax_cross_entropy_with_integer_labels(
        x, a["labels"], ignore_index=-100, label_smoothing=0.1, axis_name=axis_name
    ).sum()
    parts = a["finite"].reshape(T, 4, V // 4)
    shards = functools.partial(jax.grad(f), axis_name="shards")
    found = jax.vmap(shards, in_axes=1, out_axes=1, axis_name="shards")(parts)
    close(found.reshape(T, V), jax.grad(f)(a["finite"], None))


def head_with(mesh, axis_name="model", w=(None, "model"), labels=(), fsdp_axis=None, **options):
    call = functools.partial(linear_softmax_cross_entropy, axis_name=axis_name, fsdp_axis=fsdp_axis)
    in_specs = (P(), P(*w), P(*labels))
    mapped = jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=P(), **options)
    return lambda: jax.eval_shape(
        mapped, jnp.zeros((4, D)), jnp.zeros((D, V)), jnp.zeros(4, jnp.int32)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": "nowhere"}, "axis_name must name an axis of the shard_map or vmap"),
        ({"check_vma": False}, r"axis_name='model' needs shard_map\(..., check_vma=True\)"),
        ({"w": ()}, "w must be cut over axis_name='model'"),
        ({"labels": ("model",)}, "labels must be the same on every shard of axis_name='model'"),
        ({"fsdp_axis": "nowhere"}, "fsdp_axis must name an axis of the shard_map or vmap"),
        ({"fsdp_axis": "data"}, "w must be cut over fsdp_axis='data'"),
        ({"fsdp_axis": "data", "w": ("data", "model")}, "x must be cut over fsdp_axis='data'"),
    ],
    ids=[
        "no such axis",
        "check_vma",
        "w whole",
        "labels cut",
        "no such features",
        "features whole",
        "tokens whole",
    ],
)
def test_wrong_uses_inside_shard_map(options, message):
    with pytest.raises(ValueError, match=f"linear_softmax_cross_entropy: {message}"):
        head_with(mesh_of(data=2, model=4), **options)()
