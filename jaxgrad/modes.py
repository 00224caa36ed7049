"""One derivation, registered twice: for reverse mode, and for every mode.

A backward rule given to ``jax.custom_vjp`` closes a function to plain forward mode. Its twin is
open to every mode: it gives a forward rule to ``jax.custom_jvp``, which JAX transposes where it
needs the backward one. Both begin with the same ``fwd`` and keep the same residuals r:

    y, r = fwd(x)             x̄ = bwd(r, ȳ)             ẏ = jvp(r, ẋ)            (1)

``jvp`` is linear in ẋ, and what else it computes it computes from r, anew under ``jax.checkpoint``:
so the transpose keeps r as ``bwd`` does, and no more. The public functions are written once, with
the mode as a first argument that ``public`` and ``twin`` fill in.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, cast

import jax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

Mode = Literal["reverse", "forward", "gauss_newton"]
P = ParamSpec("P")
R = TypeVar("R")

_NOTES = {
    "reverse": "In plain forward mode JAX raises TypeError; there, import {name} from "
    "``jaxgrad.forward_mode``.",
    "forward": "Every mode of differentiation works. The reverse one alone is that of "
    ":func:`jaxgrad.{name}`.",
}


def public(body: Callable[Concatenate[Mode, P], R]) -> Callable[P, R]:
    """``body`` with its backward rule."""
    return _in_mode(body, "reverse")


def twin(function: Callable[P, R], module: str) -> Callable[P, R]:
    """The same ``public`` function with its forward rule, as a function of ``module``."""
    function = _in_mode(inspect.unwrap(function, stop=_is_body), "forward")
    function.__module__ = module
    return function


def _is_body(function):
    return next(iter(inspect.signature(function).parameters), None) == "mode"


def gauss_newton(function: Callable[P, R]) -> Callable[P, R]:
    """The same ``public`` function, whose backward rule takes its last Jacobian for constant."""
    return functools.partial(cast(Any, function).__wrapped__, "gauss_newton")


def _in_mode(body, mode):
    @functools.wraps(body)
    def function(*args, **kwargs):
        return body(mode, *args, **kwargs)

    signature = inspect.signature(body)
    _, *rest = signature.parameters.values()
    cast(Any, function).__signature__ = signature.replace(parameters=rest)
    function.__annotations__ = {k: v for k, v in body.__annotations__.items() if k != "mode"}
    summary, *text = inspect.cleandoc(body.__doc__).split("\n\n")
    note = _NOTES[mode].format(name=body.__name__)
    function.__doc__ = "\n\n".join([summary, note, *text])
    return function


def of(mode: Mode, reverse: Any, forward: Any) -> Any:
    """The one of two registrations that ``mode`` asks for."""
    return forward if mode == "forward" else reverse


def custom_jvp(fwd: Callable, jvp: Callable, static: int = 0) -> Callable:
    """The twin of a ``jax.custom_vjp`` function, by (1).

    Args:
      fwd: As ``defvjp`` takes it: (y, residuals) of the arguments.
      jvp: ẏ of the static arguments, the residuals and the tangents, None for one that is 0; None
        in place of a part of ẏ that is 0.
      static: How many arguments come first that are no arrays.
    """

    register = functools.partial(jax.custom_jvp, nondiff_argnums=tuple(range(static)))

    @register
    def op(*args):
        return fwd(*args)[0]

    @register
    def known(*args):  # op(*primals), but y is at hand, the last of all arguments
        return args[-1]

    def rule(fixed, primals, y, residuals, tangents):
        push = jax.checkpoint(functools.partial(jvp, *fixed), prevent_cse=False)
        y_dot = push(residuals, *or_none(tangents))
        return known(*fixed, primals, residuals, y), instantiated(y_dot, y)

    @functools.partial(op.defjvp, symbolic_zeros=True)
    def _(*args):
        *fixed, primals, tangents = args
        y, residuals = fwd(*fixed, *primals)
        return rule(fixed, primals, y, residuals, tangents)

    @functools.partial(known.defjvp, symbolic_zeros=True)
    def _(*args):
        *fixed, (primals, residuals, y), (tangents, *_) = args
        return rule(fixed, primals, y, residuals, tangents)

    return op


def push(f: Callable, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """As ``jax.jvp``, and costs nothing for tangents that are known to be 0."""
    leaves, tree = jax.tree.flatten(primals)
    dots = dict(enumerate(jax.tree.leaves(tangents)))
    moving = [i for i, dot in dots.items() if not isinstance(dot, SymbolicZero)]

    def of_moving(*some):
        given = dict(zip(moving, some, strict=True))
        return f(*tree.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.jvp(of_moving, [leaves[i] for i in moving], [dots[i] for i in moving])


def refusing(f: Callable, message: str) -> Callable:
    """``f``, and an error where it is differentiated."""
    f = jax.custom_jvp(f)

    @f.defjvp
    def _(*_):
        raise NotImplementedError(message)

    return f


def or_none(tangents: Any) -> Any:
    """``tangents`` with None for each that is known to be 0."""
    return jax.tree.map(
        lambda z: None if isinstance(z, SymbolicZero) else z,
        tangents,
        is_leaf=lambda z: isinstance(z, SymbolicZero),
    )


def instantiated(tangents: Any, primals: Any) -> Any:
    """``tangents`` with the zeros that JAX expects in place of None."""
    return jax.tree.map(
        lambda primal, tangent: zero_from_primal(primal) if tangent is None else tangent,
        primals,
        tangents,
        is_leaf=is_none,
    )


def is_none(tree: Any) -> bool:
    """Whether there is nothing: a leaf, where ``jax.tree`` is told so."""
    return tree is None
