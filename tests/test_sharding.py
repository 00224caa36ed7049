"""Kernels on a mesh of eight devices: one device's results, and no collectives but those it takes.

Most comparisons compile one function that holds several kernels: compilation is what they cost.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import P, lax
from jax.sharding import AxisType, NamedSharding
from numpy.testing import assert_allclose

import jaxgrad
from jaxgrad import SparseLabels, forward_mode, linear_softmax_cross_entropy
from jaxgrad.parallel import ring_attention, sharded

T, D, V = 8, 6, 16
close = functools.partial(jax.tree.map, functools.partial(assert_allclose, rtol=1e-12, atol=1e-12))

pytestmark = pytest.mark.usefixtures("eight_devices", "standard_promotion")


@pytest.fixture
def eight_devices():
    if jax.device_count() < 8:
        pytest.skip("a mesh of eight devices needs as many")


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def collectives(compiled):
    """(kind, shapes, whether in a loop) of every collective of a compiled function."""
    text = compiled.as_text()
    loops, found, name = set(re.findall(r"body=%?([\w.\-]+)", text)), [], None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[1]
        op = re.search(r"= (.*?) (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", line)
        if op:
            shapes = sorted(re.findall(r"\w+\[[\d,]*\]", op[1]))
            found.append((op[2], tuple(shapes), name in loops))
    return sorted(found)


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


def head_of(a, axis_name):
    """The fused head with labels of three kinds, and with both schedules."""
    call = functools.partial(
        linear_softmax_cross_entropy, a["h"], a["w"], chunk_size=(3, 5), axis_name=axis_name
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


def on_mesh(function, mesh, out_specs, axis_name="model"):
    def call(a):
        whole = lambda spec: P(*(axis_name if axis == "model" else axis for axis in spec))
        specs = {k: whole(SPECS[k]) for k in a}
        body = functools.partial(function, axis_name=axis_name)
        return jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=out_specs)(a)

    return call


def hessian_vector(f, a):
    return jax.jvp(jax.grad(f), (a,), (jax.tree.map(lambda z: jnp.sin(finite(z)), a),))[1]


def test_row_kernels(x64, unoptimised, rng):
    a = arrays(rng)

    def measured(rows):
        def some(names, part):
            found = rows(a | part)
            return scalar({k: found[k] for k in names or found})

        wrt = differentiable(a)
        of_log_softmax = functools.partial(some, ("log_softmax",))
        return jax.jit(
            lambda part: (
                rows(a | part),
                jax.grad(functools.partial(some, None))(part),
                hessian_vector(of_log_softmax, {"finite": part["finite"]}),
            )
        )(wrt)

    expected = measured(functools.partial(rows_of, axis_name=None))
    mesh = mesh_of(data=2, model=4)
    close(measured(on_mesh(rows_of, mesh, P("data"))), expected)


@pytest.mark.parametrize("axis_name", ["model", None], ids=["classes and tokens", "tokens alone"])
def test_fused_head(x64, unoptimised, rng, axis_name):
    a = arrays(rng)

    def measured(head):
        def f(part):
            rows, (total, best) = head(a | part)
            return scalar(rows) + jnp.sum(total), (rows, best)

        return jax.jit(jax.value_and_grad(f, has_aux=True))(differentiable(a))

    def on_shards(a, axis_name):
        rows, (total, best) = head_of(a, axis_name)
        return rows, (lax.psum(total, "data"), best)

    mesh = mesh_of(data=2, model=4 if axis_name else 1)
    out_specs = (P("data"), (P(), P("data")))
    found = measured(on_mesh(on_shards, mesh, out_specs, axis_name))
    close(found, measured(functools.partial(head_of, axis_name=None)))


EVERY_AXIS = {
    "batch_axes": "data",
    "sequence_axes": "sequence",
    "vocab_axis_name": "model",
    "fsdp_axis": "data",
}


def test_sharded(x64, unoptimised, rng):
    """Means over all tokens, w put together over one axis and its classes cut over others."""
    a = arrays(rng)
    h, labels, weights = a["h"].reshape(4, 2, D), a["labels"].reshape(4, 2), a["weights"]

    def measured(head):
        def f(h, w, bias, weights, temperature):
            mean = functools.partial(head, reduction="mean", ignore_index=-100, chunk_size=(2, 3))
            weights = weights.reshape(4, 2)
            return mean(h, w, labels, bias, weights=weights, temperature=temperature)

        args = (h, a["w"], a["bias"], weights, jnp.float64(0.7))
        return jax.jit(jax.value_and_grad(f, range(5)))(*args)

    expected = measured(linear_softmax_cross_entropy)
    mesh = mesh_of(AxisType.Explicit, data=2, sequence=2, model=2)
    with jax.set_mesh(mesh):
        close(measured(sharded(linear_softmax_cross_entropy, **EVERY_AXIS)), expected)
    mesh = mesh_of(data=4, model=1, expert=2)
    axes = {"batch_axes": "data", "vocab_axis_name": ("model", "expert")}
    close(measured(sharded(linear_softmax_cross_entropy, mesh, **axes)), expected)


def abstract(mesh, shape, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def test_what_the_fused_head_sends_and_holds():
    """Of each tile of tokens a maximum and three sums; x̄ once. Nothing of tokens × classes."""
    t, d, v = 4096, 256, 32768
    mesh = mesh_of(model=8)
    head = sharded(linear_softmax_cross_entropy, mesh, vocab_axis_name="model")
    args = (
        abstract(mesh, (t, d), P()),
        abstract(mesh, (d, v), P(None, "model")),
        abstract(mesh, (t,), P(), jnp.int32),
    )
    step = jax.value_and_grad(lambda x, w, labels: head(x, w, labels).mean(), (0, 1))
    compiled = jax.jit(step).lower(*args).compile()
    row = "f32[1024,1]"
    assert collectives(compiled) == [
        ("all-reduce", (row,), True),
        ("all-reduce", (row, row, row), True),
        ("all-reduce", (f"f32[{t},{d}]",), False),
    ]
    assert compiled.memory_analysis().temp_size_in_bytes <= 16 * 2**20


def test_what_a_training_step_sends():
    """bfloat16 parameters: w is collected once, and gradients are summed in float32."""
    t, d, v = 4096, 32, 128
    mesh = mesh_of(data=2, model=4)
    axes = {"batch_axes": "data", "vocab_axis_name": "model"}
    head = sharded(linear_softmax_cross_entropy, mesh, **axes)
    args = (
        abstract(mesh, (t, d), P("data"), jnp.bfloat16),
        abstract(mesh, (d, v), P(None, "model"), jnp.bfloat16),
        abstract(mesh, (t,), P("data"), jnp.int32),
    )
    step = jax.value_and_grad(lambda *args: head(*args, reduction="mean"), (0, 1))
    found = collectives(jax.jit(step).lower(*args).compile())
    gradients = [op for op in found if not op[2]]
    sizes = [shape for _, shapes, _ in gradients for shape in shapes if shape != "f32[]"]
    assert {op[0] for op in found} == {"all-reduce"}
    assert sorted(sizes) == sorted([f"f32[{t // 2},{d}]", f"f32[{d},{v // 4}]"])
    assert len(found) - len(gradients) == 2


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


def test_gradient_inside_vmap(x64, unoptimised, rng):
    a = arrays(rng)
    f = lambda x, axis_name: jaxgrad.softmax_cross_entropy_with_integer_labels(
        x, a["labels"], ignore_index=-100, label_smoothing=0.1, axis_name=axis_name
    ).sum()
    parts = a["finite"].reshape(T, 4, V // 4)
    shards = functools.partial(jax.grad(f), axis_name="shards")
    found = jax.vmap(shards, in_axes=1, out_axes=1, axis_name="shards")(parts)
    close(found.reshape(T, V), jax.grad(f)(a["finite"], None))


def test_scan_remat_second_order_and_export(x64, unoptimised, rng):
    a = arrays(rng)

    def measured(head):
        def loss(w):
            @jax.checkpoint
            def step(total, h):
                return total + head(h, w, a["labels"][:4], ignore_index=-100).sum(), None

            return lax.scan(step, 0.0, a["h"].reshape(2, 4, D))[0]

        return jax.jit(functools.partial(hessian_vector, loss))

    mesh = mesh_of(data=2, model=4)
    axes = {"batch_axes": "data", "vocab_axis_name": "model"}
    found = measured(sharded(linear_softmax_cross_entropy, mesh, **axes))
    close(found(a["w"]), measured(linear_softmax_cross_entropy)(a["w"]))
    w = abstract(mesh, a["w"].shape, P(None, "model"), jnp.float64)
    assert jax.export.export(found)(w).nr_devices == 8


def head_with(mesh, axis_name="model", w=(None, "model"), labels=(), **options):
    call = functools.partial(linear_softmax_cross_entropy, axis_name=axis_name)
    in_specs = (P(), P(*w), P(*labels))
    mapped = jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=P(), **options)
    return lambda: jax.eval_shape(
        mapped, jnp.zeros((4, D)), jnp.zeros((D, V)), jnp.zeros(4, jnp.int32)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": "nowhere"}, "axis_name must name an axis of the shard_map or vmap"),
        ({"check_vma": False}, r"needs shard_map\(..., check_vma=True\)"),
        ({"w": ()}, "w must be cut over axis_name='model'"),
        ({"labels": ("model",)}, "labels must be the same on every shard of axis_name='model'"),
    ],
    ids=["no such axis", "check_vma", "w whole", "labels cut"],
)
def test_wrong_uses_inside_shard_map(options, message):
    with pytest.raises(ValueError, match=message):
        head_with(mesh_of(data=2, model=4), **options)()


def test_wrong_uses_of_sharded():
    x, w, labels = jnp.zeros((4, D)), jnp.zeros((D, V + 2)), jnp.zeros(4, jnp.int32)
    mesh = mesh_of(data=2, model=4)
    of = functools.partial(sharded, linear_softmax_cross_entropy)
    with pytest.raises(ValueError, match="mesh must have the axes"):
        of(batch_axes="data")(x, w, labels)
    with pytest.raises(ValueError, match=r"mesh must have the axes .*'rows'"):
        of(mesh, batch_axes="rows")(x, w, labels)
    with pytest.raises(ValueError, match="fsdp_axis must be among the axes that cut the tokens"):
        of(mesh, batch_axes="data", fsdp_axis="model")
    with pytest.raises(ValueError, match="axis 1 of w must be a multiple of the 4 shards"):
        of(mesh, vocab_axis_name="model")(x, w, labels)
    with pytest.raises(ValueError, match=r"x must be .* for sequence_axes"):
        of(mesh, sequence_axes="data")(x, w, labels)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "segments"])
def test_ring_attention(x64, unoptimised, rng, is_causal):
    keys = jax.random.split(rng, 5)
    shapes = ((2, 16, 4, 3), (2, 16, 2, 3), (2, 16, 2, 5))
    q, k, v = (
        jax.random.normal(s, shape, jnp.float64) for s, shape in zip(keys[:3], shapes, strict=True)
    )
    o_bar = jax.random.normal(keys[3], (2, 16, 4, 5), jnp.float64)
    ids = jnp.tile(jnp.arange(16) // 6, (2, 1))
    options = {"is_causal": is_causal, "return_residual": True}

    def measured(attention):
        def f(q, k, v, cap, scale):
            o, lse = attention(q, k, v, cap, scale, None if is_causal else ids)
            return (o * o_bar).sum() + jnp.sin(lse).sum(), (o, lse)

        args = (q, k, v, jnp.float64(2.0), jnp.float64(0.4))
        return jax.jit(jax.value_and_grad(f, range(5), has_aux=True))(*args)

    def whole(q, k, v, cap, scale, ids):
        call = functools.partial(jaxgrad.dot_product_attention, **options)
        return call(q, k, v, logits_soft_cap=cap, scale=scale, segment_ids=ids)

    def part(q, k, v, cap, scale, ids):
        call = functools.partial(ring_attention, axis_name="sequence", **options)
        return call(q, k, v, logits_soft_cap=cap, scale=scale, segment_ids=ids)

    mesh, tokens = mesh_of(data=2, sequence=4), P("data", "sequence")
    in_specs = (tokens, tokens, tokens, P(), P(), tokens)
    ring = jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=(tokens, tokens))
    close(measured(ring), measured(whole))


def test_what_a_ring_sends():
    """Keys and values, from one shard to the next: never the whole sequence."""
    mesh, tokens = mesh_of(sequence=8), P(None, "sequence")
    ring = functools.partial(ring_attention, axis_name="sequence", is_causal=True)
    ring = jax.shard_map(ring, mesh=mesh, in_specs=tokens, out_specs=tokens)
    q = abstract(mesh, (1, 64, 2, 4), tokens)
    found = collectives(jax.jit(ring).lower(q, q, q).compile())
    assert {(op, in_loop) for op, _, in_loop in found} == {
        ("collective-permute", False),
        ("collective-permute", True),
    }
    assert {shape for _, shapes, _ in found for shape in shapes} == {"f32[1,2,1,8,4]"}
    assert len(found) == 4
