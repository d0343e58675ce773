"""The device mesh, and the one table that says which mesh axis carries which role.

Meshes have three explicit axes: `data` (replicas of the parameters; slices of a pod), `fsdp`
(parameters sharded, gathered layer by layer) and `tensor` (heads and feed-forward split).
The batch is spread over `data` and `fsdp`.
"""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

RULES = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}


def make(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
    """A mesh over `devices` (all by default); one size may be -1, for what remains.

    Where the devices are those of several slices of TPU pods, `data` runs over slices first, so
    that only gradients and replicas go between them. Raises ValueError where the sizes do not
    multiply to the number of devices, or the slices do not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        known = -data * fsdp * tensor
        sizes[sizes.index(-1)] = len(devices) // known if known > 0 else 0
    if sizes[0] * sizes[1] * sizes[2] != len(devices):
        raise ValueError(f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit "
                         f"{len(devices)} devices; choose sizes whose product is that number")
    types = (AxisType.Explicit,) * 3
    # GPUs count hosts as slices, over which parameters may well be split.
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    if slices <= 1:
        try:
            return jax.make_mesh(tuple(sizes), AXES, types, devices=devices)
        except NotImplementedError:  # a size that no whole axes of the torus make, as 16 of 8x8
            return jax.sharding.Mesh(mesh_utils.create_device_mesh(
                sizes, devices, allow_split_physical_axes=True), AXES, types)
    if sizes[0] % slices:
        raise ValueError(f"{slices} slices need a mesh whose data axis they divide; it is "
                         f"{sizes[0]}: --config.mesh.data={slices}")
    return jax.sharding.Mesh(mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices), AXES, types)


def sharding(mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
    """Where a weight of this shape and these roles lies; axes that do not divide are replicated."""
    names = [RULES[a] for a in axes]
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes))
    return NamedSharding(mesh, P(*(
        n if n is not None and d % sizes[n] == 0 else None for n, d in zip(names, shape))))


def batch_sharding(mesh, rank: int) -> NamedSharding:
    """Where an array lies whose leading axis is the batch."""
    return NamedSharding(mesh, P(BATCH, *[None] * (rank - 1)))


def on_host(x: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process; all of them call it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def spec_of(x) -> P | None:
    """The partition of a value under trace, one entry an axis; None where no mesh is set."""
    s = jax.typeof(x).sharding
    if s.mesh.empty or not s.mesh.are_all_axes_explicit:
        return None
    return P(*s.spec, *[None] * (x.ndim - len(s.spec)))


def platform() -> str:
    """What a program under trace is for: the mesh's devices, which need not be here, or else the
    default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def gather(w: jax.Array) -> jax.Array:
    """All of a weight along `fsdp`; called where the weight is used, so that inside a scanned
    layer no more than that layer is ever whole."""
    spec = spec_of(w)
    if spec is None or not any(a == "fsdp" for a in spec):
        return w
    return jax.reshard(w, P(*(None if a == "fsdp" else a for a in spec)))


def summed(product: Callable, x: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
    """product(x, g), the gradient of a weight w and a sum over rows, lying as w does.

    Over `fsdp` each device gets the sum of its own part alone, and of that the sum over `data`:
    half of what crosses between devices where all of it is summed everywhere.
    """
    spec, rows = spec_of(w), axes_of_rows(x)
    if "fsdp" not in rows or "fsdp" not in spec:
        return product(x, g, out_sharding=spec)

    def local(x, g):
        own = lax.psum_scatter(product(x, g), "fsdp", scatter_dimension=spec.index("fsdp"),
                               tiled=True)
        return lax.psum(own, tuple(rows - {"fsdp"}))

    return jax.shard_map(local, out_specs=spec)(x, g)


def whole_rows(x: jax.Array) -> jax.Array:
    """x [B, ...] split along its batch alone."""
    spec = spec_of(x)
    return x if spec is None else jax.reshard(x, P(spec[0], *[None] * (x.ndim - 1)))


def axes_of_rows(x: jax.Array) -> set[str]:
    """The axes of the mesh over which the leading axis of x is split."""
    spec = spec_of(x)
    names = spec[0] if spec else None
    return {names} if isinstance(names, str) else {*(names or ())}


def row_parts(x: jax.Array) -> int:
    """Over how many devices the leading axis of x is split."""
    sizes = dict(jax.typeof(x).sharding.mesh.shape)
    return math.prod(sizes[axis] for axis in axes_of_rows(x))


def replicate(w: jax.Array) -> jax.Array:
    """All of a weight on every device."""
    spec = spec_of(w)
    return w if spec is None or all(a is None for a in spec) else jax.reshard(w, P())
