"""A training run: two curves that coincide, and a report that survives Ctrl-C and a full disk."""

import dataclasses
import errno
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgrad.demo import plot, report, train
from jaxgrad.demo.options import Options
from jaxgrad.terminal import InvalidInput

ROOT = Path(__file__).parents[2]
STORY = "the cat sat on the mat. a dog ran to the park, and the bird sang in the tree! " * 20
pytestmark = pytest.mark.usefixtures("standard_promotion")


def small(folder, **changes):
    (folder / "story.txt").write_text(STORY)
    options = Options(
        steps=5, batch=4, context=8, dim=16, text=folder / "story.txt", out=folder / "out"
    )
    return dataclasses.replace(options, **changes)


def read(folder):
    return json.loads((folder / "out" / report.JSON_NAME).read_text())


@functools.cache
def run(folder):
    folder.mkdir()
    assert train.train(small(folder, steps=12)) == 0
    return folder, read(folder)


@pytest.fixture
def finished(tmp_path_factory, unoptimised):
    """The folder of a whole run, which all tests share, and its report."""
    return run(tmp_path_factory.getbasetemp() / "finished")


def test_curves_coincide(finished):
    _, document = finished
    ours, plain = (np.array(run["losses"]) for run in document["runs"])
    assert len(ours) == len(plain) == document["steps"] == 12
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)
    assert document["largest_difference"]["nats_per_token"] == np.abs(ours - plain).max()
    assert ours[-1] < ours[0] - 0.5  # it learns


def test_report_says_everything(finished):
    folder, document = finished
    assert document["interrupted"] is False
    assert document["options"] == {
        "steps": 12,
        "batch": 4,
        "context": 8,
        "dim": 16,
        "seed": 0,
        "dtype": "float32",
        "text": str(folder / "story.txt"),
        "out": str(folder / "out"),
        "mesh": None,
        "coordinator": None,
        "processes": 1,
        "process": 0,
    }
    assert document["model"] == {"vocabulary": 19, "context": 8, "dim": 16, "heads": 1}
    assert document["text"]["train_tokens"] > document["text"]["held_out_tokens"] > 0
    assert document["peak_resident_bytes"] > 50e6
    assert [run["name"] for run in document["runs"]] == ["jaxgrad", "plain JAX"]
    for run in document["runs"]:
        assert run["last_loss"] == np.mean(run["losses"][-report.LAST_STEPS :])
        assert 1 < run["held_out_perplexity"] < document["text"]["unigram_perplexity"]
        assert run["tokens_per_second"] > 0
        assert run["compile_seconds"] > 0
        assert run["temp_bytes"] > 0
        assert len(run["generated"]) > train.GENERATED_WORDS


def test_table_shows_the_report(finished):
    shown = report.table(finished[1])
    ours = finished[1]["runs"][0]
    for number in (
        f"{ours['last_loss']:.4f}",
        f"{ours['held_out_perplexity']:.2f}",
        f"{ours['tokens_per_second']:,.0f}",
        ours["generated"].split()[0],
        f"{finished[1]['largest_difference']['nats_per_token']:.1e} nats/token",
    ):
        assert number in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_plot_is_a_picture(finished):
    assert (finished[0] / "out" / report.PLOT_NAME).read_bytes().startswith(b"\x89PNG")


def test_curves_without_any_difference_can_be_drawn(finished, tmp_path):
    ours = finished[1]["runs"][0]
    plot.draw(finished[1] | {"runs": [ours, ours]}, tmp_path / "same.png")
    assert (tmp_path / "same.png").stat().st_size > 10_000


class Quick(train.Run):
    """A run whose steps cost nothing, for what happens around them."""

    def __init__(self, name, *_):
        self.name, self.losses, self.seconds = name, [], []
        self.perplexity, self.generated = None, []
        self.compile_seconds, self.temp_bytes = 0.1, 0

    def step(self, windows):
        return (None, None), float(windows.mean()), 0.1

    def evaluate(self, batches):
        self.perplexity = 7.0

    def generate(self, prompt):
        self.generated = [1, 2]


def interrupt(*_):
    raise KeyboardInterrupt


def test_interrupted_run_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Run", Quick)
    stop = {3: interrupt}
    assert train.train(small(tmp_path), on_step=lambda done: stop.get(done, int)()) == 130
    document = read(tmp_path)
    assert document["interrupted"] is True
    assert document["steps"] == 3
    for run in document["runs"]:
        assert len(run["losses"]) == 3
        assert run["held_out_perplexity"] == 7
        assert run["generated"]
    captured = capsys.readouterr()
    assert "interrupted: the report will hold what there is" in captured.err
    assert "of 3\n" in captured.out


@pytest.mark.parametrize(
    "stage, key",
    [
        ("evaluate", "held_out_perplexity"),
        ("generate", "generated"),
    ],
)
def test_ctrl_c_skips_what_comes_after_training(tmp_path, monkeypatch, stage, key):
    monkeypatch.setattr(train, "Run", Quick)
    monkeypatch.setattr(Quick, stage, interrupt)
    assert train.train(small(tmp_path)) == 130
    document = read(tmp_path)
    assert document["interrupted"] is True
    assert document["steps"] == 5
    assert {name for name, value in document["runs"][0].items() if value is None} == {key}


def test_ctrl_c_while_saving_saves_all_the_same(tmp_path, monkeypatch):
    replace, calls = Path.replace, []

    def interrupted_once(path, target):
        calls.append(target.name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(train, "Run", Quick)
    monkeypatch.setattr(Path, "replace", interrupted_once)
    assert train.train(small(tmp_path)) == 130
    assert calls == [report.JSON_NAME, report.JSON_NAME, report.PLOT_NAME]
    assert read(tmp_path)["interrupted"] is True
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_ctrl_c_in_the_middle_of_a_step_keeps_both_runs_level(tmp_path, monkeypatch):
    calls = []

    def step(run, windows):
        calls.append(run.name)
        if len(calls) == 6:  # the second run's third step: the first run has just done its own
            raise KeyboardInterrupt
        return (None, None), 1.0, 0.1

    monkeypatch.setattr(train, "Run", Quick)
    monkeypatch.setattr(Quick, "step", step)
    assert train.train(small(tmp_path)) == 130
    assert [len(run["losses"]) for run in read(tmp_path)["runs"]] == [2, 2]


def test_interrupt_before_the_first_step_leaves_no_report(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Run", Quick)
    monkeypatch.setattr(Quick, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.train(small(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []


def test_signal_ends_the_process_with_130_and_nothing_optional_is_needed(
    tmp_path, quick_environment
):
    options = small(tmp_path)
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "optax", "rich")))  # importing them now fails
from jaxgrad.__main__ import main
sys.exit(main(["train", "--steps", "1000000", "--batch", "4", "--context", "8", "--dim", "16",
               "--text", {str(options.text)!r}, "--out", {str(options.out)!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=quick_environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert any(line.startswith("step 1/1000000  loss ") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "with adamw, twice" in shown
    assert "needs matplotlib (pip install matplotlib)" in shown
    document = read(tmp_path)
    assert document["interrupted"] is True
    assert len(document["runs"][1]["losses"]) == document["steps"] >= 1
    assert document["runs"][0]["held_out_perplexity"] > 1
    assert [path.name for path in options.out.iterdir()] == [report.JSON_NAME]


def test_bad_folder_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Run", None)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="file: need a folder for the report, got a file"):
        train.train(small(tmp_path, out=tmp_path / "file"))
    with pytest.raises(InvalidInput, match="cannot be written to: Not a directory"):
        train.train(small(tmp_path, out=tmp_path / "file" / "out"))


class FullDisk:
    """A file on a disk without room."""

    def __init__(self, *_, **__):
        self.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115

    def __enter__(self):
        return self.file

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Run", None)
    monkeypatch.setattr(report.tempfile, "TemporaryFile", FullDisk)
    with pytest.raises(InvalidInput, match="out: cannot be written to: No space left on device"):
        train.train(small(tmp_path))


def test_disk_that_fills_up_keeps_the_older_report_and_shows_the_table(
    finished, tmp_path, monkeypatch, capsys
):
    def full(path, *_, **__):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / report.JSON_NAME).write_text("older")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InvalidInput, match=r"report\.json: cannot be written: No space left"):
        report.write(tmp_path, finished[1])
    assert "held-out perplexity" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [report.JSON_NAME]
    assert (tmp_path / report.JSON_NAME).read_text() == "older"
