"""The command line: ``python -m jaxgrad``."""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxgrad import __version__
from jaxgrad.demo.options import Options
from jaxgrad.terminal import InvalidInput

SHORT_TRAIN_STEPS = 200

DESCRIPTION = """\
Checks jaxgrad's backward rules on this device, and trains a small language model with them.
Without a command: check, then a short train."""
EXAMPLES = """\
examples:
  python -m jaxgrad                          check, then train for half a minute
  python -m jaxgrad check softmax tanh       check two kernels
  python -m jaxgrad train --text book.txt    train on a text of your own
  python -m jaxgrad bench --quick            time and memory, beside other libraries
  python -m jaxgrad info                     versions, devices, kernels"""
CHECK_EXAMPLES = """\
examples:
  python -m jaxgrad check
  python -m jaxgrad check log_softmax --dtype bfloat16 --dtype float32
  python -m jaxgrad check --json accuracy.json

exit code: 0 if every rule meets its bar, 1 if one misses it"""
TRAIN = """\
Trains a small language model on English text twice, from the same parameters and on the same
batches: with jaxgrad's rules, and with plain JAX's. Compares loss, perplexity, speed and memory.
The defaults take about a minute on two cores."""
TRAIN_EXAMPLES = """\
examples:
  python -m jaxgrad train
  python -m jaxgrad train --steps 5000 --dim 256
  python -m jaxgrad train --text book.txt --out book --dtype bfloat16
  python -m jaxgrad train --mesh data=2,model=4
  for i in 0 1; do python -m jaxgrad train --mesh data=2,model=4 \
    --coordinator localhost:1234 --processes 2 --process $i & done; wait

Ctrl-C ends the training early; the report holds what there is.
exit code: 0, 2 if the text or the output folder cannot be used, 130 after Ctrl-C"""
BENCH = """\
Races every kernel with its peers, on this device: times taken in turn, temporary memory, errors.
Peers: jax.nn, jax.numpy and optax; tokamax, jax-cce and torch where they are installed."""
BENCH_EXAMPLES = """\
examples:
  python -m jaxgrad bench --quick                      one shape a kernel, three minutes
  python -m jaxgrad bench                              all shapes, twenty minutes
  python -m jaxgrad bench softmax --shape 64,50257     your own shape
  python -m jaxgrad bench --json new.json --compare old.json

A shape of two numbers is rows,classes; of three, tokens,features,classes of a fused head; of
four, batch,length,heads,features of attention. Close what else is running: the table ends with
how noisy the machine was.
exit code: 0, 2 if an argument cannot be used, 130 after Ctrl-C"""
AOT = """\
Compiles value and gradients of kernels for a chip that is not there, by the real compiler, beside
plain JAX: whether they compile, what memory they take, and what else the compiler tells."""
AOT_EXAMPLES = """\
examples:
  pip install 'jaxgrad[aot-tpu]' && python -m jaxgrad aot --target v6e
  pip install 'jaxgrad[aot-gpu]' && python -m jaxgrad aot --target h100
  python -m jaxgrad aot --target a100 dot_product_attention --shape 2,4096,8,64

exit code: 0, 1 if a kernel does not compile, 2 if an argument cannot be used"""
TARGETS = ("v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "h100")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
      argv: The arguments after the program's name; None for those of the process.
    """
    arguments = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console may lack letters of the user's text
        sys.stdout.reconfigure(errors="replace")
    try:
        return arguments.run(arguments)
    except InvalidInput as error:
        print(f"jaxgrad: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... | head` has read enough; drop what is left to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\njaxgrad: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = _parser(
        argparse.ArgumentParser, prog="python -m jaxgrad", description=DESCRIPTION, epilog=EXAMPLES
    )
    top.add_argument("--version", action="version", version=f"jaxgrad {__version__}")
    top.set_defaults(run=_check_and_train)
    commands = top.add_subparsers(title="commands", metavar="{check,train,bench,aot,info}")

    check = _parser(
        commands.add_parser,
        "check",
        epilog=CHECK_EXAMPLES,
        help="the error of every rule on this device, beside jax.nn's and optax's",
    )
    check.add_argument("kernels", nargs="*", metavar="KERNEL", help="kernels to check (all)")
    check.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        dest="dtypes",
        help="dtype to check; may be given more than once (all)",
    )
    check.add_argument("--json", metavar="FILE", help="write the table to a JSON file as well")
    check.set_defaults(run=_check)

    train = _parser(
        commands.add_parser,
        "train",
        epilog=TRAIN_EXAMPLES,
        help="a small language model, trained with jaxgrad and with plain JAX",
        description=TRAIN,
    )
    default = Options()

    def number(name, of, least=1, metavar="N"):
        options = {"type": _at_least(least), "default": getattr(default, name), "metavar": metavar}
        train.add_argument(f"--{name}", help=f"{of} (%(default)s)", **options)

    number("steps", "updates of each model")
    number("batch", "stretches of text per update")
    number("context", "words per stretch")
    number("dim", "features of the model")
    number("seed", "of the parameters and the batches", least=0)
    train.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=default.dtype,
        help="what the model computes in (%(default)s)",
    )
    train.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text (the docstrings of the installed NumPy and JAX)",
    )
    train.add_argument(
        "--out",
        type=Path,
        default=default.out,
        metavar="DIR",
        help="where report.json and curves.png go (%(default)s)",
    )
    train.add_argument(
        "--mesh",
        type=_mesh,
        metavar="data=N,model=N",
        help="devices to cut the batch and the model over; a CPU counts as many as are asked for",
    )
    train.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where the processes of a mesh meet"
    )
    number("processes", "how many they are")
    number("process", "which of them this is", least=0, metavar="I")
    train.set_defaults(run=_train)

    bench = _parser(
        commands.add_parser,
        "bench",
        epilog=BENCH_EXAMPLES,
        help="time and memory of every kernel on this device, beside other libraries",
        description=BENCH,
    )
    bench.add_argument("kernels", nargs="*", metavar="KERNEL", help="kernels to race (all)")
    bench.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES[:3],
        dest="dtypes",
        help="dtype to race in; may be given more than once (float32 and bfloat16)",
    )
    of_shape = {"type": _shape, "metavar": "N,N", "help": "shape to race at; may be repeated"}
    bench.add_argument("--shape", action="append", dest="shapes", **of_shape)
    bench.add_argument("--quick", action="store_true", help="one shape a kernel, fewer rounds")
    bench.add_argument("--json", metavar="FILE", help="write the results to a JSON file as well")
    bench.add_argument("--plot", metavar="FILE", help="draw them to a PNG, PDF or SVG file")
    bench.add_argument("--compare", metavar="OLD.json", help="tell what changed since a run")
    bench.set_defaults(run=_bench)

    aot = _parser(
        commands.add_parser,
        "aot",
        epilog=AOT_EXAMPLES,
        help="memory of kernels on a chip that is not there",
        description=AOT,
    )
    aot.add_argument("kernels", nargs="*", metavar="KERNEL", help="kernels to compile (all)")
    aot.add_argument("--target", required=True, choices=TARGETS, help="the chip")
    aot.add_argument("--shape", type=_shape, help="as of bench (4096,2048,131072 and 2,4096,8,128)")
    aot.add_argument("--soft-cap", type=float, help="soft-cap of the logits (none)")
    aot.add_argument("--alone", action="store_true", help="without plain JAX and 'xla' beside them")
    aot.set_defaults(run=_aot)

    info = _parser(commands.add_parser, "info", help="versions, devices and kernels")
    info.set_defaults(run=_info)
    return top


def _parser(make, *args, help: str | None = None, **kwargs) -> argparse.ArgumentParser:
    if help:
        kwargs = {"help": help, "description": help[0].upper() + help[1:] + "."} | kwargs
    return make(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(map(_at_least(1), text.split(",")))
    if not 2 <= len(shape) <= 4:
        raise argparse.ArgumentTypeError(f"must be two to four numbers, got {len(shape)}")
    return shape


def _check_and_train(arguments: argparse.Namespace) -> int:
    from jaxgrad.bench.accuracy import check
    from jaxgrad.demo.train import train

    checked = check(kernels=None, dtypes=None, json=None)
    print()
    return train(dataclasses.replace(Options(), steps=SHORT_TRAIN_STEPS)) or checked


def _check(arguments: argparse.Namespace) -> int:
    from jaxgrad.bench.accuracy import check

    return check(kernels=arguments.kernels or None, dtypes=arguments.dtypes, json=arguments.json)


def _mesh(text: str) -> str:
    from jaxgrad.demo import layout

    layout.sizes(text)
    return text


def _train(arguments: argparse.Namespace) -> int:
    from jaxgrad.demo import layout
    from jaxgrad.demo.train import train

    fields = (field.name for field in dataclasses.fields(Options))
    options = Options(**{name: getattr(arguments, name) for name in fields})
    layout.start(options)
    return train(options)


def _bench(arguments: argparse.Namespace) -> int:
    from jaxgrad.bench.speed import bench

    names = ("kernels", "dtypes", "shapes", "quick", "json", "plot", "compare")
    return bench(**{name: getattr(arguments, name) for name in names})


def _aot(arguments: argparse.Namespace) -> int:
    from jaxgrad.bench.aot import aot

    a = arguments
    return aot(a.target, a.kernels or None, a.shape, a.soft_cap, a.alone)


def _info(arguments: argparse.Namespace) -> int:
    from jaxgrad.demo.info import info

    return info()


if __name__ == "__main__":
    sys.exit(main())
