"""The command line: its exit codes, its messages, and what it does not import."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgrad
from jaxgrad.__main__ import SHORT_TRAIN_STEPS, main
from jaxgrad.demo import info
from jaxgrad.demo.options import Options

ROOT = Path(__file__).parents[1]


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"jaxgrad {jaxgrad.__version__}\n"


@pytest.mark.parametrize("command", [[], ["check"], ["train"], ["bench"], ["aot"], ["info"]])
def test_help_shows_examples_and_defaults(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m jaxgrad")
    assert command == ["info"] or re.search("examples:\n  .*python -m jaxgrad", shown)
    assert command != ["train"] or f"({Options().steps})" in shown


def test_help_asks_for_no_jax():
    code = """
import sys, types
package = sys.modules["jaxgrad"] = types.ModuleType("jaxgrad")  # without its kernels
package.__path__, package.__version__ = ["jaxgrad"], "0"
from jaxgrad.__main__ import main
try:
    main(["train", "--help"])
except SystemExit:
    print(sorted({"jax", "numpy", "optax", "matplotlib", "rich"} & set(sys.modules)))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.stdout.endswith("\n[]\n"), process.stderr


def test_help_starts_no_backend():
    process = subprocess.run(
        [sys.executable, "-m", "jaxgrad", "--help"],
        cwd=ROOT,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage: python -m jaxgrad")


@pytest.mark.parametrize(
    "argv",
    [
        ["bake"],
        ["train", "--steps", "0"],
        ["train", "--batch", "many"],
        ["train", "--seed", "-1"],
        ["train", "--dtype", "float8"],
        ["check", "--dtype", "int32"],
        ["bench", "--dtype", "float64"],
        ["bench", "--shape", "8"],
        ["bench", "--shape", "8,0"],
    ],
)
def test_bad_arguments_end_with_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_bad_text_is_one_line_and_ends_with_2(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", "--text", str(tmp_path / "no.txt"), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err == f"jaxgrad: error: {tmp_path / 'no.txt'}: cannot be read: "
        "No such file or directory\n"
    )
    assert not out.exists()


@pytest.fixture
def called(monkeypatch):
    """What the commands ask of the rooms behind them; each answers with its exit code."""
    from jaxgrad.bench import accuracy
    from jaxgrad.demo import train

    calls, codes = [], {"check": 0, "train": 0}

    def answer(room, *args, **kwargs):
        calls.append((room, *args, kwargs))
        if isinstance(codes[room], BaseException):
            raise codes[room]
        return codes[room]

    monkeypatch.setattr(accuracy, "check", functools.partial(answer, "check"))
    monkeypatch.setattr(train, "train", functools.partial(answer, "train"))
    return calls, codes


EVERYTHING = {"kernels": None, "dtypes": None, "json": None}


def test_check_hands_on_its_arguments_and_exit_code(called):
    calls, codes = called
    codes["check"] = 1
    assert main(["check"]) == 1
    assert (
        main(
            [
                "check",
                "tanh",
                "softmax",
                "--dtype",
                "float16",
                "--dtype",
                "float32",
                "--json",
                "x.json",
            ]
        )
        == 1
    )
    assert calls == [
        ("check", EVERYTHING),
        (
            "check",
            {"kernels": ["tanh", "softmax"], "dtypes": ["float16", "float32"], "json": "x.json"},
        ),
    ]


def test_train_hands_on_its_arguments(called):
    calls, _ = called
    assert main(["train", "--steps", "7", "--text", "a.txt", "--seed", "3"]) == 0
    assert calls == [("train", Options(steps=7, seed=3, text=Path("a.txt")), {})]


@pytest.mark.parametrize(
    "check, train, code",
    [
        (0, 0, 0),
        (1, 0, 1),
        (0, 130, 130),
        (1, 130, 130),
        (0, KeyboardInterrupt(), 130),
    ],
)
def test_without_a_command_checks_then_trains(called, check, train, code):
    calls, codes = called
    codes.update(check=check, train=train)
    assert main([]) == code
    assert calls == [("check", EVERYTHING), ("train", Options(steps=SHORT_TRAIN_STEPS), {})]


def test_interrupted_check_trains_nothing(called, capsys):
    calls, codes = called
    codes["check"] = KeyboardInterrupt()
    assert main([]) == 130
    assert len(calls) == 1
    assert capsys.readouterr().err == "\njaxgrad: interrupted\n"


def test_info_shows_every_kernel_and_device(capsys):
    assert main(["info"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    kernels = {name for name in jaxgrad.__all__ if not isinstance(getattr(jaxgrad, name), type)}
    assert kernels <= set(shown)
    assert shown["jaxgrad"] == jaxgrad.__version__
    assert shown["x64"] == "off"
    assert "device" in shown
    assert shown["softmax"].split(maxsplit=1) == ["xla", "float32[t, v]"]


def test_info_tells_hand_written_rules_from_those_of_jax():
    assert info.kept(jaxgrad.tanh) == ["float32[t, v]"]
    assert info.kept(jaxgrad.logsumexp) == ["float32[t, v]", "float32[t, 1]", "float32[t, 1]"]
    assert info.kept(jaxgrad.softmax_jacobian) == ["(no rule of its own: differentiated by JAX)"]


def test_info_without_a_device_ends_with_1(monkeypatch, capsys):
    def devices():
        raise RuntimeError("Unable to initialize backend 'nowhere'\nmore")

    monkeypatch.setattr(info.jax, "devices", devices)
    assert main(["info"]) == 1
    assert "none: Unable to initialize backend 'nowhere'\n" in capsys.readouterr().out
