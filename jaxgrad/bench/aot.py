"""Kernels compiled for a TPU that is not there: whether they compile, and the memory they take.

The compiler is the real one, of the package libtpu. What runs nowhere says nothing of speed, nor of
correctness on the chip.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct

import jaxgrad
from jaxgrad import backends, machine
from jaxgrad.bench import cycles
from jaxgrad.terminal import InvalidInput

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
HEAD = (4096, 2048, 131072)  # tokens, features, classes
ATTENTION = (2, 4096, 8, 128)  # batch, length, heads, features
NAMES = {3: "tokens,features,classes", 4: "batch,length,heads,features"}
COLUMNS = (
    f"{'compiled in, s':>16}{'temp, MiB':>12}{'peak, MiB':>12}{'XLA, ms':>12}{'Mosaic, ms':>12}"
)
CAVEAT = """
Compiled, and not run: this tells neither time nor correctness on the chip.
temp: memory beside arguments and results; peak: with both, where the compiler tells it.
ms: cycles at the clock of the chip, without waits for memory. XLA: the compiler's estimate of what
it compiles itself, loops as often as they run, of branches the longest: tiles of attention that
causality hides count. Mosaic: the words that the Pallas kernels issue, as if each step of a grid
did all that any does: hidden tiles count here too. Whether one core of a v4 or v5p is meant, or
both, it does not tell. compiled in: with the writing down of what is counted here."""
DUMP = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"


class Program(NamedTuple):
    """What is compiled: value and gradients of a kernel."""

    kernel: str
    runs_as: str
    f: Callable


class Problem(NamedTuple):
    """Programs for the same arguments."""

    shape: tuple[int, ...]
    programs: list[Program]
    arguments: tuple[ShapeDtypeStruct, ...]


def aot(
    target: str,
    kernels: Sequence[str] | None,
    shape: tuple[int, ...] | None,
    soft_cap: float | None = None,
) -> int:
    """Prints a line for each program; the exit code is 1 if one does not compile."""
    if soft_cap is not None and not soft_cap > 0:
        raise InvalidInput(f"aot: --soft-cap must be above 0, got {soft_cap}")
    problems = list(_problems(kernels, shape, soft_cap))
    device = _device(target)
    failed = False
    for problem in problems:
        sizes = "×".join(map(str, problem.shape))
        cap = "" if soft_cap is None else f", soft-cap {soft_cap:g}"
        print(f"{target}, {sizes}, bfloat16{cap}, value and gradients\n")
        print(f"{'kernel':32}{'runs as':12}{COLUMNS}")
        for program in problem.programs:
            row = f"{program.kernel:32}{program.runs_as:12}"
            try:
                row += _compile(target, program.f, problem.arguments, device)
            except Exception as error:  # whatever a compiler says is the result
                row += f"  {type(error).__name__}: {str(error).splitlines()[0]}"
                failed |= program.runs_as != "jax"
            print(row, flush=True)
        print()
    print(CAVEAT.lstrip())
    return int(failed)


def _compile(target: str, f: Callable, arguments: Any, device: Any) -> str:
    one = jax.sharding.SingleDeviceSharding(device)
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(f, in_shardings=one, out_shardings=one).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    peak = getattr(memory, "peak_memory_in_bytes", None)
    count, calls = cycles.estimate(compiled.as_text() or "")
    words = [times * _words(kernel) for kernel, times in calls.items()]
    clock = cycles.CLOCK_GHZ.get(target)
    ms = lambda count: "" if clock is None else f"{count / clock / 1e6:.1f}"
    cells = (
        f"{seconds:.1f}",
        f"{memory.temp_size_in_bytes / 2**20:.0f}",
        "" if peak is None else f"{peak / 2**20:.0f}",
        ms(count),
        ms(sum(words)) if all(words) else "not told",
    )
    widths = (16, 12, 12, 12, 12)
    return "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))


@functools.cache
def _dump() -> tempfile.TemporaryDirectory:
    """Where the compiler tells what it makes; it is asked once, as it is loaded."""
    return tempfile.TemporaryDirectory()


def _words(kernel):
    paths = sorted(Path(_dump().name).glob(f"*-{kernel}-*bundles.txt"))  # by their time
    texts = [path.read_text(encoding="utf-8") for path in paths if "analysis" not in path.name]
    return cycles.bundles(texts[-1]) if texts else 0


def _problems(kernels, shape, soft_cap) -> Iterator[Problem]:
    names = [name for name, others in backends.OTHERS.items() if "pallas_tpu" in others]
    for name in kernels or ():
        if name not in names:
            raise InvalidInput(f"aot: kernels are {', '.join(names)}, got {name}")
    if shape and len(shape) not in NAMES:
        raise InvalidInput(f"aot: --shape must be {' or '.join(NAMES.values())}, got {shape}")
    for default, of_shape in ((HEAD, _of_head), (ATTENTION, _of_attention)):
        chosen = [
            name
            for name in kernels or names
            if (name == "dot_product_attention") == (default is ATTENTION)
        ]
        if shape and len(shape) != len(default):
            if kernels and chosen:
                wanted = NAMES[len(default)]
                raise InvalidInput(f"aot: --shape must be {wanted} for {chosen[0]}, got {shape}")
            continue
        if chosen:
            yield of_shape(chosen, shape or default, soft_cap)


def _of_head(names, shape, soft_cap):
    tokens, features, classes = shape

    def program(name, implementation):
        def loss(x, w, labels):
            options = {"implementation": implementation, "logit_soft_cap": soft_cap}
            return getattr(jaxgrad, name)(x, w, labels, **options).mean()

        return Program(name, implementation, jax.value_and_grad(loss, (0, 1)))

    def plain(x, w, labels):
        logits = _capped(jnp.dot(x, w, preferred_element_type=jnp.float32), soft_cap)
        chosen = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=1) - chosen).mean()

    arguments = (
        ShapeDtypeStruct((tokens, features), jnp.bfloat16),
        ShapeDtypeStruct((features, classes), jnp.bfloat16),
        ShapeDtypeStruct((tokens,), jnp.int32),
    )
    return Problem(shape, _beside(jax.value_and_grad(plain, (0, 1)), names, program), arguments)


def _of_attention(names, shape, soft_cap):
    batch, length, heads, features = shape

    def program(name, implementation):
        options = {"implementation": implementation, "logits_soft_cap": soft_cap}
        f = functools.partial(getattr(jaxgrad, name), is_causal=True, **options)
        return Program(name, implementation, _pulled_back(f))

    def plain(q, k, v):
        z = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
        z = _capped(z * features**-0.5, soft_cap)
        p = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), z, -jnp.inf))
        return jnp.einsum("bnts,bsnh->btnh", p.astype(v.dtype), v)

    x = ShapeDtypeStruct((batch, length, heads, features), jnp.bfloat16)
    return Problem(shape, _beside(_pulled_back(plain), names, program), (x,) * 4)


def _beside(plain, names, program):
    kinds = ("xla", "pallas_tpu")
    return [Program("plain", "jax", plain)] + [program(n, kind) for n in names for kind in kinds]


def _pulled_back(f):
    def value_and_gradients(q, k, v, o_bar):
        o, back = jax.vjp(f, q, k, v)
        return o, back(o_bar)

    return value_and_gradients


def _capped(x, cap):
    return x if cap is None else cap * jnp.tanh(x / cap)


def _device(target: str) -> Any:
    """A device of that kind, as a compiler knows it."""
    from jax.experimental import topologies

    if target not in TOPOLOGIES:
        raise InvalidInput(
            f"aot: --target {target} needs the compiler of pip install 'jaxgrad[cuda]', 5.5 GB, "
            "and a description of the chip, which this command does not read; it compiles for TPU: "
            f"{', '.join(TOPOLOGIES)}"
        )
    if machine.version("libtpu") is None:
        raise InvalidInput(
            f"aot: --target {target} needs the compiler of pip install 'jaxgrad[aot-tpu]'"
        )
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for a TPU
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={_dump().name} {DUMP}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it takes no chip from another program
    }
    name = TOPOLOGIES[target]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
