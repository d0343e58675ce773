"""What a chip has, by generation.

TPUs: Google Cloud's documentation of each (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x).
It gives the interconnect of a chip over all links, of v5p and later both ways; one way is here.
The matrix units are 128 wide, from v6e on 256 (jax-ml.github.io/scaling-book).
"""

from typing import NamedTuple

from unipic_jax.core.errors import InputError


class Chip(NamedTuple):
    name: str
    flops: float  # bfloat16, a second
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes a second
    interconnect: float  # bytes a second one way, over all links
    network: float  # bytes a second one way to other slices, of its host's network
    width: int  # of the matrix unit
    devices: int = 1  # that JAX sees


GB, GiB = 1e9, 2**30

CHIPS = {chip.name: chip for chip in (
    Chip("v4", 275e12, 32 * GiB, 1200 * GB, 270 * GB, 6.25 * GB, 128),
    Chip("v5e", 197e12, 16 * GiB, 819 * GB, 200 * GB, 3.125 * GB, 128),
    Chip("v5p", 459e12, 95 * GiB, 2765 * GB, 600 * GB, 6.25 * GB, 128),
    Chip("v6e", 918e12, 32 * GiB, 1640 * GB, 400 * GB, 12.5 * GB, 256),
    Chip("tpu7x", 2307e12, 192 * GiB, 7380 * GB, 600 * GB, 12.5 * GB, 256, devices=2))}


def find(topology: str) -> Chip:
    """The chip of a topology such as v5p:4x4x4; InputError for another generation."""
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise InputError(f"topology {topology!r}: give GENERATION:SHAPE such as v5p:4x4x4, with "
                         f"the generation one of {', '.join(CHIPS)}; or cpu:N")
    return CHIPS[name]
