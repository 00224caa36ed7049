"""What a training run leaves behind: a table on the screen, ``report.json`` and ``curves.png``."""

import json
import os
import platform
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxgrad
from jaxgrad.demo import plot, text
from jaxgrad.demo.model import Params, Sizes
from jaxgrad.demo.options import Options
from jaxgrad.demo.text import Corpus
from jaxgrad.machine import peak_resident_bytes
from jaxgrad.terminal import InvalidInput

JSON_NAME, PLOT_NAME = "report.json", "curves.png"
LAST_STEPS = 20

Report = dict[str, Any]


def check_writable(folder: Path) -> None:
    """Makes the folder and writes to it what a report may need, so that training is not in vain.

    Raises:
      InvalidInput: The folder cannot be made or written to, or its disk is full.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder}: need a folder for the report, got a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 20))
    except OSError as error:
        raise InvalidInput(f"{folder}: cannot be written to: {error.strerror}") from error


def header(options: Options, corpus: Corpus, sizes: Sizes, params: Params, optimiser: str) -> str:
    """What is about to be trained, on what."""
    parameters = sum(p.size for p in jax.tree.leaves(params))
    return (
        f"text    {corpus.source}: {len(corpus.train):,} words and marks to train on, "
        f"{len(corpus.held_out):,} held out, vocabulary {sizes.vocabulary:,}\n"
        f"model   one causal block, {sizes.dim} features, {sizes.heads} heads, "
        f"context {sizes.context}, {parameters:,} parameters in float32, computed in "
        f"{options.dtype}\n"
        f"train   {options.steps} steps of {options.batch} x {sizes.context} tokens with "
        f"{optimiser}, twice from seed {options.seed}, on {jax.devices()[0].device_kind}"
    )


def build(
    options: Options,
    corpus: Corpus,
    sizes: Sizes,
    runs,
    held_out,
    seconds: float,
    interrupted: bool,
) -> Report:
    """The report as JSON knows it; what was not reached is null."""
    steps = len(runs[0].losses)
    gaps = [abs(a - b) for a, b in zip(*(run.losses for run in runs), strict=True)]
    largest = int(np.argmax(gaps))
    targets = np.concatenate([windows[:, 1:].ravel() for windows in held_out])
    tokens_per_step = options.batch * sizes.context
    return {
        "versions": {
            "jaxgrad": jaxgrad.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
        "options": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
        },
        "text": {
            "source": corpus.source,
            "train_tokens": len(corpus.train),
            "held_out_tokens": len(corpus.held_out),
            "evaluated_tokens": targets.size,
            "unigram_perplexity": text.unigram_perplexity(corpus, targets),
            "prompt": text.sentence([corpus.vocabulary[i] for i in held_out[0][0, :-1]]),
        },
        "model": sizes._asdict() | {"heads": sizes.heads},
        "interrupted": interrupted,
        "steps": steps,
        "seconds": seconds,
        "peak_resident_bytes": peak_resident_bytes(),
        "largest_difference": {"nats_per_token": gaps[largest], "step": largest + 1},
        "runs": [
            {
                "name": run.name,
                "losses": run.losses,
                "last_loss": float(np.mean(run.losses[-LAST_STEPS:])),
                "held_out_perplexity": run.perplexity,
                "tokens_per_second": tokens_per_step / float(np.median(run.seconds)),
                "compile_seconds": run.compile_seconds,
                "temp_bytes": run.temp_bytes,
                "generated": text.sentence([corpus.vocabulary[i] for i in run.generated]) or None,
            }
            for run in runs
        ],
    }


def write(folder: Path, report: Report) -> None:
    """Prints the table and writes the files; the JSON first, since it holds everything.

    Raises:
      InvalidInput: A file cannot be written.
    """
    try:
        _replace(
            folder / JSON_NAME,
            lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"),
        )
    finally:
        print(table(report))
    print(f"report  {folder / JSON_NAME}")
    try:
        _replace(folder / PLOT_NAME, lambda path: plot.draw(report, path))
    except ImportError:
        print("curves  not drawn: needs matplotlib (pip install matplotlib)")
    else:
        print(f"curves  {folder / PLOT_NAME}")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file in one piece: an older one stays until the new one is whole."""
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def table(report: Report) -> str:
    """The numbers of a report, the two trainings beside each other."""
    rows = [
        (
            f"training loss, last {min(LAST_STEPS, report['steps'])} steps (nats/token)",
            "last_loss",
            1,
            ".4f",
        ),
        ("held-out perplexity", "held_out_perplexity", 1, ".2f"),
        ("speed (tokens/s, median step)", "tokens_per_second", 1, ",.0f"),
        ("temporary memory of a step (MiB)", "temp_bytes", 2**-20, ".1f"),
        ("compilation of a step (s)", "compile_seconds", 1, ".1f"),
    ]
    runs, difference = report["runs"], report["largest_difference"]
    lines = ["", f"{'':42}" + "".join(f"{run['name']:>14}" for run in runs)]
    for label, key, unit, form in rows:
        cells = (_cell(run[key], unit, form) for run in runs)
        lines.append(f"{label:42}" + "".join(f"{cell:>14}" for cell in cells))
    lines += [
        "",
        f"largest difference of the loss curves: {difference['nats_per_token']:.1e} nats/token, "
        f"at step {difference['step']} of {report['steps']}",
        f"for comparison: vocabulary {report['model']['vocabulary']:,}, "
        f"perplexity by word counts alone {report['text']['unigram_perplexity']:.2f}",
        f"{report['seconds']:.0f} s in all, peak resident memory "
        f"{_cell(report['peak_resident_bytes'], 2**-20, ',.0f')} MiB",
        "",
    ]
    if runs[0]["generated"]:
        for label, said in (
            ("after the held-out words", report["text"]["prompt"]),
            ("the model goes on", runs[0]["generated"]),
        ):
            indent = " " * 26
            lines.append(
                textwrap.fill(said, 100, initial_indent=f"{label:26}", subsequent_indent=indent)
            )
        lines.append("")
    return "\n".join(lines)


def _cell(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value * unit, form)
