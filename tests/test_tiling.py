import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import tiling


@pytest.mark.parametrize("total", (0, 1, 5, 16, 17))
@pytest.mark.parametrize("size", (1, 4, 16, 20))
def test_fold_visits_every_element_once_in_order(total, size):
    x = jnp.arange(total)

    def body(seen, start, n, kept):
        tile = tiling.take(x, start, n, 0)
        assert kept is None and n <= min(size, total)
        return tiling.add(seen, tile + 1, start), tile

    seen, (full, end) = tiling.fold(body, jnp.zeros(total, int), total, size)
    np.testing.assert_array_equal(seen, x + 1)
    tiles = [full.reshape(-1)] + ([] if end is None else [end])
    np.testing.assert_array_equal(jnp.concatenate(tiles), x)

    def again(seen, start, n, kept):
        return tiling.put(seen, kept, start), None

    seen, _ = tiling.fold(again, jnp.zeros(total, int), total, size, (full, end))
    np.testing.assert_array_equal(seen, x)


@pytest.mark.parametrize("total", (0, 1, 5, 16, 17))
@pytest.mark.parametrize("size", (1, 4, 16, 20))
def test_fold_overlapping_counts_every_element_once_and_joins_the_rows(total, size):
    x = jnp.arange(2 * total).reshape(total, 2)

    def body(times, start, n, new):
        assert n == min(size, total)
        once = jnp.ones(n, int) if new is None else new.astype(int)
        return tiling.add(times, once, start), tiling.take(x, start, n, 0)

    times, rows = tiling.fold_overlapping(body, jnp.zeros(total, int), total, size)
    np.testing.assert_array_equal(times, jnp.ones(total, int))
    np.testing.assert_array_equal(rows, x)


def test_tiles_are_even_and_within_their_limit():
    for total in (0, 1, 7, 1000, 1024, 1025, 16385, 50257, 151936):
        size = tiling.even(total, 1024, 16)
        assert 1 <= size <= max(min(1024, total), 1)
        assert -(-total // size) <= -(-total // 1024) or total == 0
        assert size % 16 == 0 or size == total or total < 1024


@pytest.mark.parametrize("classes", (0, 1, 32768, 50257, 151936, 10**6, 10**9))
@pytest.mark.parametrize("tokens", (0, 1, 512, 2048))
def test_kept_logits_stay_within_the_budget(tokens, classes):
    room = tiling.room("cpu")
    rows, columns = tiling.tile_sizes(tokens, classes, keeps_logits=True, room=room)
    assert 1 <= columns <= room.classes and rows * columns <= room.area
    fits = tokens and 4 * min(tokens, room.kept_tokens) * classes <= room.kept_bytes
    assert room.keeps(tokens, classes) == bool(fits and classes)
    assert not room.keeps(tokens, classes) or 4 * rows * classes <= room.kept_bytes
    assert not tiling.room("gpu").keeps(tokens, classes)
    rows, columns = tiling.tile_sizes(tokens, classes, keeps_logits=False, room=room)
    assert rows <= room.tokens and columns <= room.classes and rows * columns <= room.area


def test_the_derivative_of_a_fold_is_that_of_the_loop():
    x = jnp.linspace(0.0, 1.0, 7)

    def f(x):
        def body(total, start, n, _):
            return total + (jnp.sin(tiling.take(x, start, n, 0)) ** 2).sum(), None

        return tiling.fold(body, 0.0, 7, 3)[0]

    np.testing.assert_allclose(jax.grad(f)(x), jnp.sin(2 * x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jnp.diag(jax.hessian(f)(x)), 2 * jnp.cos(2 * x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "platform, flags, factors",
    [
        ("cpu", {"avx2"}, "f32"),
        ("cpu", {"avx2", "amx_bf16"}, "bf16"),
        ("cpu", {"avx2", "avx512_bf16"}, "bf16"),
        ("tpu", {"avx2"}, "bf16"),
    ],
)
def test_factors_are_rounded_where_there_is_a_product_of_16_bits(
    platform, flags, factors, monkeypatch
):
    monkeypatch.setattr(tiling, "_cpu_flags", lambda: flags)
    a, b = jnp.ones((2, 3), "bfloat16"), jnp.ones((3, 2))
    dimensions = (((1,), (0,)), ((), ()))
    product = jax.jit(lambda a, b: tiling.product(a, b, dimensions, "float32"))
    text = product.trace(a, b).lower(lowering_platforms=(platform,)).as_text()
    assert f"(tensor<2x3x{factors}>, tensor<3x2x{factors}>) -> tensor<2x2xf32>" in text
