"""Kernels on a mesh of several processes, each with one device, that meet over the network."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import jaxgrad
from jaxgrad.parallel import ring_attention, sharded

ROOT = Path(__file__).parents[1]


def program(head, attention, softmax):
    """Values and gradients of a fused head, of attention, and of one row."""

    def loss(x, w, q, labels):
        o = attention(q, q, q, is_causal=True)
        return head(x, w, labels, reduction="mean") + jnp.sin(3 * softmax(w)).sum() + (o * q).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def on_one_device():
    return program(
        jaxgrad.linear_softmax_cross_entropy, jaxgrad.dot_product_attention, jaxgrad.softmax
    )


def on_all_devices():
    """Tokens and features of w over two of the devices; classes over the rest, keys over all."""
    axes = ("data", "model")
    mesh = jax.make_mesh((2, jax.device_count() // 2), axes, (jax.sharding.AxisType.Auto,) * 2)
    over = functools.partial(jax.shard_map, mesh=mesh)
    head = sharded(
        jaxgrad.linear_softmax_cross_entropy,
        mesh,
        batch_axes="data",
        vocab_axis_name="model",
        fsdp_axis="data",
    )

    def attention(*args, **options):
        ring = functools.partial(ring_attention, axis_name=axes, **options)
        return over(ring, in_specs=P(None, axes), out_specs=P(None, axes))(*args)

    softmax = functools.partial(jaxgrad.softmax, axis_name="model")
    softmax = over(softmax, in_specs=P("data", "model"), out_specs=P("data", "model"))
    return program(head, attention, softmax), jax.NamedSharding(mesh, P())


def arrays():
    rng = np.random.default_rng(0)
    x, w, q = (rng.standard_normal(shape) for shape in ((8, 4), (4, 8), (1, 8, 2, 3)))
    return x, w, q, np.arange(8) * 3 % 8


def take_part(address, processes, process, out):
    """What each process does. The first writes down what was found."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(process))
    step, everywhere = on_all_devices()
    value, bars = jax.jit(step, out_shardings=everywhere)(*arrays())
    if process == "0":
        np.savez(out, value, *(z.addressable_data(0) for z in bars))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_results_of_one_device(x64, unoptimised, tmp_path, processes):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    out = tmp_path / "found.npz"
    all_of_them = [
        subprocess.Popen(
            (sys.executable, __file__, address, str(processes), str(i), str(out)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        expected = jax.tree.leaves(on_one_device()(*arrays()))
        outputs = [process.communicate(timeout=280)[0] for process in all_of_them]
    finally:
        for process in all_of_them:
            process.kill()
    assert [process.returncode for process in all_of_them] == [0] * processes, outputs
    with np.load(out) as found:
        for name, z in zip(found.files, expected, strict=True):
            np.testing.assert_allclose(found[name], z, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    take_part(*sys.argv[1:])
