"""Compiling for a chip that is not there."""

import importlib.util

import pytest

from jaxgrad import __main__, machine
from jaxgrad.bench import aot

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed"
)


def test_every_target_of_the_command_line_has_a_topology():
    assert set(__main__.TARGETS) == set(aot.TOPOLOGIES)


def test_without_the_compiler_it_names_the_line_that_adds_it(monkeypatch, capsys):
    monkeypatch.setattr(machine, "version", lambda package: None)
    assert __main__.main(["aot", "--target", "v5e"]) == 2
    assert "pip install 'jaxgrad[aot-tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, why",
    [(["softmax"], "kernels are linear_"), (["--shape", "8,8"], "tokens,features")],
)
def test_what_it_cannot_compile_is_refused(arguments, why, capsys):
    assert __main__.main(["aot", "--target", "v5e", *arguments]) == 2
    assert why in capsys.readouterr().err


@needs_compiler
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_the_head_compiles(target, capsys):
    command = ["aot", "--target", target, "linear_softmax_cross_entropy", "--shape"]
    assert __main__.main([*command, "1024,256,4096"]) == 0
    assert "pallas_tpu" in capsys.readouterr().out
