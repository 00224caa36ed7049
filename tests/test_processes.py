"""Kernels on a mesh of several processes, each with one device, that meet over the network."""

import functools
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import P

import jaxgrad
from jaxgrad.parallel import ring_attention, sharded

ROOT = Path(__file__).parents[1]


def program(head, attention):
    """A fused head with its gradients, and attention that every query takes to every key."""

    def mean(x, w, labels):
        return head(x, w, labels, reduction="mean")

    return lambda x, w, labels, q: (
        jax.value_and_grad(mean, (0, 1))(x, w, labels),
        attention(q, q, q),
    )


def on_all_devices():
    """Tokens and features of w over two of the devices; classes over the rest, keys over all."""
    axes = ("data", "model")
    mesh = jax.make_mesh((2, jax.device_count() // 2), axes, (jax.sharding.AxisType.Auto,) * 2)
    head = sharded(
        jaxgrad.linear_softmax_cross_entropy,
        mesh,
        batch_axes="data",
        vocab_axis_name="model",
        fsdp_axis="data",
    )
    keys = P(None, axes)
    ring = functools.partial(ring_attention, axis_name=axes)
    ring = jax.shard_map(ring, mesh=mesh, in_specs=(keys, keys, keys), out_specs=keys)
    return jax.jit(program(head, ring), out_shardings=jax.NamedSharding(mesh, P()))


def arrays():
    rng = np.random.default_rng(0)
    x, w, q = (rng.standard_normal(shape) for shape in ((8, 4), (4, 8), (1, 8, 2, 3)))
    return x, w, np.arange(8) * 3 % 8, q


def take_part(address, processes, process, out):
    """What each process does. The first writes down what was found."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(process))
    found = jax.tree.leaves(on_all_devices()(*arrays()))
    if process == "0":
        np.savez(out, *(z.addressable_data(0) for z in found))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_results_of_one_device(
    x64, unoptimised, quick_environment, tmp_path, processes
):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = quick_environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
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
        alone = program(jaxgrad.linear_softmax_cross_entropy, jaxgrad.dot_product_attention)
        expected = jax.tree.leaves(jax.jit(alone)(*arrays()))
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
