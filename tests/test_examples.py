"""Every example of notebooks/examples.md runs as it stands, and is short."""

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "notebooks" / "examples.md").read_text(encoding="utf-8")
SECTIONS = PAGE.split("\n## ")[1:]
EXAMPLES = {
    title: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for title, _, text in (section.partition("\n") for section in SECTIONS)
}

pytestmark = pytest.mark.usefixtures("standard_promotion", "hardly_optimised")


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs(title):
    (code,) = EXAMPLES[title]
    for package in re.findall(r"^(?:import|from) (flax|equinox)", code, re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    assert len(code.splitlines()) <= 40
    assert max(map(len, code.splitlines())) <= 100
    assert "assert " in code
    exec(compile(code, title, "exec"), {"__name__": title})


def test_examples_are_found():
    assert len(EXAMPLES) == 8
    assert all(len(blocks) == 1 for blocks in EXAMPLES.values())
