"""PyTorch in the race, where it is installed: eager, on the same device and the same numbers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxgrad.bench import peers


class Torch(NamedTuple):
    """A function of tensors, and how a race calls it."""

    function: Callable

    def prepare(
        self, args: Sequence[jax.Array], differentiated: int, what: str, is_loss: bool
    ) -> Callable[[], Any]:
        """A call that ends when its work is done; the last argument is the cotangent, if any."""
        torch: Any = peers.load("torch")
        tensors = [torch.from_dlpack(a) for a in args]
        tensors = [t if t.is_floating_point() else t.long() for t in tensors]

        def call():
            with torch.set_grad_enabled(what == "gradient"):
                y_bar = None if is_loss or what == "forward" else tensors[-1]
                inputs = tensors if y_bar is None else tensors[:-1]
                leaves = [t.detach().requires_grad_() for t in inputs[:differentiated]]
                each = y = self.function(*leaves, *inputs[differentiated:])
                if is_loss:
                    y = y.mean()
                gradients = ()
                if what == "gradient":
                    gradients = torch.autograd.grad(y, leaves, y_bar)
            if y.is_cuda:
                torch.cuda.synchronize()
            value = (y, each) if is_loss else y
            return (value, gradients) if what == "gradient" else value

        return call


@functools.cache
def functions() -> dict[str, Torch]:
    """By the name of the kernel; none where PyTorch is not installed."""
    torch: Any = peers.load("torch")
    if torch is None:
        return {}
    of = torch.nn.functional
    loss = functools.partial(of.cross_entropy, reduction="none")

    def attention(q, k, v, is_causal=False):
        heads_first = (z.transpose(1, 2) for z in (q, k, v))
        return of.scaled_dot_product_attention(*heads_first, is_causal=is_causal).transpose(1, 2)

    def soft_cap(x, cap):
        return cap * torch.tanh(x / cap)

    table = {
        "softmax": lambda x: of.softmax(x, -1),
        "log_softmax": lambda x: of.log_softmax(x, -1),
        "logsumexp": lambda x: torch.logsumexp(x, -1),
        "tanh": torch.tanh,
        "soft_cap": soft_cap,
        "cross_entropy": lambda z, t: -torch.special.xlogy(t, z).sum(-1),
        "softmax_cross_entropy": loss,
        "softmax_cross_entropy_with_integer_labels": loss,
        "softmax_cross_entropy_with_integer_labels (soft-capped)": lambda x, t: loss(
            soft_cap(x, peers.CAP), t
        ),
        "linear_softmax_cross_entropy (mean)": lambda x, w, t: loss(x @ w, t),
        "dot_product_attention": attention,
        "dot_product_attention (causal)": functools.partial(attention, is_causal=True),
    }
    return {name: Torch(function) for name, function in table.items()}
