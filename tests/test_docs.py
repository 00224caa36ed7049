"""The documentation builds without a warning, offline; its pages name what exists, and are true."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad
import jaxgrad.parallel

ROOT = Path(__file__).parents[1]
COMING_FROM = (ROOT / "notebooks" / "coming_from.md").read_text(encoding="utf-8")
PAIRS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", COMING_FROM.split("## PyTorch")[0], re.M)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "notebooks"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    built = subprocess.run(
        [*command, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_public_function_has_its_place(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    for module in jaxgrad, jaxgrad.parallel:
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in page


def test_notebooks_are_the_tutorials(site):
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f'href="{notebook.stem}.html"' in (site / "index.html").read_text(encoding="utf-8")
        assert (site / f"{notebook.stem}.html").exists()


@functools.cache
def values():
    """Both sides of every row, in one compilation."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 6, 2, 4), np.float32) for _ in range(3))
    x, h, w = (rng.standard_normal(shape, np.float32) for shape in ((3, 4), (3, 5), (5, 4)))
    t = rng.dirichlet(np.ones(4), 3).astype(np.float32)
    m = np.array([True, True, False, True])
    names = {"q": q, "k": k, "v": v, "x": x, "h": h, "w": w, "t": t, "m": m, "c": 2.0}
    names |= {"row": x[0], "i": np.array([0, 3, 1])}
    libraries = {"jax": jax, "jnp": jnp, "optax": optax, "jaxgrad": jaxgrad}
    sides = jax.jit(lambda names: [[eval(c, names | libraries) for c in pair] for pair in PAIRS])
    return dict(zip(PAIRS, sides(names), strict=True))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("pair", PAIRS, ids=[there for there, _ in PAIRS])
def test_both_sides_of_a_row_agree(pair):
    theirs, ours = values()[pair]
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_rows_are_found():
    assert len(PAIRS) == 11
