"""Low-rank adapters (Hu et al. 2021): x W + scale (x A) B, where A and B train and W does not.

Adapters are a tree of their own, with the paths of the layers they adapt. `scale` is alpha / rank.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
from flax import traverse_util

from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Spec, Tree, is_spec, union


def specs(base: Tree, targets: Iterable[str], rank: int) -> Tree:
    """Specs of the adapters of the dense layers, stacked or not, that `targets` name.

    A target is a pattern of a layer's path, as "*/image/[qkv]"; "*" passes over "/". A layer gets
    lora_a [.., D_in, r], normal with deviation 1/r (PEFT's "gaussian"), and lora_b [.., r, D_out],
    zeros. Raises InputError where the rank is not positive or a target names no dense layer.
    """
    if rank < 1:
        raise InputError(f"the rank of an adapter is {rank}; it has to be 1 or more")
    kernels = {path[:-1]: spec for path, spec in traverse_util.flatten_dict(
        base, is_leaf=lambda _, s: is_spec(s)).items() if path[-1] == "kernel" and _is_dense(spec)}
    tree = {}
    for target in targets:
        named = [path for path in kernels if fnmatchcase("/".join(path), target)]
        if not named:
            raise InputError(f"no dense layer is called {target!r}; there is "
                             f"{', '.join(sorted('/'.join(p) for p in kernels))}")
        for path in named:
            (*stack, d_in, d_out), (*axes, a_in, a_out) = kernels[path].shape, kernels[path].axes
            tree[*path, "lora_a"] = Spec((*stack, d_in, rank), (*axes, a_in, None),
                                         jax.nn.initializers.normal(1 / rank))
            tree[*path, "lora_b"] = Spec((*stack, rank, d_out), (*axes, None, a_out))
    return traverse_util.unflatten_dict(tree)


def _is_dense(kernel: Spec) -> bool:
    return len(kernel.shape) == 2 + (kernel.axes[0] == "layers")


def join(params: Tree, adapters: Tree, scale: float) -> Tree:
    """Parameters whose adapted layers hold lora_a and scale * lora_b, for `ops.linear` to apply."""
    return union(params, jax.tree.map_with_path(
        lambda path, a: scale * a if path[-1].key == "lora_b" else a, adapters))


def merge(params: Tree, adapters: Tree, scale: float) -> Tree:
    """Parameters with kernel + scale * lora_a @ lora_b in the kernels' place, summed in float32."""
    merged, flat = traverse_util.flatten_dict(params), traverse_util.flatten_dict(adapters)
    for path in {p[:-1] for p in flat}:
        kernel = merged[*path, "kernel"]
        a, b = (jnp.asarray(flat[*path, n], jnp.float32) for n in ("lora_a", "lora_b"))
        update = jnp.einsum("...dr,...rf->...df", a, b, precision="highest")
        merged[*path, "kernel"] = (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)
    return traverse_util.unflatten_dict(merged)
