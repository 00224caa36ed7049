"""Kernels compiled for a TPU that is not there: whether they compile, and the memory they take.

The compiler is the real one, of the package libtpu. What runs nowhere says nothing of speed, nor of
correctness on the chip.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct

import jaxgrad
from jaxgrad import backends, machine
from jaxgrad.terminal import InvalidInput

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
SHAPE = (4096, 2048, 131072)  # tokens, features, classes
CAVEAT = """
Compiled, and not run: this tells neither time nor correctness on the chip.
temp: memory beside arguments and results; peak: with both, where the compiler tells it."""


class Program(NamedTuple):
    """What is compiled: value and gradients of a fused head."""

    kernel: str
    runs_as: str
    f: Callable


def aot(target: str, kernels: Sequence[str] | None, shape: tuple[int, ...] | None) -> int:
    """Prints a line for each program; the exit code is 1 if one does not compile."""
    shape = shape or SHAPE
    if len(shape) != 3:
        raise InvalidInput(f"aot: --shape must be tokens,features,classes, got {shape}")
    tokens, features, classes = shape
    programs = _programs(kernels)
    arguments = (
        ShapeDtypeStruct((tokens, features), jnp.bfloat16),
        ShapeDtypeStruct((features, classes), jnp.bfloat16),
        ShapeDtypeStruct((tokens,), jnp.int32),
    )
    device = _device(target)
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    print(f"{target}, {tokens}×{features}×{classes}, bfloat16, value and gradients\n")
    print(f"{'kernel':32}{'runs as':12}{'compiled in, s':>16}{'temp, MiB':>12}{'peak, MiB':>12}")
    failed = 0
    for program in programs:
        row = f"{program.kernel:32}{program.runs_as:12}"
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                seconds, memory = _compile(program.f, arguments, device)
        except Exception as error:  # whatever a compiler says is the result
            print(f"{row}  {type(error).__name__}: {str(error).splitlines()[0]}")
            failed = 1
            continue
        peak = getattr(memory, "peak_memory_in_bytes", None)
        shown = "" if peak is None else f"{peak / 2**20:.0f}"
        print(f"{row}{seconds:16.1f}{memory.temp_size_in_bytes / 2**20:12.0f}{shown:>12}")
    print(CAVEAT)
    return failed


def _compile(f: Callable, arguments: Any, device: Any) -> tuple[float, Any]:
    one = jax.sharding.SingleDeviceSharding(device)
    start = time.perf_counter()
    compiled = jax.jit(f, in_shardings=one, out_shardings=one).lower(*arguments).compile()
    return time.perf_counter() - start, compiled.memory_analysis()


def _programs(kernels: Sequence[str] | None) -> list[Program]:
    names = list(backends.OTHERS)
    for name in kernels or ():
        if name not in names:
            raise InvalidInput(f"aot: kernels are {', '.join(names)}, got {name}")

    def program(name, implementation):
        def loss(x, w, labels):
            kernel = getattr(jaxgrad, name)
            return kernel(x, w, labels, implementation=implementation).mean()

        return Program(name, implementation, jax.value_and_grad(loss, (0, 1)))

    kinds = ("xla", "pallas_tpu")
    return [Program("plain", "jax", jax.value_and_grad(_plain, (0, 1)))] + [
        program(name, kind) for name in kernels or names for kind in kinds
    ]


def _plain(x, w, labels):
    logits = jnp.dot(x, w, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - chosen).mean()


def _device(target: str) -> Any:
    """A device of that kind, as a compiler knows it."""
    from jax.experimental import topologies

    if machine.version("libtpu") is None:
        raise InvalidInput(
            f"aot: --target {target} needs the compiler of pip install 'jaxgrad[aot-tpu]'"
        )
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for a TPU
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    name = TOPOLOGIES[target]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
