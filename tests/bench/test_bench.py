"""The command ``bench``: who is raced, how times are taken, what is printed, kept and compared."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad
from jaxgrad.__main__ import main
from jaxgrad.bench import bars, errors, memory, peers, race, report, speed, subjects, torch_peers
from jaxgrad.bench.race import Case

SUBJECTS = {subject.name: subject for subject in subjects.subjects()}
SMALL = {2: (8, 16), 3: (16, 8, 32), 4: (1, 16, 2, 4)}

pytestmark = pytest.mark.usefixtures("standard_promotion", "unoptimised")


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    monkeypatch.setattr(race, "SHORTEST", 1e-5)
    monkeypatch.setattr(race, "SAME", (8, 16))


def without(monkeypatch, *packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, peers.PACKAGES[package], None)
    peers.load.cache_clear()
    torch_peers.functions.cache_clear()


@pytest.fixture(autouse=True)
def uncached():
    yield
    peers.load.cache_clear()
    torch_peers.functions.cache_clear()


def test_every_function_is_raced():
    functions = {name for name in jaxgrad.__all__ if not isinstance(getattr(jaxgrad, name), type)}
    assert {subject.kernel for subject in SUBJECTS.values()} == functions
    assert len(SUBJECTS) == len(subjects.subjects())


@pytest.mark.parametrize("name", SUBJECTS)
def test_results_of_a_race_are_right(name):
    """By the errors that the table shows: they would tell of arguments or truths mixed up, too."""
    subject = SUBJECTS[name]
    case = Case(subject, "float32", SMALL[len(subject.family.quick)], subject.passes[-1])
    args = race.arguments(case)
    found = race.prepare(case, subject.ours, args).call()
    error = errors.error_in_ulps(case, args, found)
    assert error is not None and error < 32
    spoilt = jax.tree.map(lambda z: z * (1 + 1e-3), found)
    assert errors.error_in_ulps(case, args, spoilt) > 1000


def test_error_of_a_wide_loss_counts_narrow_units():
    subject = SUBJECTS["softmax_cross_entropy_with_integer_labels"]
    case = Case(subject, "bfloat16", (8, 16), "forward")
    args = race.arguments(case)
    wide, narrow = (
        errors.error_in_ulps(case, args, race.prepare(case, f, args).call())
        for f in (subject.ours, subject.contenders["optax"])
    )
    assert wide < 1e-3
    assert 0.1 < narrow < 2


def test_times_are_taken_in_turn(monkeypatch):
    clock, order, pauses = [0.0], [], []
    monkeypatch.setattr(race.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(race.time, "sleep", pauses.append)

    def call(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds * (2 if len(order) > 6 else 1)  # the machine slows down

        return run

    calls = {"a": call("a", 0.125), "b": call("b", 0.375)}
    times = race.run(calls, seconds=2.5 * (1 + race.PAUSE))
    assert order == ["a", "b"] * 5
    assert list(times["a"]) == [0.125] * 3 + [0.25] * 2
    assert race.ratio(times["b"], times["a"]) == (3, 3, 3)
    np.testing.assert_allclose(pauses, [0.05, 0.15] * 3 + [0.1, race.LONGEST_PAUSE] * 2)


def test_quick_calls_are_timed_many_at_once(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(race.time, "perf_counter", lambda: clock[0])

    def call():
        calls.append(clock.append(clock.pop() + race.SHORTEST / 8))

    times = race.run({"a": call}, seconds=0, least=2)
    np.testing.assert_allclose(times["a"], [race.SHORTEST / 8] * 2)
    assert len(calls) == 1 + 2 * 8


def test_table_and_json(hurry, capsys, tmp_path, monkeypatch):
    without(monkeypatch, "torch", "tokamax")
    path = tmp_path / "new.json"
    argv = ["bench", "tanh", "softmax", "--dtype", "float32", "--shape", "8,16"]
    assert main([*argv, "--json", str(path), "--plot", str(tmp_path / "new.png")]) == 0
    out = capsys.readouterr().out
    assert "\ntanh\n" in out and "\nsoftmax (not jitted)\n" in out
    assert "float32  8×16   gradient" in out
    assert "noise: one program against itself" in out
    assert "absent: tokamax: pip install tokamax\n" in out
    results = report.read(path)
    assert results["versions"]["jax"] == jax.__version__
    assert results["machine"]["platform"] == jax.default_backend()
    assert len(results["noise"]["same_vs_same"]) == 2
    row = next(row for row in results["rows"] if row["kernel"] == "tanh")
    ours, theirs = (row["contenders"][name] for name in ("jaxgrad", "jax.numpy"))
    assert 0 < ours["seconds"] < 1 and ours["compile_seconds"] > 0
    assert ours["temp_bytes"] >= 0 and ours["error_ulps"] < 8
    low, median, high = row["ratios"]["jax.numpy"]
    assert low <= median <= high
    assert 0.2 < median / (theirs["seconds"] / ours["seconds"]) < 5
    assert (tmp_path / "new.png").stat().st_size > 5000

    assert main(["bench", *argv[1:], "--compare", str(path)]) == 0
    assert "\n5 rows compared, " in capsys.readouterr().out


def test_changes_are_told(capsys):
    def results(ratios, temp):
        row = {"kernel": "tanh", "variant": "", "dtype": "float32", "shape": [8], "what": "forward"}
        row |= {"contenders": {"jaxgrad": {"temp_bytes": temp}}, "ratios": {"jax.numpy": ratios}}
        return {"machine": {}, "rows": [row]}

    old = results([0.9, 1.0, 1.1], 2**20)
    report.show_changes(old, results([1.0, 1.1, 1.2], 2**20))
    report.show_changes(old, results([1.2, 1.3, 1.4], 2**21))
    assert capsys.readouterr().out.splitlines() == [
        "1 rows compared, 0 changes",
        "1 rows compared, 2 changes",
        "tanh float32 8 forward: 1.00 → 1.30 × as fast as jax.numpy",
        "tanh float32 8 forward: temp 1.0 → 2.0 MiB",
    ]


def record(kernel, variant="", dtype="float32", shape=(512, 32768), what="gradient", **peers):
    """A row in which each peer has a ratio, then a temp."""
    contenders = {name: {"temp_bytes": temp} for name, (_, temp) in peers.items()}
    ratios = {name: [r, r, r] for name, (r, _) in peers.items() if name != "jaxgrad"}
    row = {"kernel": kernel, "variant": variant, "dtype": dtype, "shape": list(shape)}
    return row | {"what": what, "contenders": contenders, "ratios": ratios}


@pytest.mark.parametrize(
    "row, met",
    [
        (
            record("tanh", jaxgrad=(1, 0), **{"jax.numpy": (0.96, 0)}),
            {"≥ 0.95": 1, "temp ≤ theirs": 1},
        ),
        (
            record("tanh", jaxgrad=(1, 1e6), **{"jax.numpy": (0.9, 0)}),
            {"≥ 0.95": 0, "temp ≤ theirs": 0},
        ),
        (
            record("softmax", "", "bfloat16", jaxgrad=(1, 2**25), **{"jax.nn": (1.5, 2**26)}),
            {"≥ 1.4": 1, "temp < the logits": 0},
        ),
        (record("softmax", "", "bfloat16", (8, 8), jaxgrad=(1, 0), **{"jax.nn": (1, 0)}), {}),
        (
            record(
                "dot_product_attention",
                "causal",
                shape=(1, 2048, 8, 64),
                jaxgrad=(1, 1),
                **{"jax.nn": (4.1, 14)},
            ),
            {"≥ 4": 1, "temp ≤ theirs / 15": 0},
        ),
        (
            record(
                "linear_softmax_cross_entropy",
                "low memory",
                shape=(2048, 256, 151936),
                jaxgrad=(1, 18 * 2**20),
                **{"x @ w, optax": (0.7, 2489 * 2**20)},
            ),
            {"≥ 0.8": 0, "temp ≤ 25 MiB": 1},
        ),
    ],
)  # fmt: skip
def test_bars(row, met):
    assert {verdict.asks: int(verdict.met) for verdict in bars.verdicts(row)} == met


def test_peak_is_that_of_a_fresh_process():
    case = Case(SUBJECTS["tanh"], "float32", (4096, 4096), "gradient")
    peak = memory.peak(case, "jaxgrad")
    assert peak is not None and 4 * 2**26 < peak < 2**31  # x, ȳ, y and x̄
    assert memory.peak(case, "nobody") is None


def test_temps_are_those_of_the_compiler(monkeypatch):
    monkeypatch.setattr(memory, "VOCABULARIES", (512,))
    monkeypatch.setattr(memory, "AT_EACH_VOCABULARY", (64, 16))
    monkeypatch.setattr(memory, "LENGTHS", ())
    temps = {subject.name: take() for _, subject, _, take in memory.sweep(quick=False)}
    assert temps["linear_softmax_cross_entropy (mean)"]["x @ w, optax"] >= 4 * 64 * 512


def test_without_optional_peers(monkeypatch):
    without(monkeypatch, *peers.PACKAGES)
    assert peers.absent() == {name: f"pip install {name}" for name in peers.PACKAGES}
    for subject in subjects.subjects():
        assert subject.contenders.keys().isdisjoint({"optax", "x @ w, optax", *peers.PACKAGES})
        assert subject.ours


def test_a_peer_that_fails_drops_out(hurry):
    def fails(x):
        raise NotImplementedError("no such device")

    subject = SUBJECTS["softmax"]._replace(contenders={"jaxgrad": jnp.abs, "peer": fails})
    row = speed.measure(Case(subject, "float32", (8, 16), "forward"), 0)
    assert row["contenders"]["peer"] == {"failed": "NotImplementedError: no such device"}
    assert row["ratios"] == {}
    (line,) = report.cells_of(row | {"bars": []})
    assert "NotImplementedError: no such device" in line


def test_a_peer_that_takes_forever_is_given_up(hurry, monkeypatch):
    monkeypatch.setattr(speed, "PATIENCE", 0.0)
    chosen = speed.cases(["tanh"], ["float32"], [(8, 16)])
    results = {"rows": [], "peaks": {}, "given_up": {}, "machine": {"platform": "cpu"}}
    for case in chosen:
        speed._take_row(results, case, 0)
    first, second = (row["contenders"] for row in results["rows"])
    assert first["jax.numpy"]["failed"].startswith("TimeoutError: a call takes 0 s")
    assert set(second) == {"jaxgrad"}


def test_interrupted_race_shows_what_there_is(hurry, monkeypatch, capsys, tmp_path):
    took = []

    def measure(case, *_):
        if took:
            raise KeyboardInterrupt
        took.append(case)
        return record("tanh", jaxgrad=(1, 0)) | {"contenders": {"jaxgrad": {"seconds": 1.0}}}

    monkeypatch.setattr(speed, "measure", measure)
    path = tmp_path / "part.json"
    argv = ["bench", "tanh", "--dtype", "float32", "--shape", "8,16", "--json", str(path)]
    assert main(argv) == 130
    assert "\ntanh\n" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["rows"]) == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["tahn"], "no kernel 'tahn' to race: there are softmax, "),
        (["tanh", "--shape", "1,2,3"], "nothing to race: these kernels take no shape of this rank"),
        (["tanh", "--compare", "no.json"], "no.json: cannot be read: No such file or directory"),
        (
            ["tanh", "--json", "no/x.json"],
            "no/x.json: cannot be written: No such file",
        ),
    ],
)
def test_bad_argument(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"jaxgrad: error: {message}")


def test_a_quick_run_holds_every_bar_but_those_on_large_heads():
    quick, full = (speed.cases(quick=quick) for quick in (True, False))
    assert len(quick) < len(full) / 4
    held = {(case.subject.name, case.dtype, case.what) for case in full if _is_held(case)}
    assert held == {(case.subject.name, case.dtype, case.what) for case in quick if _is_held(case)}
    assert {case.subject.name for case in quick} == set(SUBJECTS)
    asked = speed.cases(["tanh"], ["bfloat16"], quick=True)
    assert [(case.dtype, case.what) for case in asked] == [("bfloat16", "gradient")]


def _is_held(case):
    return bars.is_held(case.subject.kernel, case.subject.variant, case.dtype, case.what)
