"""The floating-point operations that a program carries out, counted from its jaxpr.

Loops count as often as they run, what is computed again for the backward counts again, what
nothing needs does not, and the kernels that XLA's cost analysis does not see into count by their
grid.
"""

import math
from typing import NamedTuple

from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr


class Operations(NamedTuple):
    """Of one run of a program on all devices together."""

    total: float  # 2mnk a product of [m, k] and [k, n], and as many a convolution
    padded: float  # the same with k and n rounded up to the width of the matrix unit

    def __add__(self, other):
        return Operations(*(a + b for a, b in zip(self, other)))

    def times(self, factor: float) -> "Operations":
        return Operations(*(a * factor for a in self))


def operations(jaxpr: core.ClosedJaxpr, width: int) -> Operations:
    """Of a program, for a matrix unit of `width` x `width`; of branches the costliest."""
    needed, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _of_jaxpr(needed, width)


def _of_jaxpr(jaxpr, width) -> Operations:
    return sum((_of_equation(e, width) for e in jaxpr.eqns), Operations(0.0, 0.0))


def _of_equation(e, width) -> Operations:
    name = e.primitive.name
    if name == "dot_general":
        return _product(e, width)
    if name == "conv_general_dilated":
        return _convolution(e, width)
    if name == "pallas_call":
        return _of_jaxpr(e.params["jaxpr"], width).times(math.prod(e.params["grid_mapping"].grid))
    inner = [sub for value in e.params.values() for sub in _jaxprs(value)]
    if not inner:
        return Operations(0.0, 0.0)
    each = [_of_jaxpr(sub, width) for sub in inner]
    if name == "cond":
        return max(each)
    found = sum(each, Operations(0.0, 0.0))
    if name == "scan":
        return found.times(e.params["length"])
    if name == "shard_map":
        manual = e.params["mesh"].shape
        return found.times(math.prod(manual[axis] for axis in e.params["newly_manual_axes"]))
    return found


def _jaxprs(value):
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _jaxprs(item)


def _product(e, width):
    (contracted, _), (batch, _) = e.params["dimension_numbers"]
    left, right = (v.aval.shape for v in e.invars)
    k = math.prod(left[d] for d in contracted)
    b = math.prod(left[d] for d in batch)
    m, n = (math.prod(shape) // (k * b) for shape in (left, right))
    return _sized(b, m, k, n, width)


def _convolution(e, width):
    numbers = e.params["dimension_numbers"]
    kernel, out = e.invars[1].aval.shape, e.outvars[0].aval.shape
    n, k = kernel[numbers.rhs_spec[0]], math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    return _sized(1, math.prod(out) // n, k, n, width)


def _sized(b, m, k, n, width):
    def padded(size):
        return -(-size // width) * width

    # The smaller of m and n may be the one that lies across the unit.
    waste = padded(k) / k * min(padded(n) / n, padded(m) / m)
    total = 2.0 * b * m * k * n
    return Operations(total, total * waste)
