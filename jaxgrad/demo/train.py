"""Trains one model twice at once: with jaxgrad's rules, and with plain JAX's.

Both start from the same parameters and take every step on the same words, one right after the
other: their curves can be laid over each other, and their times belong to the same minute.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxgrad.demo import model, report, rules, text
from jaxgrad.demo.layout import Layout
from jaxgrad.demo.model import Params, Rules
from jaxgrad.demo.optimiser import Optimiser, adamw, warm_up_and_decay
from jaxgrad.demo.options import Options
from jaxgrad.terminal import progress

LEARNING_RATE = 4e-3
EVALUATED_BATCHES = 128
GENERATED_WORDS = 40


class Run:
    """One of the two trainings, and what was measured in it."""

    def __init__(
        self,
        name: str,
        rules: Rules,
        params: Params,
        optimiser: Optimiser,
        windows: np.ndarray,
        dtype: str,
        layout: Layout,
    ):
        """Compiles one update on batches like ``windows``."""

        def loss(rules, params, windows):
            return model.loss(cast(params, dtype), windows, rules)

        def step(params, state, windows):
            on_mesh = functools.partial(loss, layout.rules(rules))
            value, grads = jax.value_and_grad(on_mesh)(params, windows)
            return optimiser.update(grads, state, params), value

        self.name = name
        self.params, self.state = params, layout.state(optimiser.init(params))
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.perplexity: float | None = None
        self.generated: list[int] = []
        self._loss = jax.jit(functools.partial(loss, rules))
        self._layout = layout
        self._continuation = jax.jit(
            functools.partial(model.continuation, count=GENERATED_WORDS, rules=rules)
        )
        self._dtype = dtype
        start = time.perf_counter()
        kept = layout.shardings((self.params, self.state))
        stepped = jax.jit(step, out_shardings=kept and (kept, None))
        windows = layout.windows(windows)
        self._step = stepped.lower(self.params, self.state, windows).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self._step.memory_analysis()
        self.temp_bytes = memory.temp_size_in_bytes if memory else None

    def step(self, windows: np.ndarray):
        """One update, computed but not yet made: what :meth:`make` takes."""
        start = time.perf_counter()
        updated, loss = self._step(self.params, self.state, self._layout.windows(windows))
        return updated, float(loss), time.perf_counter() - start

    def make(self, updated, loss: float, seconds: float) -> None:
        """Makes an update."""
        self.params, self.state = updated
        self.losses.append(loss)
        self.seconds.append(seconds)

    def evaluate(self, batches: list[np.ndarray]) -> None:
        """Perplexity of the predictions of ``batches``."""
        losses = [float(self._loss(self.params, windows)) for windows in batches]
        self.perplexity = float(np.exp(np.mean(losses)))

    def generate(self, prompt: np.ndarray) -> None:
        """Words drawn from the model to follow ``prompt``."""
        params = cast(self.params, self._dtype)
        self.generated = self._continuation(params, prompt, key=jax.random.key(0)).tolist()


def train(options: Options, on_step: Callable[[int], object] = lambda done: None) -> int:
    """Reads the text, trains, evaluates, writes the report and prints it.

    Ctrl-C ends the stage at work, not the ones after it: the report holds what there is.

    Args:
      options: What the user set.
      on_step: Called with the number of steps made, after each.

    Returns:
      The exit code: 0, or 130 where the run was interrupted.

    Raises:
      InvalidInput: The text cannot be used, or the report cannot be written.
    """
    start = time.perf_counter()
    layout = Layout(options)
    corpus = text.load(options.text)
    report.check_writable(options.out)
    sizes = model.Sizes(
        len(corpus.vocabulary), min(options.context, len(corpus.held_out) - 1), options.dim
    )
    rng = np.random.default_rng(options.seed)
    params = layout.params(model.init(rng, sizes))
    optimiser = adamw(warm_up_and_decay(LEARNING_RATE, options.steps))
    draw = functools.partial(text.windows, rng, corpus.train, options.batch, sizes.context)
    held_out = list(
        itertools.islice(
            text.consecutive_windows(corpus.held_out, options.batch, sizes.context),
            EVALUATED_BATCHES,
        )
    )
    print(report.header(options, corpus, sizes, params, optimiser.name), flush=True)
    print("compiling one step of each", file=sys.stderr)
    runs = [
        Run(name, which, params, optimiser, draw(), options.dtype, layout)
        for name, which in (("jaxgrad", rules.JAXGRAD), ("plain JAX", rules.PLAIN))
    ]

    def steps() -> None:
        with progress(options.steps) as show:
            for done in range(1, options.steps + 1):
                windows = draw()
                updates = [run.step(windows) for run in runs]
                for run, update in zip(runs, updates, strict=True):
                    run.make(*update)
                show(done, f"loss {runs[0].losses[-1]:.3f}")
                on_step(done)

    def evaluate() -> None:
        for run in runs:
            run.evaluate(held_out)

    def generate() -> None:
        for run in runs:
            run.generate(held_out[0][0, :-1])

    def save() -> None:
        report.write(
            options.out,
            report.build(
                options, corpus, sizes, runs, held_out, time.perf_counter() - start, interrupted
            ),
        )

    interrupted = _in_turn(steps)
    if not runs[0].losses:
        raise KeyboardInterrupt
    interrupted |= _in_turn(evaluate, generate)
    if jax.process_index() != 0:  # one report of all processes
        return 130 if interrupted else 0
    try:
        save()
    except KeyboardInterrupt:  # a matter of milliseconds: it is done all the same
        interrupted = True
        save()
    return 130 if interrupted else 0


def _in_turn(*stages: Callable[[], None]) -> bool:
    """Runs all stages, also those after one that Ctrl-C has ended; whether it has ended one."""
    interrupted = False
    for stage in stages:
        try:
            stage()
        except KeyboardInterrupt:
            interrupted = True
            print(
                "\ninterrupted: the report will hold what there is; Ctrl-C again to hurry it up",
                file=sys.stderr,
            )
    return interrupted


def cast(params: Params, dtype: str) -> Params:
    """The parameters as the model computes with them; the optimiser keeps float32."""
    return jax.tree.map(lambda p: p.astype(dtype), params)
