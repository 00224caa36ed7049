"""The Pallas kernels of attention for TPU, in Pallas's interpreters, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_truth import assert_near, problem, truth, with_gradients
from jax.experimental.pallas import tpu as pltpu

from jaxgrad import backends, dot_product_attention
from jaxgrad.backends.pallas_tpu import attention_plan

pytestmark = pytest.mark.usefixtures("unoptimised")

T, S = 150, 200  # ragged: two blocks of queries, two of keys
interpreted = functools.partial(
    dot_product_attention, implementation="pallas_interpret", return_residual=True
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_plan, "LARGEST", (128, 128))


def test_window_lengths_groups_and_a_soft_cap(rng):
    given = problem(rng, t=T, s=S, n=2, k=1, h=16, d=24)
    ends, key_ends = np.array([T, 9]), np.array([187, 0])
    options = {"local_window_size": (140, 20), "logits_soft_cap": 2.0}
    options |= {"query_seq_lengths": ends, "key_value_seq_lengths": key_ends}
    t, s = np.arange(T)[:, None], np.arange(S)
    seen = (t - 140 <= s) & (s <= t + 20)
    seen = seen & (t < ends[:, None, None, None]) & (s < key_ends[:, None, None, None])
    out = with_gradients(functools.partial(interpreted, **options), *given)
    assert_near(out, truth(*given, seen, cap=2.0), 1e-6)


def test_bfloat16_causal_segments(rng):
    given = problem(rng, "bfloat16", t=T, s=T, n=1, k=1)
    ids = np.stack([np.arange(T) // 60, np.arange(T) // 149])
    seen = np.tri(T, dtype=bool) & (ids[:, None, :, None] == ids[:, None, None, :])
    f = functools.partial(interpreted, is_causal=True, segment_ids=ids)
    out = with_gradients(f, *given)
    assert [x.dtype for x in out] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    for actual, exact in zip(out, truth(*given, seen), strict=True):  # half an ulp is up to 3.9e-3
        assert np.linalg.norm(np.float64(actual) - exact) <= 4e-3 * np.linalg.norm(exact)


def test_keys_in_stretches_where_their_gradients_are_too_large(rng, monkeypatch):
    monkeypatch.setattr(attention_plan, "usable", lambda: 15 * 2**17)
    given = problem(rng, b=1, t=128, s=400, n=2, k=1, h=8, d=8)
    plan = attention_plan.Plan(1, 1, 2, 128, 400, 8, 8, 4, None, None, True)
    assert attention_plan.backward(plan).grid == (1, 1, 2, 2, 1, 2)
    assert_near(with_gradients(interpreted, *given), truth(*given), 1e-6)


@pytest.mark.parametrize("t, s", [(T, S), (256, 256)], ids=["ragged", "in place"])
def test_memory_that_nobody_wrote_is_not_read(t, s, rng, monkeypatch):
    monkeypatch.setattr(backends, "platform", lambda: "tpu")
    given = problem(rng, b=1, t=t, s=s, n=2, k=1, h=16, d=24)
    ids = np.arange(s)[None] // 90
    options = {"is_causal": True, "segment_ids": (ids[:, :t], ids), "return_residual": True}
    f = functools.partial(dot_product_attention, implementation="pallas_tpu", **options)
    interpreter = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    with pltpu.force_tpu_interpret_mode(interpreter):
        out = with_gradients(f, *given)
    seen = np.tri(t, s, dtype=bool) & (ids[0, :t, None] == ids[0, None, :])
    assert_near(out, truth(*given, seen), 1e-6)


@pytest.mark.parametrize(
    "more, why",
    [
        ({"mask": np.ones((T, S), bool)}, "takes no mask"),
        ({"bias": np.ones((T, S), np.float32)}, "takes no bias"),
        ({"dtype": "float16"}, "takes float32 or bfloat16, got float16"),
    ],
)
def test_what_it_does_not_do_is_refused(more, why, rng):
    more = dict(more)
    *given, _, _ = problem(rng, more.pop("dtype", "float32"), t=T, s=S)
    with pytest.raises(NotImplementedError, match=f"'pallas_interpret' {why}"):
        interpreted(*given, **more)


@pytest.mark.parametrize(
    "keys, width, window", [(1024, 128, None), (131072, 256, None), (9, 64, 4)]
)
@pytest.mark.parametrize("mebibytes", [128, 64, 16, 4])
def test_tiles_fit(keys, width, window, mebibytes, monkeypatch):
    monkeypatch.setattr(attention_plan, "LARGEST", (512, 1024))
    monkeypatch.setattr(attention_plan, "usable", lambda: int(0.8 * mebibytes * 2**20))
    plan = attention_plan.Plan(1, 2, 4, keys, keys, width, width, 2, window, window, False)
    cuts = (attention_plan.forward(plan), 0), (attention_plan.backward(plan), 4 + 2)
    for cut, bytes_kept in cuts:
        assert cut.rows % 128 == cut.columns % 128 == 0
        assert cut.rows * cut.columns >= 128**2
        kept = bytes_kept * cut.stretch * cut.columns * 2 * width
        streamed = 2 * 2 * 2 * width * (cut.rows + cut.columns)
        assert kept + streamed + 4 * cut.rows * cut.columns <= attention_plan.usable()
        assert cut.grid[2] * cut.stretch >= cut.tiles


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowers_for_a_tpu_on_any_machine(dtype):
    device = jax.sharding.AbstractDevice(platform="tpu", device_kind="TPU v5e", num_cores=1)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    ids = jax.ShapeDtypeStruct((1, 1000), jnp.int32)

    def f(q, k, v, ids):
        options = {"implementation": "pallas_tpu", "logits_soft_cap": 30.0, "segment_ids": ids}
        lengths = {"query_seq_lengths": ids[:, 7], "key_value_seq_lengths": ids[:, 3]}
        window = {"local_window_size": (200, 0)}
        o = dot_product_attention(q, k, v, **options, **lengths, **window)
        return o.astype(jnp.float32).sum()

    q, k = shape((1, 1000, 4, 64)), shape((1, 1000, 2, 64))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(f, (0, 1, 2))).trace(q, k, k, ids)
        program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("stablehlo.custom_call @tpu_custom_call") == 2
    assert "1000x1000" not in program
