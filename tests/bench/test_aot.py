"""Compiling for a chip that is not there."""

import importlib.util

import jax
import pytest

from jaxgrad import __main__, machine
from jaxgrad.bench import aot, aot_gpu, aot_tpu, cycles

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler, is not installed"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="the plugin for CUDA, which has the compiler, is not installed",
)


def test_every_target_of_the_command_line_has_a_compiler():
    assert set(__main__.TARGETS) == set(aot.COMPILERS)


@pytest.mark.parametrize("target, extra", [("v5e", "aot-tpu"), ("h100", "aot-gpu")])
def test_without_the_compiler_it_names_the_line_that_adds_it(target, extra, monkeypatch, capsys):
    monkeypatch.setattr(machine, "version", lambda package: None)
    assert __main__.main(["aot", "--target", target]) == 2
    assert f"pip install 'jaxgrad[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["softmax"], "kernels are linear_"),
        (["--shape", "8,8"], "tokens,features,classes or batch,length"),
        (["dot_product_attention", "--shape", "8,8,8"], "batch,length,heads,features for dot_p"),
        (["--soft-cap", "0"], "--soft-cap must be above 0, got 0.0"),
    ],
)
@pytest.mark.parametrize("target", ["v5e", "a100"])
def test_what_it_cannot_compile_is_refused(target, arguments, why, capsys):
    assert __main__.main(["aot", "--target", target, *arguments]) == 2
    assert why in capsys.readouterr().err


def test_what_is_made_for_the_chip_is_compiled_alone_and_a_failure_told(monkeypatch, capsys):
    def too_small(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, 17.89G")

    monkeypatch.setattr(aot_tpu, "device", lambda target: None)
    for compiles, alone, expected in ((lambda *_: " 1.0", True, 0), (too_small, False, 1)):
        monkeypatch.setattr(aot, "_compile", compiles)
        command = ["aot", "--target", "v5e", "dot_product_attention", *["--alone"] * alone]
        assert __main__.main(command) == expected
        rows = capsys.readouterr().out.split("\n\n")[1].splitlines()[1:]
        if alone:
            assert [row.split() for row in rows] == [["dot_product_attention", "pallas_tpu", "1.0"]]
        else:
            assert len(rows) == 3
            assert all("  Ran out of memory on HBM, 17.89G" in row for row in rows)


PROGRAM = """\
%condition.1 (a: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner (a: f32[8]) -> f32[8] {
  %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %b = f32[8] fusion(%k), calls=%fused, backend_config={"estimated_cycles":"100","n":1}
}

%short (a: f32[8]) -> f32[8] {
  ROOT %c = f32[8] fusion(%a), calls=%fused, backend_config={"estimated_cycles":"40"}
}

%body.1 (a: (s32[])) -> (s32[]) {
  %d = f32[8] conditional(%p, %a, %a), true_computation=%inner, false_computation=%short
  ROOT %e = f32[8] fusion(%d), calls=%fused, backend_config={"estimated_cycles":"7"}
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %f = f32[8] fusion(%x), calls=%fused, backend_config={"estimated_cycles":"1000"}
  ROOT %w = (s32[]) while(%f), condition=%condition.1, body=%body.1
}
"""


def test_cycles_of_a_loop_count_as_often_as_it_runs():
    assert cycles.estimate(PROGRAM) == (1000 + 5 * (100 + 7), {"k": 5})
    known = PROGRAM.replace(
        "body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"3"}}'
    )
    assert cycles.estimate(known) == (1000 + 3 * (100 + 7), {"k": 3})


WORDS = """\
= control target key start
LB: loop body
     0   :  { %s1 = smov 0 } /* Start region 1 */
   0x1 LB: > { %s2 = sphi 0 }
   0x2   : > { %s3 = sadd 1, %s2 }
   0x3   :  {} /* End region 2 */
   0x4 LB: >> { %s4 = sphi 0 }
   0x5   : >> { %p5 = scmp.ge.s32.totalorder %s4, 4 /* loop exit test */ }
   0x6   : > { %p6 = scmp.ge.s32.totalorder %s3, 10 /* loop exit test */  ;;  %s7 = smov 1 }
   0x7   :  { %8 = vsyncpa 0 }
"""


def test_words_of_a_loop_in_a_loop():
    assert cycles.bundles(WORDS) == 2 + 10 * (3 + 4 * 2)


@needs_libtpu
@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize(
    "kernel, shape",
    [("linear_softmax_cross_entropy", "1024,256,4096"), ("dot_product_attention", "1,1000,2,64")],
)
def test_a_kernel_compiles(kernel, shape, target, capsys):
    command = ["aot", "--target", target, kernel, "--shape", shape, "--soft-cap", "30"]
    assert __main__.main(command) == 0
    plain, xla, pallas = capsys.readouterr().out.splitlines()[3:6]
    assert [float(row.split()[-1]) > 0 for row in (plain, xla, pallas)] == [False, False, True]


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    112 bytes stack frame, 104 bytes spill stores, 108 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 112 bytes cumulative stack size
ptxas info    : Compile time = 329.446 ms
ptxas info    : Compiling entry function 'attend__1' for 'sm_90a'
ptxas info    : Function properties for attend__1
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
"""
CALL = """\
  %a = f32[8] custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config={\
grid_x = 1 : i32, ir = "ML\\EFR, name = \\22z\\22", name = "attend", num_stages = 2 : i32}
  %b = f32[8] custom-call(%a), custom_call_target="__cublas$gemm", backend_config={}
"""


def test_what_ptxas_says_of_each_kernel():
    assert aot_gpu.usage(LOG) == {"attend": (255, 212), "attend__1": (16, 0)}


def test_the_pallas_kernels_of_a_program_are_told_apart_from_others(tmp_path, monkeypatch):
    (tmp_path / "program.ptx").write_text(".target sm_90a")
    monkeypatch.setattr(aot_gpu, "_assembled", lambda ptx: LOG.replace("16 reg", "256 reg"))
    assert aot_gpu.told("h100", CALL, tmp_path) == ("256", "212")
    assert aot_gpu.told("h100", CALL.replace("attend", "other"), tmp_path) == ("not told",) * 2
    newer = 'custom_call_target="triton_kernel_call_ffi", backend_config={name = "other"}'
    assert aot_gpu.told("h100", newer, tmp_path) == ("not told",) * 2
    assert aot_gpu.told("h100", "", tmp_path) == ("", "")


@needs_cuda
@pytest.mark.parametrize("target", ["a100", "h100"])
@pytest.mark.parametrize(
    "kernel, shape",
    [
        ("linear_softmax_cross_entropy", "256,256,4096"),
        *(("dot_product_attention", f"1,1000,2,{size}") for size in (64, 128, 256)),
    ],
)
def test_a_kernel_compiles_for_a_gpu_and_spills_nothing(kernel, shape, target, capsys):
    assert __main__.main(["aot", "--target", target, kernel, "--shape", shape]) == 0
    plain, xla, pallas = (row.split() for row in capsys.readouterr().out.splitlines()[3:6])
    assert len(plain) == len(xla) == len(pallas) - 2
    registers, spilled = map(int, pallas[-2:])
    assert 32 < registers <= 255
    assert spilled == 0
