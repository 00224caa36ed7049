"""The README is true: its code runs, its table is what the libraries return, its links lead on."""

import ast
import doctest
import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \|", README, re.MULTILINE)
CALLS = [row[0] for row in ROWS]
INSTALLED = f"JAX {jax.__version__} and optax {optax.__version__}"
COMMANDS = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)

SHARED = ("array", "bfloat16", "float16", "inf", "int8", "max", "nan", "zeros")
COMMON = {name: getattr(jnp, name) for name in SHARED} | {"grad": jax.grad}
PEERS = COMMON | {
    "dense_loss": optax.softmax_cross_entropy,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": jax.nn.logsumexp,
    "loss": optax.softmax_cross_entropy_with_integer_labels,
    "softmax": jax.nn.softmax,
    "tanh": jnp.tanh,
}
OURS = COMMON | {
    "dense_loss": jaxgrad.softmax_cross_entropy,
    "log_softmax": jaxgrad.log_softmax,
    "logsumexp": jaxgrad.logsumexp,
    "loss": jaxgrad.softmax_cross_entropy_with_integer_labels,
    "softmax": jaxgrad.softmax,
    "tanh": jaxgrad.tanh,
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


class ListsAreArrays(ast.NodeTransformer):
    def visit_List(self, node):
        return ast.Call(ast.Name("array", ast.Load()), [node], [])


def evaluate(cell, namespace):
    tree = ast.fix_missing_locations(ListsAreArrays().visit(ast.parse(cell, mode="eval")))
    return np.asarray(eval(compile(tree, cell, "eval"), namespace), float)


def assert_shown(call, shown, namespace):
    value, expected = evaluate(call, namespace), evaluate(shown, COMMON)
    np.testing.assert_allclose(value, expected, rtol=5e-3, atol=1e-15)


@pytest.fixture
def whole_tracebacks():
    """What JAX filters may end with a note, which doctest takes for the message of the error."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def test_code_runs(whole_tracebacks):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    namespace = {}
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    for block in blocks:
        if ">>>" not in block:
            exec(block, namespace)
            continue
        examples = doctest.DocTestParser().get_doctest(block, namespace, "README", None, None)
        assert examples.examples
        report = []
        runner.run(examples, out=report.append, clear_globs=False)
        namespace = examples.globs
        assert not report, "".join(report)


@pytest.mark.parametrize(("call", "shown"), [row[::2] for row in ROWS], ids=CALLS)
def test_table_of_differences(call, shown):
    assert_shown(call, shown, OURS)


@pytest.mark.skipif(INSTALLED not in README, reason="the table shows other versions of JAX, optax")
@pytest.mark.parametrize(("call", "shown"), [row[:2] for row in ROWS], ids=CALLS)
def test_table_of_differences_of_peers(call, shown):
    assert_shown(call, shown, PEERS)


def test_table_of_differences_is_found():
    assert len(ROWS) >= 10


def test_every_kernel_is_in_the_table():
    named = README.replace("`<br>`", "")
    for name in jaxgrad.__all__:
        is_class = isinstance(getattr(jaxgrad, name), type)
        assert (f"`{name}`" if is_class else f"| [`{name}`](jaxgrad/kernels/") in named


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_commands_name_extras_that_exist():
    assert [command.split("python -m ")[-1] for command in COMMANDS] == ["jaxgrad", "pytest"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"'\.\[(\w+)\]'", README)
    assert set(named) <= set(project["optional-dependencies"])


def test_ci_takes_the_test_command_from_here():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -E '(.*?)' README\.md", script)
    assert pattern is not None
    assert re.findall(pattern[1], README, re.MULTILINE) == COMMANDS[1:]
    assert re.findall(r"install .*", script) == ["install --quiet '.[aot-tpu]'"]
