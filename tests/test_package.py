"""The package as it is shipped: what importing it does, what it exports, what its linters say."""

import inspect
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile

import pytest

import jaxgrad

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted((ROOT / "jaxgrad").rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in ("*", ".ci/*", "jaxgrad/**/*", "notebooks/*", "tests/**/*")
    for path in ROOT.glob(pattern)
    if path.suffix in ("", ".ipynb", ".md", ".py", ".toml") and path.is_file()
)


def relative(path):
    return str(path.relative_to(ROOT))


def run(*command, **environment):
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_importing_starts_no_backend():
    code = "import jaxgrad; print('imported'); import jax; jax.devices()"
    process = run(sys.executable, "-c", code, JAX_PLATFORMS="nowhere")
    assert process.stdout == "imported\n", process.stderr
    assert "nowhere" in process.stderr  # starting a backend would have failed


def test_all_is_what_the_package_exports():
    functions = {name for name, value in vars(jaxgrad).items() if callable(value)}
    assert sorted(functions) == jaxgrad.__all__


@pytest.mark.parametrize("name", jaxgrad.__all__)
def test_what_is_exported_is_documented(name):
    exported = getattr(jaxgrad, name)
    assert exported.__name__ == name
    if not isinstance(exported, type):
        arguments = [f"\n  {argument}: " for argument in inspect.signature(exported).parameters]
        for part in ("Args:", *arguments, "Returns:", "Example:", ">>> "):
            assert part in inspect.getdoc(exported)


def test_wheel_holds_the_package_alone(tmp_path):
    process = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert process.returncode == 0, process.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"jaxgrad-{jaxgrad.__version__}.dist-info"
    package = {name for name in names if not name.startswith(f"{info}/")}
    assert package == {relative(path) for path in SOURCES} | {"jaxgrad/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


def test_version_is_that_of_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == jaxgrad.__version__


def test_run_time_needs_only_jax_jaxlib_and_numpy():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}
    assert names == {"jax", "jaxlib", "numpy"}
    assert not any("<" in requirement for requirement in project["dependencies"])


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_stays_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 300


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_file_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.~])/(?:home|root|tmp|work|Users)/\w+", text)


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "--no-cache"),
        ("ruff", "format", "--check", "--no-cache"),
        ("pyright", "--pythonpath", sys.executable),
        ("lint-imports", "--no-cache"),
    ],
    ids=["ruff check", "ruff format", "pyright", "lint-imports"],
)
def test_linter_is_clean(command):
    program, *arguments = command
    path = pathlib.Path(sysconfig.get_path("scripts"), program)
    # Pyright would ask the network for a newer pyright.
    process = run(path, *arguments, PYRIGHT_PYTHON_IGNORE_WARNINGS="1")
    assert process.returncode == 0, process.stdout + process.stderr
