"""A fused head on the arrays of a mesh: one device's results, what is sent, what is held."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.sharding import AxisType
from meshes import abstract, close, collectives, mesh_of, sends_in_branches, sent

from jaxgrad import forward_mode, linear_softmax_cross_entropy
from jaxgrad.parallel import sharded

T, D, V = 8, 6, 16

pytestmark = pytest.mark.usefixtures("eight_devices", "standard_promotion")


def arrays(rng):
    k = jax.random.split(rng, 4)
    shapes = ((4, 4, D), (D, V), (V,), (4, 4))
    h, w, bias, weights = (jax.random.normal(*z, jnp.float64) for z in zip(k, shapes, strict=True))
    labels = jnp.array([[3, 3, 9, 4], [5, 7, -100, 2], [-100, 1, 6, 6], [15, 0, 8, 13]])
    return (h, 2 * w, bias, weights**2, jnp.float64(0.7)), labels


EVERY_AXIS = {
    "batch_axes": "data",
    "sequence_axes": "sequence",
    "vocab_axis_name": "model",
    "fsdp_axis": "data",
}


def test_every_axis_at_once(x64, unoptimised, rng):
    """Means, by tiles that divide neither tokens nor classes; classes over two axes."""
    args, labels = arrays(rng)

    def measured(head, vocab_axis=1):
        def f(h, w, bias, weights, temperature):
            mean = functools.partial(head, reduction="mean", ignore_index=-100, chunk_size=(3, 3))
            options = {"weights": weights, "temperature": temperature, "vocab_axis": vocab_axis}
            return mean(h, w if vocab_axis else w.T, labels, bias, **options)

        step = jax.jit(jax.value_and_grad(f, range(5))).trace(*args)
        assert not sends_in_branches(step)
        return step.lower().compile()(*args)

    expected = measured(linear_softmax_cross_entropy)
    mesh = mesh_of(AxisType.Explicit, data=2, sequence=2, model=2)
    with jax.set_mesh(mesh):
        close(measured(sharded(linear_softmax_cross_entropy, **EVERY_AXIS)), expected)
    mesh = mesh_of(data=2, model=2, expert=2)
    axes = {"batch_axes": "data", "vocab_axis_name": ("model", "expert"), "fsdp_axis": "data"}
    head = sharded(linear_softmax_cross_entropy, mesh, **axes, gather_once=True)
    close(measured(head, vocab_axis=0), expected)


def test_second_order_forward_mode_and_export(x64, unoptimised, rng):
    """Through the weights that are collected tile by tile; in forward mode, at once."""
    (h, w, *_), labels = arrays(rng)
    h_dot, w_dot = jnp.cos(h), jnp.sin(w)
    mesh = mesh_of(data=2, model=4)

    def measured(of):
        def loss(head, h, w):
            return of(head)(h, w, labels, ignore_index=-100).sum()

        def f(h, w):
            by_w = jax.grad(functools.partial(loss, linear_softmax_cross_entropy), 1)
            forward = functools.partial(loss, forward_mode.linear_softmax_cross_entropy)
            pushed = jax.jvp(forward, (h, w), (h_dot, w_dot))
            return jax.jvp(by_w, (h, w), (h_dot, w_dot))[1], pushed

        return jax.jit(f)

    over = functools.partial(sharded, mesh=mesh, batch_axes="data", fsdp_axis="data")
    found = measured(over)
    close(found(h, w), measured(lambda head: head)(h, w))
    w = abstract(mesh, w.shape, P("data"), jnp.float64)
    h = abstract(mesh, h.shape, P("data"), jnp.float64)
    assert jax.export.export(found)(h, w).nr_devices == 8


def traced(mesh, t, d, v, dtype="float32", reduction="mean", **axes):
    """A head and its gradients by tokens and weights, each where its argument is."""
    head = sharded(linear_softmax_cross_entropy, mesh, **axes)
    tokens, classes = axes.get("batch_axes"), axes.get("vocab_axis_name")
    x = abstract(mesh, (t, d), P(tokens), dtype)
    w = abstract(mesh, (d, v), P(axes.get("fsdp_axis"), classes), dtype)
    labels = abstract(mesh, (t,), P(tokens), jnp.int32)
    step = jax.value_and_grad(lambda *args: head(*args, reduction=reduction).sum(), (0, 1))
    placed = (None, (x.sharding, w.sharding))
    return jax.jit(step, out_shardings=placed).trace(x, w, labels)


def large(program):
    """The collectives of more than a number a token."""
    return [
        op for op in collectives(program) if any("[]" not in s and "1]" not in s for s in op[1])
    ]


def test_what_classes_over_all_devices_cost():
    """Of each tile of tokens a maximum and three sums; x̄ once. Nothing of tokens × classes."""
    t, d, v = 4096, 256, 32768
    step = traced(mesh_of(model=8), t, d, v, reduction=None, vocab_axis_name="model")
    program, row = step.lower().compile(), "f32[1024,1]"
    assert collectives(program) == [
        ("all-reduce", (row,), True),
        ("all-reduce", (row, row, row), True),
        ("all-reduce", (f"f32[{t},{d}]",), False),
    ]
    assert program.memory_analysis().temp_size_in_bytes <= 16 * 2**20


def test_what_tokens_and_classes_cost():
    """x̄ and w̄ once."""
    t, d, v = 4096, 32, 128
    axes = {"batch_axes": "data", "vocab_axis_name": "model"}
    program = traced(mesh_of(data=2, model=4), t, d, v, **axes).lower().compile()
    assert {op for op, _, _ in collectives(program)} == {"all-reduce"}
    assert sorted(shape for _, shapes, _ in large(program) for shape in shapes) == sorted(
        [f"f32[{t // 2},{d}]", f"f32[{d},{v // 4}]"]
    )


@pytest.mark.parametrize("gather_once", [False, True], ids=["by tiles", "at once"])
def test_what_features_cost(gather_once):
    """w, twice if by tiles, and w̄ once to the device that keeps it; whole only if at once.

    There a mean keeps 64 MiB of logits besides, which are as much as twice w.
    """
    t, d, v = 4096, 256, 32768
    axes = {"batch_axes": "data", "fsdp_axis": "data", "gather_once": gather_once}
    program = traced(mesh_of(data=8), t, d, v, **axes).lower().compile()
    width = v if gather_once else 2048
    collected = ("all-gather", (f"f32[{d},{width}]",), not gather_once)
    scattered = ("reduce-scatter", (f"f32[{d // 8},{width}]",), not gather_once)
    assert large(program) == [collected] * (1 if gather_once else 2) + [scattered]
    w = 4 * d * v
    assert program.memory_analysis().temp_size_in_bytes <= (4.2 if gather_once else 0.3) * w


@pytest.mark.parametrize("gather_once", [None, False, True], ids=["no features", "tiles", "once"])
def test_gradients_of_16_bits_are_summed_in_32(gather_once):
    """As traced: XLA's CPU would widen them itself."""
    features = {} if gather_once is None else {"fsdp_axis": "data", "gather_once": gather_once}
    axes = {"batch_axes": "data", "vocab_axis_name": "model"} | features
    step = traced(mesh_of(data=2, model=4), 8, 16, 16, jnp.bfloat16, **axes)
    dtypes = {(name, dtype) for name, dtype, _ in sent(step)}
    assert {dtype for name, dtype in dtypes if name.startswith(("psum", "reduce"))} == {"float32"}
    assert {dtype for name, dtype in dtypes if name.startswith("all_gather")} <= {"bfloat16"}
    assert any(name.startswith("reduce_scatter") for name, _ in dtypes) == bool(features)


def test_wrong_uses():
    x, w, labels = jnp.zeros((4, D)), jnp.zeros((D, V + 2)), jnp.zeros(4, jnp.int32)
    mesh = mesh_of(data=2, model=4)
    of = functools.partial(sharded, linear_softmax_cross_entropy)
    with pytest.raises(ValueError, match="sharded: mesh must have the axes"):
        of(batch_axes="data")(x, w, labels)
    with pytest.raises(ValueError, match=r"sharded: mesh must have the axes .*'rows'"):
        of(mesh, batch_axes="rows")(x, w, labels)
    with pytest.raises(ValueError, match="fsdp_axis must be among the axes that cut the tokens"):
        of(mesh, batch_axes="data", fsdp_axis="model")
    with pytest.raises(ValueError, match="sharded: gather_once needs fsdp_axis, got None"):
        of(mesh, batch_axes="data", gather_once=True)
    with pytest.raises(ValueError, match="cross_entropy: axis 1 of w must be a multiple of the 4"):
        of(mesh, vocab_axis_name="model")(x, w, labels)
    with pytest.raises(ValueError, match=r"cross_entropy: x must be .* for sequence_axes"):
        of(mesh, sequence_axes="data")(x, w, labels)
