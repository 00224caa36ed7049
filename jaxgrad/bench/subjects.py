"""What is raced: each kernel in its uses, beside its peers, on random arguments of a shape.

A loss is reduced to its mean, as in training; everything else is pulled back from a cotangent ȳ,
which is drawn too.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import jaxgrad
from jaxgrad import backends
from jaxgrad.bench import peers, torch_peers
from jaxgrad.bench.measure import DENSE, FUSED, INTEGER

OURS = "jaxgrad"
BOTH = "forward", "gradient"
FORWARD = BOTH[:1]
MEAN, LOW_MEMORY, CAPPED, NOT_JITTED = "mean", "low memory", "soft-capped", "not jitted"
Shape = tuple[int, ...]


class Family(NamedTuple):
    """Shapes of one rank: what their axes count, all of them, and the one of a quick run."""

    axes: str
    shapes: tuple[Shape, ...]
    quick: Shape


ROWS = Family(
    "rows,classes",
    ((8, 128), (1024, 1024), (16384, 1024), (512, 32768), (128, 151936)),
    (512, 32768),
)
HEAD = Family(
    "tokens,features,classes",
    (
        (512, 256, 32768),
        (512, 768, 32768),
        (2048, 256, 50257),
        (2048, 768, 32768),
        (2048, 256, 151936),
    ),
    (512, 256, 32768),
)
HEADS = Family(
    "batch,length,heads,features",
    tuple((1, length, 8, 64) for length in (512, 2048, 4096)),
    (1, 2048, 8, 64),
)
SMALL = ROWS._replace(shapes=((8, 128),), quick=(8, 128))
SQUARE = ROWS._replace(shapes=((8, 128), (64, 512)), quick=(64, 512))
ONE_HEAD = HEAD._replace(shapes=HEAD.shapes[:1])


class Subject(NamedTuple):
    """One use of a kernel.

    ``arguments`` are made from (key, shape, dtype); the first ``differentiated`` of them get a
    gradient.
    """

    kernel: str
    variant: str
    family: Family
    arguments: tuple[Callable[[Array, Shape, str], Array], ...]
    contenders: Mapping[str, Callable]
    differentiated: int = 1
    passes: tuple[str, ...] = BOTH
    is_loss: bool = False

    @property
    def name(self) -> str:
        """Unique among all subjects."""
        return f"{self.kernel} ({self.variant})" if self.variant else self.kernel

    @property
    def ours(self) -> Callable:
        """The contender of this package."""
        return self.contenders[OURS]

    def draw(self, shape: Shape, dtype: str) -> tuple[Array, ...]:
        """The arguments, the same in every run on a platform."""
        keys = jax.random.split(jax.random.key(0, impl="rbg"), len(self.arguments))
        pairs = zip(self.arguments, keys, strict=True)
        return tuple(argument(key, shape, dtype) for argument, key in pairs)

    def program(self, function: Callable, what: str) -> Callable:
        """What is timed of a contender: its value, or ``(value, gradients)``.

        The gradient of what is no loss takes one argument more, the cotangent.
        """
        wanted = tuple(range(self.differentiated))
        if self.is_loss:

            def mean(*args):
                losses = function(*args)
                return losses.mean(), losses

            return mean if what == "forward" else jax.value_and_grad(mean, wanted, has_aux=True)
        if what == "forward":
            return function

        def pull(*args):
            *args, y_bar = args
            constants = args[self.differentiated :]
            y, vjp = jax.vjp(lambda *x: function(*x, *constants), *args[: self.differentiated])
            return y, vjp(y_bar.astype(y.dtype))

        return pull


def subjects() -> list[Subject]:
    """All of them, beside the peers that are installed."""
    found = [*_of_rows(), *_of_heads(), *_of_attention()]
    torch = torch_peers.functions()
    return [
        subject._replace(contenders={**subject.contenders, "torch": torch[subject.name]})
        if subject.name in torch
        else subject
        for subject in found
    ]


def _of_rows():
    def of(kernel, arguments, beside, variant="", ours=None, family=ROWS, **options):
        contenders = {OURS: ours or getattr(jaxgrad, kernel), **beside}
        return Subject(kernel, variant, family, arguments, contenders, **options)

    numpy = {
        "softmax_vjp": peers.softmax_vjp,
        "tanh": jnp.tanh,
        "soft_cap": peers.soft_cap,
        "cross_entropy": peers.cross_entropy,
    }
    numpy = {name: {"jax.numpy": function} for name, function in numpy.items()}
    nn, jitted = {"jax.nn": jax.nn.softmax}, {"jax.jit": jax.jit(jax.nn.softmax)}
    jacobian = {"jax.jacrev": jax.vmap(jax.jacrev(jax.nn.softmax))}
    lse, their_lse = (functools.partial(f, axis=-1) for f in (jaxgrad.logsumexp, jax.nn.logsumexp))
    x, z, labels = (_logits,), (_shares, _shares), (_logits, _labels)

    yield of("softmax", x, nn)
    yield of("softmax", x, jitted, NOT_JITTED, family=SMALL, passes=FORWARD)
    yield of("softmax_vjp", (_shares, _normal), numpy["softmax_vjp"], passes=FORWARD)
    yield of("softmax_jacobian", x, jacobian, family=SQUARE, passes=FORWARD)
    yield of("log_softmax", x, {"jax.nn": jax.nn.log_softmax})
    yield of("logsumexp", x, {"jax.nn": their_lse}, ours=lse)
    yield of("tanh", x, numpy["tanh"])
    yield of("soft_cap", (_logits, _cap), numpy["soft_cap"])
    yield of("cross_entropy", z, numpy["cross_entropy"], is_loss=True)

    dense, integer, capped = ({"optax": f} if f else {} for f in peers.losses())
    ours = functools.partial(getattr(jaxgrad, INTEGER), logit_soft_cap=peers.CAP)
    yield of(DENSE, (_logits, _shares), dense, is_loss=True)
    yield of(INTEGER, labels, integer, is_loss=True)
    yield of(INTEGER, labels, capped, CAPPED, ours, is_loss=True)


def _of_heads():
    fused = jaxgrad.linear_softmax_cross_entropy
    mean = functools.partial(fused, reduction="mean")
    log_probs = {"x @ w, jax.nn": peers.log_probs}
    plain = {name: f for name, f in peers.heads().items() if name == "x @ w, optax"}
    for kernel, variant, family, ours, beside in (
        (FUSED, MEAN, HEAD, mean, peers.heads()),
        (FUSED, LOW_MEMORY, HEAD, fused, plain),
        ("linear_log_probs", "", ONE_HEAD, jaxgrad.linear_log_probs, log_probs),
    ):
        yield Subject(
            kernel,
            variant,
            family,
            (_features, _head, _labels),
            {OURS: ours} | beside | _by_name(kernel, ours),
            differentiated=2,
            passes=BOTH[1:],
            is_loss=True,
        )


def _of_attention():
    for variant, causal in ("", False), ("causal", True):
        ours = functools.partial(jaxgrad.dot_product_attention, is_causal=causal)
        name = "dot_product_attention"
        contenders = {OURS: ours} | peers.attention(causal) | _by_name(name, ours)
        yield Subject(name, variant, HEADS, (_normal,) * 3, contenders, differentiated=3)


def _by_name(kernel, ours):
    """What else of this package could run here, was it asked for."""
    chosen = backends.choose(kernel).name
    others = [name for name in ("xla", *backends.made_for_here(kernel)) if name != chosen]
    return {f"{OURS}, {name}": functools.partial(ours, implementation=name) for name in others}


def _normal(key, shape, dtype):
    return jax.random.normal(key, shape).astype(dtype)


def _logits(key, shape, dtype):
    return (3 * jax.random.normal(key, shape)).astype(dtype)


def _shares(key, shape, dtype):
    return jax.nn.softmax(_logits(key, shape, "float32")).astype(dtype)


def _labels(key, shape, dtype):
    return jax.random.randint(key, shape[:1], 0, shape[-1])


def _cap(key, shape, dtype):
    return jnp.asarray(peers.CAP, dtype)


def _features(key, shape, dtype):
    return jax.random.normal(key, shape[:2]).astype(dtype)


def _head(key, shape, dtype):
    return (jax.random.normal(key, shape[1:]) * shape[1] ** -0.5).astype(dtype)
