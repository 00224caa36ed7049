"""The compiler for GPU, of JAX's plugin for CUDA, and what ptxas tells of its Pallas kernels.

XLA lowers a Pallas kernel to PTX, which ptxas assembles for the chip. A thread that needs more
registers than there are keeps the rest in memory: it spills.
"""

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxgrad import machine
from jaxgrad.terminal import InvalidInput

IMPLEMENTATION = "pallas_gpu"
COLUMNS = ("registers", "spilled, B")
CAVEAT = """\
registers: the most that a thread of a Pallas kernel holds; 255 is all there are. spilled: bytes
that it writes to memory and reads back for want of them, by each place in the code, of all Pallas
kernels. Which kernels multiply matrices, XLA would choose by timing them: here it takes the first.
From JAX 0.11 on, Pallas kernels are compiled before XLA sees them, for an H100 whatever the target
is: of these nothing is told."""

_CALL = re.compile(
    r'custom_call_target="(?:__gpu\$xla\.gpu\.triton|triton_kernel_call_ffi)".*[ {]name = "(\w+)"'
)
_USAGE = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg",
    re.DOTALL,
)


class Chip(NamedTuple):
    """What the compiler wants to know of a chip, beside what they have in common."""

    name: str
    capability: int  # for computing: the first number of it, where the second is 0
    processors: int
    lanes: int  # of a processor, for float32
    shared_kib: int  # of a processor; a block may have all but one
    cache_mib: int
    gigahertz: float
    memory_gib: int
    gigabytes_per_second: int


TARGETS = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", 8, 108, 64, 164, 40, 1.41, 79, 2039),
    "h100": Chip("NVIDIA H100 80GB HBM3", 9, 132, 128, 228, 50, 1.98, 79, 3352),
}


class Usage(NamedTuple):
    """What a thread of a kernel uses."""

    registers: int
    spilled: int  # bytes, written and read


def device(target: str) -> Any:
    """A device of that kind, as the compiler knows it."""
    from jax.experimental import topologies

    if machine.version("jax-cuda12-plugin") is None or _ptxas() is None:
        raise InvalidInput(
            f"aot: --target {target} needs the compiler of pip install 'jaxgrad[aot-gpu]', 5.5 GB"
        )
    jax.config.update("jax_platforms", "cpu")  # the plugin would look for a GPU
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target,
        topology="1x1x1",  # one process that has one GPU
        target_config=description(TARGETS[target]),
    ).devices[0]


def description(chip: Chip) -> str:
    """``chip`` as XLA's ``GpuTargetConfigProto``, in text."""
    return f"""\
platform_name: "CUDA"
device_description_str: "{chip.name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {chip.capability} }}
  core_count: {chip.processors}
  fpus_per_core: {chip.lanes}
  clock_rate_ghz: {chip.gigahertz}
  l2_cache_size: {chip.cache_mib * 2**20}
  device_memory_size: {chip.memory_gib * 2**30}
  memory_bandwidth: {chip.gigabytes_per_second * 10**9}
  shared_memory_per_core: {chip.shared_kib * 2**10}
  shared_memory_per_block_optin: {(chip.shared_kib - 1) * 2**10}
  shared_memory_per_block: {48 * 2**10}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
}}
"""


def options(dump: Path) -> dict[str, Any]:
    """What the compiler is told: to write PTX to ``dump``, and to time nothing."""
    return {"xla_dump_to": str(dump), "xla_gpu_autotune_level": 0}


def told(target: str, program: str, dump: Path) -> tuple[str, ...]:
    """Registers and bytes spilled, of the Pallas kernels in the text of a program."""
    del target
    names = kernels(program)
    if not names:
        return "", ""
    used = {}
    for path in dump.glob("*.ptx"):
        used |= usage(_assembled(path.read_text(encoding="utf-8")))
    of_pallas = {name: one for name, one in used.items() if _unnumbered(name) in names}
    if {_unnumbered(name) for name in of_pallas} != names:
        return "not told", "not told"
    registers, spilled = zip(*of_pallas.values(), strict=True)
    return str(max(registers)), str(sum(spilled))


def kernels(program: str) -> set[str]:
    """The names of Pallas kernels in the text of a program."""
    return set(_CALL.findall(program))


def usage(log: str) -> dict[str, Usage]:
    """What each kernel uses, from what ptxas says of all."""
    return {
        name: Usage(int(registers), int(written) + int(read))
        for name, written, read, registers in _USAGE.findall(log)
    }


def _unnumbered(name):
    """XLA numbers kernels of the same name, from the second on."""
    return re.sub(r"__\d+$", "", name)


def _assembled(ptx):
    """What ptxas says of that."""
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if arch is None:  # some files are empty
        return ""
    command = [str(_ptxas()), "-v", f"-arch={arch[1]}", "-o", os.devnull, "-"]
    return subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr


def _ptxas() -> Path | None:
    """The assembler, where the package that has it is installed."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc-cu12") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "ptxas"), None)
