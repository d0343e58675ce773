"""What the gradient keeps of a layer, and what it computes again."""

from collections.abc import Callable

import jax

from unipic_jax.core.errors import InputError

POLICIES = {
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remat(layer: Callable, policy: str) -> Callable:
    """`layer`, the body of a scan, with a rematerialization policy by name.

    "none" keeps everything; "attention" only the attention's outputs, which cost most to compute
    again; "dots" the results of products with weights; "full" nothing. Raises InputError for
    another name.
    """
    if policy == "none":
        return layer
    if policy not in POLICIES:
        raise InputError(f"remat {policy!r}: choose from none, {', '.join(POLICIES)}")
    return jax.checkpoint(layer, prevent_cse=False, policy=POLICIES[policy])
