"""Meshes of the devices that count as eight, and what a program on them sends."""

import functools
import re

import jax
from jax.sharding import AxisType, NamedSharding
from numpy.testing import assert_allclose

close = functools.partial(jax.tree.map, functools.partial(assert_allclose, rtol=1e-12, atol=1e-12))

SENDS = ("all_gather", "all_to_all", "pmax", "pmin", "ppermute", "psum", "reduce_scatter")


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def abstract(mesh, shape, spec, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def collectives(compiled):
    """(kind, shapes, whether in a loop) of every collective of a compiled function."""
    text = compiled.as_text()
    loops, found, name = set(re.findall(r"body=%?([\w.\-]+)", text)), [], None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[1]
        op = re.search(r"= (.*?) (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", line)
        if op:
            shapes = sorted(re.findall(r"\w+\[[\d,]*\]", op[1]))
            found.append((op[2], tuple(shapes), name in loops))
    return sorted(found)


def sent(traced):
    """(name, dtype, whether in a branch) of every collective of a traced function."""
    return {
        (eqn.primitive.name, str(eqn.invars[0].aval.dtype), in_branch)
        for eqn, in_branch in _equations(traced.jaxpr.jaxpr)
        if eqn.primitive.name.startswith(SENDS)
    }


def sends_in_branches(traced):
    """Whether a shard would wait there for one that takes another branch, and never comes."""
    return any(in_branch for _, _, in_branch in sent(traced))


def _equations(jaxpr, in_branch=False):
    for eqn in jaxpr.eqns:
        yield eqn, in_branch
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner, in_branch or eqn.primitive.name == "cond")
