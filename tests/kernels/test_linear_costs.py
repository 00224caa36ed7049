"""What the fused head costs and how exact it is: products, memory and digits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import linear_softmax_cross_entropy

REDUCTIONS = (None, "mean")
# Compiled the quick way a program holds the same products, and to the byte the same memory.
as_quick = pytest.mark.usefixtures("unoptimised")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "dtype, bar", ((jnp.float32, 1e-6), (jnp.bfloat16, 2e-3), (jnp.float16, 2e-3))
)
def test_accuracy_against_float64(dtype, bar, reduction, x64):
    t, d, v = 250, 64, 1537  # ragged in both: 3 · 64 + 58, 3 · 512 + 1
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((t, d)), dtype)
    w = jnp.asarray(4 * d**-0.5 * rng.standard_normal((d, v)), dtype)
    labels = rng.integers(0, v, t)

    @jax.jit
    def theirs(x, w):
        def f(x, w):
            z = x @ w
            return (jax.nn.logsumexp(z, -1) - z[jnp.arange(t), labels]).mean()

        return jax.value_and_grad(f, (0, 1))(x, w)

    @jax.jit
    def ours(x, w, shift):
        def f(x, w):
            bias = jnp.full(v, shift, jnp.float32)
            return linear_softmax_cross_entropy(
                x, w, labels, bias, reduction=reduction, chunk_size=(64, 512)
            ).mean()

        return jax.value_and_grad(f, (0, 1))(x, w)

    true, true_bars = theirs(np.float64(x), np.float64(w))
    for shift in (0.0, 20.0):
        loss, bars = ours(x, w, shift)
        assert loss.dtype == jnp.float32
        assert abs(np.float64(loss) - true) <= 1e-6 * abs(true)
        for got, exact in zip(bars, true_bars, strict=True):
            assert got.dtype == dtype
            error = np.linalg.norm(np.float64(got) - exact) / np.linalg.norm(exact)
            # A float32 logit near 20 is rounded by up to 1e-6, whoever adds the bias.
            assert error <= bar + (2e-6 if shift else 0)


def test_float16_gradients_survive_a_mean_over_many_tokens():
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in ((4, 5), (5, 50)))
    labels, weights = np.array([3, 0, 49, 20]), np.float32([1, 1, 1, 1e6])

    def f(w):
        loss = linear_softmax_cross_entropy(
            x.astype(w.dtype), w, labels, weights=weights, reduction="mean"
        )
        return loss * 2.0**15

    with jax.numpy_dtype_promotion("standard"):
        got = np.float32(jax.jit(jax.grad(f))(w.astype(np.float16)))
        true = jax.jit(jax.grad(lambda w: f(w) / 2.0**15))(w)
    np.testing.assert_allclose(got / 2.0**15, true, rtol=0, atol=2e-3 * np.abs(true).max())


def compiled(t, d, v, dtype, reduction, vocab_axis=-1, argnums=(0, 1), **more):
    x = jax.ShapeDtypeStruct((t, d), dtype)
    w = jax.ShapeDtypeStruct((d, v) if vocab_axis else (v, d), dtype)
    labels = jax.ShapeDtypeStruct((t,), jnp.int32)

    def f(x, w, labels):
        return linear_softmax_cross_entropy(
            x, w, labels, reduction=reduction, vocab_axis=vocab_axis, **more
        ).sum()

    f = jax.grad(f, argnums) if argnums else f
    return jax.jit(f).lower(x, w, labels).compile()


@pytest.mark.parametrize("vocab_axis", (-1, 0))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_neither_the_logits_nor_a_wide_or_transposed_w_exist(reduction, vocab_axis):
    t, d, v = 192, 24, 1000
    text = compiled(t, d, v, jnp.bfloat16, reduction, vocab_axis, chunk_size=(64, 96)).as_text()
    shape, turned = (f"{d},{v}", f"{v},{d}") if vocab_axis else (f"{v},{d}", f"{d},{v}")
    entry = text[text.index("ENTRY") :]
    assert f"bf16[{shape}]" in entry
    assert f"[{t},{v}]" not in text and f"[{t * v}]" not in text
    assert f"[{turned}]" not in text
    # A fusion may name the widened w and compute a slice of it; an instruction of its own may not.
    wide = re.findall(rf"= f32\[{shape}\]\S* (?:convert|fusion)\((%[\w.]+)\)", entry)
    assert not [name for name in wide if re.search(rf"{name} = bf16", text)], wide


@as_quick
def test_memory_is_that_of_tiles():
    def temp(t, v, reduction, dtype=jnp.float32):
        memory = compiled(t, 32, v, dtype, reduction, chunk_size=(64, 128))
        return memory.memory_analysis().temp_size_in_bytes

    base, more_tokens, more_classes = (
        temp(t, v, None) for t, v in ((512, 2048), (2048, 2048), (512, 8192))
    )
    assert base <= 2**20
    assert more_classes - base <= 2**16
    assert more_tokens - base <= 4 * 1536 * (32 + 16)  # x̄ and numbers a row, not 128 classes
    # w̄ of 16 bits is summed in 32, a quarter at a time.
    few, many = (temp(512, v, None, jnp.bfloat16) for v in (2048, 8192))
    assert few <= 2**18
    assert many - few <= 32 * 4 * (8192 - 2048) / 4
    kept = 64 * 4 * 2048
    assert temp(512, 2048, "mean") <= kept + 2**20
    assert temp(2048, 2048, "mean") - temp(512, 2048, "mean") <= 4 * 1536 * (32 + 16)
    assert temp(512, 8192, "mean") - temp(512, 2048, "mean") <= 3.1 * kept


@as_quick
def test_second_order_memory_is_that_of_tiles():
    t, d, v = 512, 16, 2048
    x, w = jax.ShapeDtypeStruct((t, d), jnp.float32), jax.ShapeDtypeStruct((d, v), jnp.float32)
    labels = jnp.zeros(t, int)
    for reduction in (None, "mean"):

        def slope(w, x, r=reduction):
            return jax.grad(
                lambda w: linear_softmax_cross_entropy(
                    x, w, labels, reduction=r, chunk_size=(32, 128)
                ).sum()
            )(w)

        for second in (
            jax.grad(lambda w, x, slope=slope: (slope(w, x) ** 2).sum()),
            lambda w, x, slope=slope: jax.jvp(slope, (w, x), (w, x))[1],
        ):
            memory = jax.jit(second).lower(w, x).compile().memory_analysis()
            assert memory.temp_size_in_bytes < 4 * t * v / 2


@as_quick
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_products_are_made_only_for_those_who_ask(reduction):
    def products(argnums):
        text = compiled(
            64, 16, 256, jnp.float32, reduction, argnums=argnums, chunk_size=(32, 128)
        ).as_text()
        return len(re.findall(r" dot\(", text))

    logits = 1 if reduction else 2
    assert products(()) == 1
    assert products((0,)) == products((1,)) == logits + 1
    assert products((0, 1)) == logits + 2
