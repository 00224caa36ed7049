"""The door to the implementations."""

import jax
import pytest

import jaxgrad
from jaxgrad import backends

HEAD = "linear_softmax_cross_entropy"


def test_plain_jax_runs_what_nobody_asked_for_otherwise():
    for name in jaxgrad.__all__:
        assert backends.choose(name).name == "xla"
    assert backends.choose("softmax").reason == "there is no other"
    assert backends.choose(HEAD).reason == "no other runs on cpu"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_where_a_kernel_runs_it_says_what_to_try(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert f"implementation='pallas_{platform}'" in backends.choose(HEAD).reason
    assert backends.choose(HEAD, f"pallas_{platform}") == (f"pallas_{platform}", "asked for")


def test_what_is_asked_for_runs_or_tells_why_not():
    assert backends.choose(HEAD, "pallas_interpret").name == "pallas_interpret"
    for name, device, interpreter in (
        ("pallas_tpu", "TPU", "pallas_interpret"),
        ("pallas_gpu", "GPU", "pallas_gpu_interpret"),
    ):
        why = f"{name!r} needs a {device}, got cpu; {interpreter!r} runs it anywhere"
        with pytest.raises(NotImplementedError, match=why):
            backends.choose(HEAD, name)
    with pytest.raises(NotImplementedError, match="'pallas_interpret' takes no x"):
        backends.choose(HEAD, "pallas_interpret", obstacle="takes no x")
    assert backends.choose(HEAD, "xla", obstacle="takes no x").name == "xla"


@pytest.mark.parametrize("other", ["pallas", "XLA", 1, ["xla"]])
def test_unknown_names_are_refused(other):
    with pytest.raises(ValueError, match="must be None or 'xla' or 'pallas_tpu'"):
        backends.choose(HEAD, other)
    with pytest.raises(ValueError, match="softmax: implementation must be None or 'xla', got"):
        backends.choose("softmax", other)


def test_the_mesh_in_use_names_the_platform():
    device = jax.sharding.AbstractDevice(platform="tpu", device_kind="TPU v5e", num_cores=1)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert backends.platform() == "tpu"
        assert backends.choose(HEAD, "pallas_tpu").name == "pallas_tpu"
