"""Kernels compiled for a chip that is not there: whether they compile, and the memory they take.

The compilers are the real ones, for TPU and for GPU. What runs nowhere says nothing of speed, nor
of correctness on the chip.
"""

import functools
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
from jaxgrad import backends
from jaxgrad.bench import aot_gpu, aot_tpu
from jaxgrad.terminal import InvalidInput

COMPILERS: dict[str, Any] = {
    target: compiler for compiler in (aot_tpu, aot_gpu) for target in compiler.TARGETS
}
HEAD = (4096, 2048, 131072)  # tokens, features, classes
ATTENTION = (2, 4096, 8, 128)  # batch, length, heads, features
NAMES = {3: "tokens,features,classes", 4: "batch,length,heads,features"}
COLUMNS = ("temp, MiB", "peak, MiB")
CAVEAT = """\
Compiled, and not run: this tells neither time nor correctness on the chip.
temp: memory beside arguments and results; peak: with both, where the compiler tells it.
compiled in: with the writing down of what is counted here.
"""


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
    alone: bool = False,
) -> int:
    """Prints a line for each program; the exit code is 1 if one does not compile.

    ``alone`` leaves out plain JAX and "xla".
    """
    if soft_cap is not None and not soft_cap > 0:
        raise InvalidInput(f"aot: --soft-cap must be above 0, got {soft_cap}")
    compiler = COMPILERS[target]
    problems = list(_problems(kernels, shape, soft_cap, compiler.IMPLEMENTATION))
    device = compiler.device(target)
    columns = (*COLUMNS, *compiler.COLUMNS)
    failed = False
    for problem in problems:
        sizes = "×".join(map(str, problem.shape))
        cap = "" if soft_cap is None else f", soft-cap {soft_cap:g}"
        print(f"{target}, {sizes}, bfloat16{cap}, value and gradients\n")
        print(f"{'kernel':32}{'runs as':12}{'compiled in, s':>16}{_cells(columns)}")
        for program in problem.programs:
            if alone and program.runs_as != compiler.IMPLEMENTATION:
                continue
            row = f"{program.kernel:32}{program.runs_as:12}"
            try:
                row += _compile(target, program.f, problem.arguments, device)
            except Exception as error:  # whatever a compiler says is the result
                row += f"  {_reason(error)}"
                failed |= program.runs_as != "jax"
            print(row, flush=True)
        print()
    print(f"{CAVEAT}{compiler.CAVEAT}")
    return int(failed)


def _compile(target: str, f: Callable, arguments: Any, device: Any) -> str:
    compiler = COMPILERS[target]
    one = jax.sharding.SingleDeviceSharding(device)
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    with tempfile.TemporaryDirectory() as dump:
        start = time.perf_counter()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(f, in_shardings=one, out_shardings=one).lower(*arguments)
            compiled = lowered.compile(compiler_options=compiler.options(Path(dump)))
        seconds = time.perf_counter() - start
        told = compiler.told(target, compiled.as_text() or "", Path(dump))
    memory: Any = compiled.memory_analysis()
    peak = getattr(memory, "peak_memory_in_bytes", None)
    temp = f"{memory.temp_size_in_bytes / 2**20:.0f}"
    return f"{seconds:16.1f}" + _cells((temp, "" if peak is None else f"{peak / 2**20:.0f}", *told))


def _reason(error: Exception) -> str:
    """The first line of what a compiler says; a chip that is too small is no fault of a kernel."""
    line = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return line.removeprefix("JaxRuntimeError: RESOURCE_EXHAUSTED: ")


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"{text:>12}" for text in texts)


def _problems(kernels, shape, soft_cap, kind) -> Iterator[Problem]:
    names = [name for name, others in backends.OTHERS.items() if kind in others]
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
            yield of_shape(chosen, shape or default, soft_cap, kind)


def _of_head(names, shape, soft_cap, kind):
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
    return Problem(
        shape, _beside(kind, jax.value_and_grad(plain, (0, 1)), names, program), arguments
    )


def _of_attention(names, shape, soft_cap, kind):
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
    return Problem(shape, _beside(kind, _pulled_back(plain), names, program), (x,) * 4)


def _beside(kind, plain, names, program):
    return [
        Program("plain", "jax", plain),
        *(program(name, runs_as) for name in names for runs_as in ("xla", kind)),
    ]


def _pulled_back(f):
    def value_and_gradients(q, k, v, o_bar):
        o, back = jax.vjp(f, q, k, v)
        return o, back(o_bar)

    return value_and_gradients


def _capped(x, cap):
    return x if cap is None else cap * jnp.tanh(x / cap)
