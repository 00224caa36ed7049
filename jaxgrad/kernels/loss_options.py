"""The options that every cross-entropy takes: checked, made a ``Rule``, given their cotangents."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxgrad import numerics, sharding
from jaxgrad.kernels import row_rule
from jaxgrad.kernels.row_rule import Part, Rule


def make_rule(
    of: str,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    logit_soft_cap: ArrayLike | None = None,
) -> Rule:
    """The options of a call; one that is known to change nothing is None."""
    numerics.check_fraction(label_smoothing, of, "label_smoothing")
    numerics.check_positive(temperature, of, "temperature")
    numerics.check_positive(logit_soft_cap, of, "logit_soft_cap")
    return Rule(
        None if _is(label_smoothing, 0) else label_smoothing,
        None if _is(z_loss, 0) else z_loss,
        None if _is(temperature, 1) else temperature,
        logit_soft_cap,
    )


def _is(value, default):
    return isinstance(value, (int, float)) and value == default


def as_scalars(rule: Rule, dtype: jnp.dtype, of: str) -> Rule:
    """``rule`` as scalar arrays of ``dtype``."""
    for name, value in rule._asdict().items():
        if value is not None and jnp.ndim(value) != 0:
            raise ValueError(f"{of}: {name} must be a scalar, got {numerics.describe(value)}")
    return Rule(
        *(
            None if v is None else numerics.as_float(v, of, name).astype(dtype)
            for name, v in rule._asdict().items()
        )
    )


def add_rules(a: Rule, b: Rule) -> Rule:
    """The sum of two cotangents of a rule, each with None for what it lacks."""
    return Rule(*(z if y is None else y if z is None else y + z for y, z in zip(a, b, strict=True)))


def mean_weights(weights: Array) -> Array:
    """Each token's part in the weighted mean; 0 throughout where no weight is left."""
    return numerics.safe_divide(weights, weights.sum())


def lifted(arrays: tuple[Any, ...], axis_name: sharding.AxisName) -> tuple[Any, ...]:
    """Arrays of classes, lifted to the shards of ``axis_name`` too, and the rule, which is last."""
    *classes, _ = sharding.lift(arrays, axis_name)
    return *classes, sharding.lift_rows(arrays[-1], arrays, axis_name)


def kept(rule: Rule, part: Part) -> Part:
    """The sums of a row that its backward needs: the gap of the targets for ε̄ alone."""
    return part if rule.label_smoothing is not None else part._replace(gap=None)


def to_options(
    axis_name: sharding.AxisName,
    rule: Rule,
    x: Array,
    where: Array | None,
    part: Part,
    loss_bar: Array,
    z_bar: Array,
) -> Rule:
    """The cotangents of the options, from whole rows or a shard's part of them."""
    classes = jax.tree.map(jnp.sum, row_rule.to_rule(rule, x, where, part, z_bar))
    rows = jax.tree.map(jnp.sum, row_rule.rows_to_rule(rule, part, loss_bar))
    return add_rules(sharding.psum(classes, axis_name), rows)
