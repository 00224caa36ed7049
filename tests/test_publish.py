"""The numbers of the README and of the page of benchmarks are those of the stored results."""

import copy
import importlib.util
from pathlib import Path

import pytest

from jaxgrad.bench import report

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def publish():
    path = ROOT / "notebooks" / "publish.py"
    spec = importlib.util.spec_from_file_location("publish", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=("CPU", "GPU"))
def name(publish, request):
    return getattr(publish, request.param)


@pytest.fixture
def results(publish, name):
    return publish.results_of(name)


def headlines(publish):
    return sum(map(len, publish.HEADLINES.values()))


def test_readme_tells_what_was_measured(publish):
    (block,) = publish.BLOCK.findall(publish.README.read_text(encoding="utf-8"))
    assert block == publish.readme(*map(publish.results_of, publish.HEADLINES))
    assert block.count("\n| ") == 2 * len(publish.HEADLINES) + headlines(publish)


def test_page_tells_what_was_measured(publish, results, name):
    page = publish.HERE / f"{name}.md"
    assert page.read_text(encoding="utf-8") == publish.page(results, name)


def test_another_measurement_would_be_told(publish, results, name):
    other = copy.deepcopy(results)
    for row in other["rows"]:
        row["ratios"] = {peer: [0.5, 0.5, 0.5] for peer in row["ratios"]}
    given = [other if of == name else publish.results_of(of) for of in publish.HEADLINES]
    assert publish.readme(*given).count("**0.50** (0.50–0.50)") >= len(publish.HEADLINES[name])
    assert publish.page(other, name) != publish.page(results, name)


def test_results_are_small_and_name_no_machine(publish, results, name):
    assert (publish.HERE / f"{name}.json").stat().st_size < 200_000
    assert set(results["machine"]) == {
        *("platform", "device", "processor", "cores", "memory_bytes", "system")
    }


def test_bars_are_judged_as_now(results):
    from jaxgrad.bench.bars import verdicts

    on_cpu = results["machine"]["platform"] == "cpu"
    for row in results["rows"]:
        bars = [verdict._asdict() for verdict in verdicts(row)] if on_cpu else []
        assert row["bars"] == bars, report.name_of(row)
