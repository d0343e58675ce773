"""The transformers that training is timed on and what goes into them, for both programs."""

from typing import NamedTuple

import numpy as np

from benchmarks.speed import TRANSFORMER, jax_weights, normal, value


class Net(NamedTuple):
    """A transformer's config, and how it is used."""

    config: dict
    side: int  # of the latents
    text: int  # tokens
    dtype: str = "float32"  # that it computes in; what trains is in float32
    remat: bool = False  # keep the attention's outputs alone (PyTorch: the inputs of each block)

    def latents(self, seed: int, size: int) -> np.ndarray:
        """Standard normal [B, C, h, w], as PyTorch has them."""
        return normal(seed, size, self.config["in_channels"], self.side, self.side)

    def condition(self, size: int) -> dict[str, np.ndarray]:
        """Context [B, S, D] and pooled [B, D]."""
        return {"context": normal(2, size, self.text, self.config["joint_attention_dim"]),
                "pooled": normal(3, size, self.config["pooled_projection_dim"])}


NANO = Net(dict(
    num_layers=4, attention_head_dim=64, num_attention_heads=2, in_channels=4, out_channels=4,
    patch_size=2, joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=128,
    pos_embed_max_size=8, dual_attention_layers=(0, 1), sample_size=16), side=12, text=48)
FULL = Net(TRANSFORMER | {"num_layers": 24, "dual_attention_layers": tuple(range(13))},
           side=64, text=333, dtype="bfloat16", remat=True)  # 512 pixels


def in_jax(net: Net, dtype: str):
    """(config, weights in that type on all devices, velocity), under a mesh of a device for each
    of a CPU's cores, or of the GPUs.

    velocity(weights, x, timestep, **condition), as `mmdit.apply`.
    """
    import functools
    import os

    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from unipic_jax.core import mesh as meshes
    from unipic_jax.models import mmdit

    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    jax.set_mesh(meshes.make(data=-1, fsdp=1))
    cfg = mmdit.Config(**net.config)
    weights = jax.device_put(jax_weights(mmdit, cfg, jnp.dtype(dtype)), P())
    return cfg, weights, functools.partial(
        mmdit.apply, cfg, dtype=jnp.dtype(net.dtype), remat="attention" if net.remat else "none")


def in_torch(net: Net, dtype: str):
    """(model with weights in that type, device, what it runs under), on all cores or a GPU."""
    import os

    import torch

    from benchmarks.reference import KontextTransformer

    torch.set_num_threads(os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = KontextTransformer(**net.config, qk_norm="rms_norm")
    with torch.no_grad():
        for name, p in model.state_dict().items():
            p.copy_(torch.from_numpy(value(name, tuple(p.shape)).astype(np.float32)))
    if net.remat:
        model.enable_gradient_checkpointing()
    kind = getattr(torch, net.dtype)
    under = torch.autocast(device, kind, enabled=kind != torch.float32)
    return model.to(device, getattr(torch, dtype)), device, under
