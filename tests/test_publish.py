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


@pytest.fixture
def results(publish):
    return report.read(publish.JSON)


def test_readme_tells_what_was_measured(publish, results):
    (block,) = publish.BLOCK.findall(publish.README.read_text(encoding="utf-8"))
    assert block == publish.readme(results)
    assert block.count("\n| ") == 2 + len(publish.HEADLINES)


def test_page_tells_what_was_measured(publish, results):
    assert publish.PAGE.read_text(encoding="utf-8") == publish.page(results)


def test_another_measurement_would_be_told(publish, results):
    other = copy.deepcopy(results)
    for row in other["rows"]:
        row["ratios"] = {peer: [0.5, 0.5, 0.5] for peer in row["ratios"]}
    assert publish.readme(other).count("**0.50** (0.50–0.50)") == len(publish.HEADLINES)
    assert publish.page(other) != publish.page(results)


def test_results_are_small_and_name_no_machine(publish, results):
    assert publish.JSON.stat().st_size < 200_000
    assert set(results["machine"]) == {
        *("platform", "device", "processor", "cores", "memory_bytes", "system")
    }


def test_bars_are_judged_as_now(results):
    from jaxgrad.bench.bars import verdicts

    for row in results["rows"]:
        assert row["bars"] == [verdict._asdict() for verdict in verdicts(row)], report.name_of(row)
