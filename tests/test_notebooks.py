"""Every notebook runs, draws, and is stored without what running it leaves behind."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_notebooks_are_found():
    assert NOTEBOOKS


@each_notebook
def test_runs_and_draws(path, tmp_path, quick_environment):
    notebook = nbformat.read(path, as_version=4)
    quick = path.stem != "03_tanh"  # which shows a bit of jnp.tanh that depends on the compiler
    environment = (quick_environment if quick else os.environ) | {
        "PYTHONPATH": os.pathsep.join(sys.path),  # the kernel imports the jaxgrad under test
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    # Time limits are for cells that hang: a busy machine may take a minute to start a kernel.
    client = NotebookClient(
        notebook, timeout=600, startup_timeout=300, resources={"metadata": {"path": tmp_path}}
    )
    client.execute(env=environment)

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each_notebook
def test_is_stored_clean(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)

    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert not cell.metadata, cell.id
        assert not cell.get("outputs"), cell.id
        assert cell.get("execution_count") is None, cell.id
