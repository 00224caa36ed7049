r"""A check for whoever writes a backward rule, here or in a project of their own.

A rule computes x̄ = Jᵀȳ. It is right if, whatever the cotangent ȳ and the tangent ẋ,

    ⟨ȳ, J ẋ⟩ = ⟨Jᵀȳ, ẋ⟩                                                (1)

where J ẋ comes from elsewhere: forward mode in float64, through a second and plainer way to write
the function, the oracle. The rule's own derivatives, to x and to ȳ, are right if

    ∂⟨Jᵀȳ, v⟩/∂x = H v = d(Jᵀȳ)/dx · v     H: the Hessian of ⟨ȳ, f(x)⟩   (2)
    ∂⟨Jᵀȳ, v⟩/∂ȳ = J v                                                 (3)

the left sides by reverse over reverse, the right side of (2) by forward over reverse.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxgrad.numerics import Axis


def check_rule(
    f: Callable,
    oracle: Callable,
    *args: Any,
    dtypes: Sequence[DTypeLike] | None = None,
    ulps: float = 8,
    per_entry: bool = False,
    order: int = 2,
    residuals: Any = None,
    masked: Mapping[int, ArrayLike] | None = None,
) -> None:
    r"""Check the backward rule of ``f`` against an oracle; raise at the first property it lacks.

    .. math:: \langle \bar y, J \dot x \rangle = \langle J^\top \bar y, \dot x \rangle

    In this order, for random ȳ and ẋ: the value; the gradient, by the inner product above and
    entry by entry; that ``jit`` changes nothing; the residuals; that ``vmap`` over all arguments,
    the first, or the others changes nothing; reverse and forward over reverse; masks.

    Args:
      f: The function under test, of real arrays or pytrees of them. Integers, booleans and None
        among its arguments are held constant. Bind options beforehand, by ``functools.partial``.
      oracle: The same function, written plainly in ``jax.numpy``. It is called with every floating
        argument in float64, under standard promotion; JAX's own derivatives of it are the truth.
      *args: Where to check. Every entry of a floating argument is differentiated.
      dtypes: Cast the floating arguments to each of these in turn; float64 enables x64 for itself.
        The oracle sees the rounded arguments. None: as they are.
      ulps: The error allowed, in units of the last place of the dtype of an output, or of an
        argument for its gradient; four times as much in second order.
      per_entry: Measure an error against its own entry, not against the largest of its array.
      order: 1 leaves second order out.
      residuals: What ``f`` may keep for its backward pass, the leaves of
        ``jax.vjp(f, *args)[1]``: a list of ``jax.ShapeDtypeStruct`` to be met in any order, a
        number of bytes not to be exceeded, or a function of the arguments that returns either.
      masked: By position in ``args``, a boolean array that broadcasts to the argument, True where
        ``f`` must not look: the gradient is 0 there, and NaN or infinity changes nothing.

    Raises:
      AssertionError: A property does not hold; the message names it, the argument and the numbers.
      TypeError: No argument, or no output, is floating.

    Example:
      >>> import jaxgrad
      >>> x = jnp.array([[1.0, 2.0, 4.0], [0.5, 0.0, 3.0]])
      >>> check_rule(jaxgrad.softmax, jax.nn.softmax, x, residuals=[x])
      >>> tanh = jax.custom_vjp(jnp.tanh)
      >>> tanh.defvjp(lambda x: (jnp.tanh(x), None), lambda _, y_bar: (y_bar,))
      >>> check_rule(tanh, jnp.tanh, jnp.array([1.0, 2.0]))
      Traceback (most recent call last):
      AssertionError: tanh: gradient to argument[0], float32[2]
        ⟨ȳ, J ẋ⟩ = 0.0328375 by the oracle, ⟨Jᵀȳ, ẋ⟩ = 0.0666627 by the rule
        at [1]: -0.132105, but -0.00933332 by the oracle: 3.3e+07 ulps where 8 are allowed

    Source: Claerbout (1992), "Earth Soundings Analysis", on adjoint operators: dot-product test.
    """
    for dtype in dtypes or (None,):
        wide = dtype is not None and jnp.dtype(dtype) == np.float64
        with jax.enable_x64(wide or jax.config.read("jax_enable_x64")):
            check = _Check(f, oracle, args, dtype, ulps, per_entry)
            check.gradient()
            if residuals is not None:
                check.residuals(residuals)
            check.vmap()
            if order > 1:
                check.second_order()
            for position, mask in (masked or {}).items():
                check.mask(position, mask, order)


class _Function(NamedTuple):
    """The derivatives of f, its arguments split in two: the floating ones, and the rest."""

    f: Callable

    def outputs(self, x, rest):
        return self.f(*_join(x, rest))

    def vjp(self, x, rest):
        return jax.vjp(lambda x: _split(self.outputs(x, rest))[0], x)

    def pull(self, x, rest, y_bar):
        """y, and x̄ = Jᵀȳ."""
        y, vjp = self.vjp(x, rest)
        return y, vjp(y_bar)[0]

    def pull_twice(self, x, rest, y_bar, v):
        """x̄, then J v and H v, reverse over reverse."""
        x_bar, vjp = jax.vjp(lambda y_bar, x: self.pull(x, rest, y_bar)[1], y_bar, x)
        return x_bar, vjp(v)

    def push(self, x, rest, y_bar, v):
        """y and x̄, then J v and H v, forward over reverse."""
        return jax.jvp(lambda x: self.pull(x, rest, y_bar), (x,), (v,))


class _Check:
    """One rule at one point: x, v, y and ȳ are pytrees, and so is what is compared."""

    def __init__(self, f, oracle, args, dtype, ulps, per_entry):
        self.name = getattr(getattr(f, "func", f), "__name__", repr(f))
        self.ulps, self.axis = ulps, () if per_entry else None
        self.rule = _Function(f)
        self.pull, self.pull_twice = jax.jit(self.rule.pull), jax.jit(self.rule.pull_twice)
        x, rest = _split(jax.tree.map(jnp.asarray, args))
        x = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), x)
        out, self.point = self.run("value", self.rule.outputs, x, rest), (x, rest)
        y = _split(out)[0]
        if not (jax.tree.leaves(x) and jax.tree.leaves(y)):
            raise TypeError(f"check_rule: {self.name} must have a floating argument and output")
        self.names = _names("output", y) + _names("argument", x)
        normal = np.random.default_rng(0).standard_normal
        self.y_bar, self.v = jax.tree.map(lambda z: jnp.asarray(normal(z.shape), z.dtype), (y, x))
        with (
            jax.enable_x64(True),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            self.consult(_Function(oracle), out)

    def consult(self, oracle, out):
        x, rest, y_bar, v = jax.tree.map(_exact, (*self.point, self.y_bar, self.v))
        true = oracle.outputs(x, rest)
        if jax.tree.structure(out) != jax.tree.structure(true):
            self.fail("value", f"{jax.tree.structure(out)}, not {jax.tree.structure(true)}")
        self.agree("value of ", out, true, names=_names("output", out))
        push = jax.jit(oracle.push)
        (_, self.true_x_bar), self.true_second = jax.device_get(push(x, rest, y_bar, v))
        leaves, tree = jax.tree.flatten(v)
        self.terms = []
        for i in range(len(leaves)):  # of ⟨ȳ, J ẋ⟩ in (1), ẋ the part of v in one argument
            x_dot = tree.unflatten([w if i == j else 0 * w for j, w in enumerate(leaves)])
            y_dot = push(x, rest, y_bar, x_dot)[1][0]
            terms = jax.tree.map(lambda a, b: np.ravel(a * b), y_bar, y_dot)
            self.terms.append(np.concatenate(jax.tree.leaves(terms)))

    def gradient(self):
        out = self.run("gradient", self.rule.pull, *self.point, self.y_bar)
        names = _names("gradient to argument", self.v)
        leaves = map(jax.tree.leaves, (out[1], self.v, self.true_x_bar))
        for name, terms, x_bar, x_dot, true in zip(names, self.terms, *leaves, strict=True):
            if x_bar.dtype != x_dot.dtype:
                self.fail(name, f"came as {_kind(x_bar)}")
            pushed, pulled = terms.sum(), np.vdot(_exact(x_bar), _exact(x_dot))
            name += (
                f"\n  ⟨ȳ, J ẋ⟩ = {pushed:.6g} by the oracle, ⟨Jᵀȳ, ẋ⟩ = {pulled:.6g} by the rule"
            )
            self.compare(name, x_bar, true)
            size = np.abs(terms).sum() + np.abs(true).max(initial=0) * np.abs(_exact(x_dot)).sum()
            if not abs(pushed - pulled) <= self.ulps * float(jnp.finfo(x_bar.dtype).eps) * size:
                self.fail(name, "though the entries agree with the oracle's reverse mode")
        jitted = self.run("jit", self.pull, *self.point, self.y_bar)
        self.agree("jit: ", jitted, out, "without")

    def residuals(self, expected: Any):
        expected = expected(*_join(*self.point)) if callable(expected) else expected
        kept = jax.tree.leaves(self.rule.vjp(*self.point)[1])
        told, size = ", ".join(sorted(map(_kind, kept))), sum(leaf.nbytes for leaf in kept)
        if isinstance(expected, int | float):
            right, wanted = size <= expected, f"at most {expected} bytes"
        else:
            wanted = ", ".join(sorted(map(_kind, expected)))
            right = told == wanted
        if not right:
            self.fail("residuals", f"{size} bytes, {told}; not {wanted}")

    def vmap(self):
        """A batch of two: as it is, and with x halved and ȳ reversed."""
        first, tree = jax.tree.flatten(self.point)
        names = _names("argument", self.point[0]) + _names("argument", self.point[1])
        halved = [leaf * 0.5 if _is_floating(leaf) else leaf for leaf in first]
        y_bars = jax.tree.map(lambda y_bar: jnp.stack([y_bar, -y_bar]), self.y_bar)
        each = range(len(first))
        for batched in [each, each[:1], each[1:]] if len(each) > 1 else [each]:
            second = [halved[i] if i in batched else first[i] for i in each]
            pairs = [jnp.stack([first[i], second[i]]) if i in batched else first[i] for i in each]
            axes = [0 if i in batched else None for i in each]
            vmapped = jax.jit(jax.vmap(self.rule.pull, in_axes=(*tree.unflatten(axes), 0)))
            what = "vmap over " + " and ".join(names[i] for i in batched)
            out = self.run(what, vmapped, *tree.unflatten(pairs), y_bars)
            for k, leaves in enumerate([first, second]):
                row, y_bar = jax.tree.map(lambda leaf, k=k: leaf[k], (out, y_bars))
                self.agree(f"{what}: ", row, self.pull(*tree.unflatten(leaves), y_bar), "without")

    def second_order(self):
        for mode, derive in ("reverse", self.pull_twice), ("forward", jax.jit(self.rule.push)):
            second = self.run(f"{mode} over reverse", derive, *self.point, self.y_bar, self.v)[1]
            self.agree(f"{mode} over reverse: ", second, self.true_second, times=4)

    def mask(self, k, mask, order):
        x, rest = self.point
        name, mask = f"masked entries of argument[{k}]", np.broadcast_to(mask, x[k].shape)

        def derivatives(x):
            first = self.rule.pull(x, rest, self.y_bar)  # XLA would repair 0 · NaN
            return first, self.pull_twice(x, rest, self.y_bar, self.v)[1] if order > 1 else first

        clean = derivatives(x)
        self.compare(f"gradient to {name}", jnp.where(mask, clean[0][1][k], 0), 0 * mask, "due", 0)
        for planted in (jnp.nan, jnp.inf):
            now = derivatives((*x[:k], jnp.where(mask, planted, x[k]), *x[k + 1 :]))
            self.agree(f"{planted} in {name}: ", now, clean, "without", 0, 2 * self.names)

    def run(self, what, function, *args):
        try:
            return function(*args)
        except Exception as error:
            self.fail(what, f"raised {type(error).__name__}: {error}", error)

    def agree(self, what, got, want, other="by the oracle", times=1, names=None):
        leaves = jax.tree.leaves(got), jax.tree.leaves(want)
        for name, a, b in zip(names or self.names, *leaves, strict=True):
            self.compare(f"{what}{name}", a, _exact(b), other, times)

    def compare(self, what, got, want, other="by the oracle", times=1):
        if got.shape != want.shape:
            self.fail(what, f"shape {list(got.shape)}, but {list(want.shape)} {other}")
        errors, allowed = errors_in_ulps(got, want, self.axis), times * self.ulps
        if not (errors <= allowed).all():
            at = np.unravel_index(np.argmax(errors), errors.shape)
            numbers = f"{float(got[at]):.6g}, but {float(want[at]):.6g} {other}"
            bar = f"{errors[at]:.2g} ulps where {allowed:g} are allowed"
            self.fail(what, f"at {list(map(int, at))}: {numbers}: {bar}")

    def fail(self, what, how, cause=None) -> NoReturn:
        raise AssertionError(f"{self.name}: {what}\n  {how}") from cause


def errors_in_ulps(got: ArrayLike, want: ArrayLike, axis: Axis = None) -> np.ndarray:
    """Errors of ``got`` in units of the last place, of the largest entry along ``axis``.

    ``want`` may have more digits than float64: ``longdouble``, or objects of mpmath. NaN, infinity
    and overflow must be met. The axis () measures each entry by itself.
    """
    got, want = np.asarray(got), np.asarray(want)
    if not _is_floating(got):
        return np.where(got == want, 0, np.inf)
    info, got = jnp.finfo(got.dtype), _exact(got)
    with np.errstate(all="ignore"):
        apart, want = np.abs(got - want).astype(np.float64), want.astype(np.float64)
    want = np.where(np.abs(want) > float(info.max), np.copysign(np.inf, want), want)
    size = np.nan_to_num(np.abs(want), posinf=0)
    size = size.max(axis, keepdims=True, initial=float(info.tiny))
    ulp = float(info.eps) * 2.0 ** np.floor(np.log2(size))
    met = (got == want) | (np.isnan(got) & np.isnan(want))
    return np.where(np.isfinite(got) & np.isfinite(want), apart / ulp, np.where(met, 0, np.inf))


def _is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _split(tree):
    """The floating leaves of a tree and the others, each with None for what it lacks."""
    floats = jax.tree.map(lambda x: x if _is_floating(x) else None, tree)
    return floats, jax.tree.map(lambda x: None if _is_floating(x) else x, tree)


def _join(x, rest):
    return jax.tree.map(lambda a, b: b if a is None else a, x, rest, is_leaf=lambda a: a is None)


def _exact(x):
    x = np.asarray(x)
    return x.astype(np.float64) if _is_floating(x) else x


def _names(prefix, tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [f"{prefix}{jax.tree_util.keystr(path)}, {_kind(leaf)}" for path, leaf in paths]


def _kind(x):
    return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"
