r"""Products of a vector with the curvature of a loss; no matrix of it is ever formed.

For logits z of a row, p = σ(z) and targets that sum to one, the Hessian of the cross-entropy is

    ∂²l / ∂z²   = diag(p) - p pᵀ                                       (1)

the Jacobian of soft-max: symmetric, positive semi-definite, and free of the targets. Of logits
z(θ) with Jacobian J, the loss has the Hessian

    ∂²l / ∂θ²   = Jᵀ (∂²l / ∂z²) J + Σ_i (∂l / ∂z_i) ∂²z_i / ∂θ²       (2)

and its first term is the Gauss-Newton matrix: as (1) semi-definite, which conjugate gradients ask
for. Where z is linear in θ the second term is 0. The gradient of the loss is Jᵀ (∂l/∂z), and the
derivative of it along θ̇, with Jᵀ held constant, is the Gauss-Newton matrix times θ̇.
"""

from typing import Any, Literal

import jax
from jax import Array
from jax.typing import ArrayLike

from jaxgrad import modes
from jaxgrad.kernels.linear_labels import SparseLabels
from jaxgrad.kernels.linear_softmax_cross_entropy import linear_softmax_cross_entropy
from jaxgrad.kernels.softmax import softmax, softmax_vjp
from jaxgrad.numerics import Axis


def softmax_cross_entropy_hvp(
    logits: ArrayLike, tangent: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""The Hessian of the soft-max cross-entropy by its logits, times a vector.

    .. math:: (\operatorname{diag}(p) - p p^\top)\, v, \qquad p = \sigma(z)

    It is that of every target that sums to one: the integer labels too, smoothed or not.

    Args:
      logits: z, ``float[..., n, ...]``.
      tangent: v, of the shape of ``logits``.
      axis: The axis or axes of the classes; None for all.
      where: ``bool``, broadcastable to ``logits``: the classes that take part.

    Returns:
      The product, with the shape and dtype of ``logits``; it sums to 0 along ``axis``.

    Raises:
      TypeError: An argument is complex.
      ValueError: The shapes differ, or ``axis`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> print(softmax_cross_entropy_hvp(jnp.zeros(2), jnp.array([4.0, 0.0])))
      [ 1. -1.]

    See also:
      :func:`linear_softmax_cross_entropy_gnvp`, where the logits are those of a linear layer.
    """
    return softmax_vjp(softmax(logits, axis, where), tangent, axis)  # (1)


def linear_softmax_cross_entropy_gnvp(
    primals: tuple[ArrayLike, ...],
    tangents: tuple[ArrayLike | None, ...],
    labels: ArrayLike | SparseLabels,
    where: ArrayLike | None = None,
    *,
    reduction: Literal["sum", "mean"] = "mean",
    **options: Any,
) -> tuple[Array | None, ...]:
    r"""The Gauss-Newton matrix of :func:`linear_softmax_cross_entropy`, times a vector.

    .. math:: J^\top \Big(\frac{\partial^2 l}{\partial z^2}\Big) J\, \dot\theta, \qquad
              z = x w + b, \quad \theta = (x, w, b)

    The logits and their tangents are made tile by tile, as in the loss, at twice its memory: never
    tokens × classes. To multiply by the matrix of a whole network, push θ̇ forward to x by
    :func:`jax.jvp`, and pull the first result back by :func:`jax.vjp`.

    Args:
      primals: (x, w) or (x, w, bias), as the loss takes them.
      tangents: As many, each of the shape of its primal, or None for one that is held constant.
      labels: As the loss takes them. The matrix depends on their sum, and on which are ignored.
      where: The valid classes.
      reduction: "sum" or "mean", over the tokens.
      **options: The other options of the loss. With ``logit_soft_cap`` the matrix need not be
        semi-definite.

    Returns:
      The product, a part for each primal, in its shape and dtype; None for one held constant.

    Raises:
      ValueError: The numbers of primals and tangents differ, or no tangent is given; and as the
        loss.

    Example:
      Logistic regression of scikit-learn's handwritten digits. Five Newton steps, each by at most
      twenty conjugate gradients, leave 300 steps of gradient descent behind, which are as long as
      the curvature allows:

      >>> import jax.numpy as jnp, jaxgrad
      >>> from sklearn.datasets import load_digits
      >>> x, digits = map(jnp.asarray, load_digits(return_X_y=True))
      >>> x, decay = x.astype("float32") / 16, 1e-3
      >>> def objective(w):
      ...     loss = jaxgrad.linear_softmax_cross_entropy(x, w, digits, reduction="mean")
      ...     return loss + decay / 2 * (w * w).sum()
      >>> def newton(w, _):
      ...     def curved(v):
      ...         return linear_softmax_cross_entropy_gnvp((x, w), (None, v), digits)[1] + decay * v
      ...     step, _ = jax.scipy.sparse.linalg.cg(curved, jax.grad(objective)(w), maxiter=20)
      ...     return w - step, None
      >>> bound = jnp.linalg.norm(x, 2) ** 2 / (2 * len(x)) + decay
      >>> def descent(w, _):
      ...     return w - jax.grad(objective)(w) / bound, None
      >>> def reached(step, steps):
      ...     return objective(jax.lax.scan(step, jnp.zeros((64, 10)), length=steps)[0])
      >>> print(reached(newton, 5) < 0.9 * reached(descent, 300))
      True

    Source:
      Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", 2002;
      Martens, "Deep Learning via Hessian-free Optimization", 2010.
    """
    if len(primals) != len(tangents) or all(v is None for v in tangents):
        raise ValueError(
            f"linear_softmax_cross_entropy_gnvp: tangents must be {len(primals)}, one for each "
            f"primal, and not None throughout, got {tangents}"
        )
    moving = tuple(i for i, v in enumerate(tangents) if v is not None)

    def loss(*primals):
        x, w, *bias = primals
        head: Any = modes.gauss_newton(linear_softmax_cross_entropy)
        return head(x, w, labels, *(bias or [None]), where, reduction=reduction, **options)

    def gradient(*of_moving):
        given = dict(zip(moving, of_moving, strict=True))
        full = (given.get(i, primal) for i, primal in enumerate(primals))
        return jax.grad(loss, moving)(*full)

    pick = lambda values: tuple(values[i] for i in moving)
    products = jax.jvp(gradient, pick(primals), pick(tangents))[1]  # (2)
    of = dict(zip(moving, products, strict=True))
    return tuple(of.get(i) for i in range(len(primals)))
