"""One declaration a weight, and everything that is derived from it.

A model declares its weights as a tree (nested dicts) of `Spec`. Parameters, shapes without
memory, shardings, counts and the converters' shape checks all come from that tree.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from unipic_jax.core import mesh as meshes

Tree = Any  # nested dicts with one kind of leaf


@dataclasses.dataclass(frozen=True)
class Spec:
    """A weight: its shape, the role of each axis (see `core.mesh.RULES`) and its initializer.

    A buffer is stored with the weights and never trained.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable = jax.nn.initializers.zeros
    buffer: bool = False

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def is_spec(x) -> bool:
    return isinstance(x, Spec)


def linear(
    d_in: int, d_out: int, axes: tuple[str | None, str | None], *, bias: bool = True, init=None
) -> dict[str, Spec]:
    """Specs of a dense layer: kernel [d_in, d_out] and, unless told otherwise, bias [d_out]."""
    kernel = Spec((d_in, d_out), axes, init or jax.nn.initializers.lecun_normal())
    return {"kernel": kernel, "bias": Spec((d_out,), axes[1:])} if bias else {"kernel": kernel}


def conv(d_in: int, d_out: int, side: int) -> dict[str, Spec]:
    """Specs of a convolution: kernel [side, side, d_in, d_out], bias [d_out]."""
    kernel = Spec((side, side, d_in, d_out), (None, None, "embed", None),
                  jax.nn.initializers.lecun_normal())
    return {"kernel": kernel, "bias": Spec((d_out,), (None,))}


def norm(d: int, *, bias: bool = True) -> dict[str, Spec]:
    """Specs of a normalization's scale [d] (ones) and, unless told otherwise, bias [d]."""
    scale = Spec((d,), (None,), jax.nn.initializers.ones)
    return {"scale": scale, "bias": Spec((d,), (None,))} if bias else {"scale": scale}


def stack(specs: Tree, layers: int) -> Tree:
    """The same weights for `layers` equal layers, stacked on a new leading axis for `lax.scan`."""

    def one(s: Spec) -> Spec:
        def init(key, shape, dtype):
            # Layer by layer, so that an initializer's fan-in does not count the stack.
            return jax.vmap(lambda k: s.init(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

        return Spec((layers, *s.shape), ("layers", *s.axes), init)

    return jax.tree.map(one, specs, is_leaf=is_spec)


def whole(specs: Tree) -> Tree:
    """The same weights, none of them split along `fsdp`."""
    def one(s: Spec) -> Spec:
        return dataclasses.replace(s, axes=tuple(
            None if meshes.RULES[a] == "fsdp" else a for a in s.axes))

    return jax.tree.map(one, specs, is_leaf=is_spec)


def init(specs: Tree, key: jax.Array, dtype=jnp.float32) -> Tree:
    """Fresh parameters; wrap in `jax.jit(..., out_shardings=shardings(specs, mesh))` on a mesh."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([s.init(k, s.shape, dtype) for s, k in zip(leaves, keys)])


def abstract(specs: Tree, dtype=jnp.float32, mesh=None) -> Tree:
    """Shapes and, with a mesh, shardings of the parameters, without memory."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, dtype, sharding=mesh and meshes.sharding(mesh, s.shape, s.axes)),
        specs, is_leaf=is_spec)


def shardings(specs: Tree, mesh) -> Tree:
    """The `NamedSharding` of each parameter on `mesh`."""
    return jax.tree.map(
        lambda s: meshes.sharding(mesh, s.shape, s.axes), specs, is_leaf=is_spec)


def split_buffers(specs: Tree, tree: Tree) -> tuple[Tree, Tree]:
    """What trains of a tree with the structure of `specs`, and its buffers."""
    kinds = traverse_util.flatten_dict(specs, is_leaf=lambda _, s: is_spec(s))
    leaves = traverse_util.flatten_dict(tree, is_leaf=lambda _, s: is_spec(s))
    sides = ({p: a for p, a in leaves.items() if kinds[p].buffer == side} for side in (False, True))
    return tuple(map(traverse_util.unflatten_dict, sides))


def union(a: Tree, b: Tree) -> Tree:
    """The leaves of two trees that share none, as one tree."""
    return traverse_util.unflatten_dict(
        traverse_util.flatten_dict(a) | traverse_util.flatten_dict(b))


def count(specs: Tree) -> int:
    """Number of parameters."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))
