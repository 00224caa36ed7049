"""Every kernel passes the check that jaxgrad offers for rules, beside its formula in plain JAX."""

import functools

import pytest
from cases import KERNELS
from formulas import PLAIN

from jaxgrad.testing import check_rule

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_rule(kernel):
    args, held = kernel.arguments("float32"), ()
    if kernel.name == "softmax_vjp":  # of y, only what keeps its sum is meant to be a direction
        held, args = args[:1], args[1:]

    def oracle(*args):
        named = dict(zip(kernel.makers, held + args, strict=True))
        return PLAIN[kernel.name](**named, **kernel.options)

    masks = [~a for a in args if a.dtype == bool]
    check_rule(
        functools.partial(kernel.function, *held),
        oracle,
        *args,
        ulps=32,  # the gradient to a scalar is a sum that cancels
        order=1,  # test_transforms has the second, in 50 digits
        masked={0: masks[0]} if masks else None,
    )
