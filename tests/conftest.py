"""Every test runs under JAX's strict promotion modes, on the device that JAX_PLATFORMS names."""

import functools
import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Several workers share one GPU: none may claim its whole memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; all else runs on the first
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

gc.set_threshold(20_000)  # tracing makes many objects and few cycles

# XLA's CPU compiler emits programs in less than half the time so, and they do the same.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}

# A first call compiles, which no deadline can tell from a slow function.
hypothesis.settings.register_profile("jaxgrad", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("jaxgrad")


@pytest.fixture(autouse=True, scope="module")
def release():
    """What one module compiled is of no use to the next, and would fill the memory of a worker."""
    yield
    jax.clear_caches()


@pytest.fixture
def hardly_optimised():
    """Programs as XLA has them before its optimiser."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def unoptimised(hardly_optimised, monkeypatch):
    """The quick way to compile, too, for what a test jits as a whole: for what holds anyhow."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))


@pytest.fixture
def quick_environment():
    """Of a process that is to compile the quick way throughout."""
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    return os.environ | flags | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture
def eight_devices():
    """Skips where there are fewer: a mesh needs them."""
    if jax.device_count() < 8:
        pytest.skip("a mesh of eight devices needs as many")


@pytest.fixture
def rng():
    """The same key in every run."""
    return jax.random.key(0)


@pytest.fixture
def x64():
    """float64 inside this test only."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """JAX's defaults, for code that mixes dtypes and ranks as users do."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
