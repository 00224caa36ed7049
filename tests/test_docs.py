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
def names():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    q, k, v = (jax.random.normal(next(keys), (1, 6, 2, 4)) for _ in range(3))
    values = {"q": q, "k": k, "v": v, "c": 2.0, "m": jnp.array([True, True, False, True])}
    values |= {"x": jax.random.normal(next(keys), (3, 4)), "i": jnp.array([0, 3, 1])}
    values |= {"h": jax.random.normal(next(keys), (3, 5)), "w": jnp.ones((5, 4)).at[2].set(0.5)}
    values |= {"t": jax.nn.softmax(values["x"][::-1]), "row": values["x"][0]}
    return values | {"jax": jax, "jnp": jnp, "optax": optax, "jaxgrad": jaxgrad}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("there", "here"), PAIRS, ids=[there for there, _ in PAIRS])
def test_both_sides_of_a_row_agree(there, here):
    theirs, ours = (eval(call, dict(names())) for call in (there, here))
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_rows_are_found():
    assert len(PAIRS) == 11
