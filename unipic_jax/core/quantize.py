"""Frozen weights as integers of eight bits with a scale a column: half of bfloat16's memory, and
half of what is gathered. By qwix, which only those need who ask for it."""

import jax
import jax.numpy as jnp

from unipic_jax.core import mesh as meshes
from unipic_jax.core import params
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree


def quantize(tree: Tree) -> Tree:
    """The tree with its kernels [(L,) D_in, D_out] as int8; all else as it was.

    A column's scale is that of its largest weight, so that no weight is off by more than a 254th
    of that. Raises InputError where qwix is not installed.
    """
    qwix = _qwix()

    def one(path, w):
        if not _is_kernel(path, w):
            return w
        columns = [axis for axis in range(w.ndim) if axis != w.ndim - 2]
        return qwix.quantize(w, jnp.int8, channelwise_axes=columns, scale_dtype=jnp.float32)

    return jax.tree.map_with_path(one, tree)


def abstract(specs: Tree, dtype, mesh=None) -> Tree:
    """`quantize` of the parameters of these specs as shapes and, with a mesh, shardings."""
    def sharded(array, axes):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=mesh and meshes.sharding(
            mesh, array.shape, axes))

    def one(path, spec):
        if not _is_kernel(path, spec):
            return params.abstract(spec, dtype, mesh)
        made = jax.eval_shape(quantize, {"kernel": params.abstract(spec, dtype)})["kernel"]
        scales = (*spec.axes[:-2], None, spec.axes[-1])
        return made.replace(qvalue=sharded(made.qvalue, spec.axes),
                            scale=sharded(made.scale, scales))

    return jax.tree.map_with_path(one, specs, is_leaf=params.is_spec)


def dense(kernel, dtype) -> jax.Array:
    """A kernel in `dtype`, whether it is quantized or not; if so, all of it along `fsdp`, for as
    integers it is less to gather."""
    if hasattr(kernel, "qvalue"):
        return _qwix().dequantize(jax.tree.map(meshes.gather, kernel)).astype(dtype)
    return kernel.astype(dtype)


def _is_kernel(path, array):
    return path[-1].key == "kernel" and len(array.shape) in (2, 3)


def _qwix():
    try:
        import qwix
    except ImportError:
        raise InputError("int8 weights need qwix: pip install 'unipic_jax[int8]'") from None
    return qwix
