"""The kernel that CONTRIBUTING.md adds in four steps works as typed, and its check can fail."""

import doctest
import importlib.util
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import jaxgrad

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
KERNEL, CHECK, EXPORT = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
RULE = "numerics.widen(y_bar) * lax.logistic(numerics.widen(x))"


@pytest.fixture
def add(monkeypatch, tmp_path):
    """The kernel as a module of the package, and the test that is to check it."""

    def add(code):
        path, name = tmp_path / "softplus.py", "jaxgrad.kernels.softplus"
        path.write_text(code, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        checks = {"__name__": "test_softplus"}
        exec(CHECK, checks)
        return module, checks["test_rule"]

    return add


def test_kernel_is_right_and_exported(add):
    module, check = add(KERNEL)
    check("float32")
    check("bfloat16")
    examples = doctest.DocTestFinder().find(module.softplus, globs=vars(module))
    assert doctest.DocTestRunner().run(examples[0]).failed == 0
    window = {"__name__": jaxgrad.__name__, "__package__": jaxgrad.__name__}
    exec(EXPORT, window)
    assert window["softplus"] is module.softplus


@pytest.mark.parametrize("wrong", ["numerics.widen(y_bar)", RULE + " * (1 + 1e-5)"])
def test_check_finds_a_wrong_rule(add, wrong):
    _, check = add(KERNEL.replace(RULE, wrong))
    with pytest.raises(AssertionError, match="gradient to argument"):
        check("float32")


@pytest.mark.parametrize("code", [KERNEL, CHECK], ids=["kernel", "check"])
@pytest.mark.parametrize("command", [["format", "--diff"], ["check", "--ignore=D"]], ids=str)
def test_code_is_clean(code, command):
    ruff = Path(sysconfig.get_path("scripts"), "ruff")
    if not ruff.exists():
        ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run(
        [ruff, *command, "-"], input=code, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
