"""What the gradient keeps of a layer, and what it computes again."""

from collections.abc import Callable

import jax

from unipic_jax.core.errors import InputError

ATTENTION = "attention"  # the name of what an attention gives, and of what its gradient needs


def _cudnn(primitive, *_, **__) -> bool:
    """The kernel of GPUs gives no names to what its gradient needs."""
    return primitive.name.startswith("dot_product_attention_fwd")


_policies = jax.checkpoint_policies
POLICIES = {
    "attention": _policies.save_from_both_policies(
        _policies.save_only_these_names(ATTENTION), _cudnn),
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "full": _policies.nothing_saveable,
}


def remat(layer: Callable, policy: str) -> Callable:
    """`layer`, the body of a scan, with a rematerialization policy by name.

    "none" keeps everything; "attention" only the attention's outputs, which cost most to compute
    again, and with fused kernels the rest of what their gradients need; "dots" the results of
    products with weights; "full" nothing. Raises InputError for another name.
    """
    if policy == "none":
        return layer
    if policy not in POLICIES:
        raise InputError(f"remat {policy!r}: choose from none, {', '.join(POLICIES)}")
    return jax.checkpoint(layer, prevent_cse=False, policy=POLICIES[policy])
