"""The training run on a mesh, in one process and in two: the losses of one device."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgrad.__main__ import main
from jaxgrad.demo import layout, report
from jaxgrad.demo.options import Options
from jaxgrad.terminal import InvalidInput

ROOT = Path(__file__).parents[2]
STORY = "the cat sat on the mat. a dog ran to the park, and the bird sang in the tree! " * 20
ARGUMENTS = ("train", "--steps", "2", "--batch", "2", "--context", "4", "--dim", "8")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def losses(out):
    runs = json.loads((out / report.JSON_NAME).read_text())["runs"]
    return np.array([run["losses"] for run in runs])


def test_two_processes_give_the_losses_of_one_device(tmp_path, quick_environment):
    (tmp_path / "story.txt").write_text(STORY)

    def command(out, *more):
        files = ("--text", str(tmp_path / "story.txt"), "--out", str(tmp_path / out))
        return (sys.executable, "-m", "jaxgrad", *ARGUMENTS, *files, *more)

    mesh = ("--mesh", "data=2,model=2", "--coordinator", f"localhost:{free_port()}")
    commands = [command("one")]
    commands += [command("two", *mesh, "--processes", "2", "--process", str(i)) for i in (0, 1)]
    environment = quick_environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for c in commands
    ]
    try:
        outputs = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)


@pytest.mark.parametrize("mesh", ["data", "rows=2", "data=0", "data=two"])
def test_a_mesh_that_is_none_is_refused(mesh, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--mesh", mesh])
    assert "argument --mesh: invalid" in capsys.readouterr().err


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(InvalidInput, match="need 4096 devices"):
        layout.Layout(Options(mesh="data=4096"))
    with pytest.raises(InvalidInput, match="data must divide the batch, got a batch of 3"):
        layout.Layout(Options(mesh="data=2", batch=3))
