"""The 16-channel autoencoder (`AutoencoderKL` of diffusers): pictures to latents and back.

One downsampling fewer than levels, so the spatial factor is 2 ** (levels - 1).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from unipic_jax.core import config, ops
from unipic_jax.core.attention import attention
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree, conv, linear, norm

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    """The autoencoder's `config.json`, under its own names."""

    block_out_channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    in_channels: int = 3
    out_channels: int = 3

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "Config":
        cfg = config.parse(
            cls, raw, where,
            fixed={"act_fn": ("silu",), "use_quant_conv": (False,), "use_post_quant_conv": (False,),
                   "mid_block_add_attention": (True,), "latents_mean": (None,),
                   "latents_std": (None,)},
            ignored=("sample_size", "force_upcast", "down_block_types", "up_block_types"),
            signed=("shift_factor",))
        for key, kind in (("down_block_types", "DownEncoderBlock2D"),
                          ("up_block_types", "UpDecoderBlock2D")):
            if raw.get(key) != [kind] * len(cfg.block_out_channels):
                raise InputError(f"{where}: {key} must be {kind} for each of the "
                                 f"{len(cfg.block_out_channels)} levels")
        for key in ("use_quant_conv", "use_post_quant_conv"):  # true where a config leaves it out
            if key not in raw:
                raise InputError(f"{where}: key {key!r} is missing")
        if any(c % cfg.norm_num_groups for c in cfg.block_out_channels):
            raise InputError(f"{where}: norm_num_groups = {cfg.norm_num_groups} does not divide "
                             f"block_out_channels {list(cfg.block_out_channels)}")
        return cfg

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@flax.struct.dataclass
class Posterior:
    """A diagonal normal over latents: mean and log-variance [B, h, w, C], before scaling."""

    mean: jax.Array
    logvar: jax.Array

    def sample(self, noise: jax.Array) -> jax.Array:
        """The latents that standard normal `noise` [B, h, w, C] draws."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


def _resnet(d_in: int, d_out: int) -> Tree:
    specs = {"norm1": norm(d_in), "conv1": conv(d_in, d_out, 3),
             "norm2": norm(d_out), "conv2": conv(d_out, d_out, 3)}
    return specs | {"shortcut": conv(d_in, d_out, 1)} if d_in != d_out else specs


def _middle(d: int) -> Tree:
    attn = {n: linear(d, d, ("embed", None)) for n in ("q", "k", "v", "out")}
    return {"resnet1": _resnet(d, d), "attention": {"norm": norm(d)} | attn,
            "resnet2": _resnet(d, d)}


def _level(d_in: int, d_out: int, resnets: int, resample: bool) -> Tree:
    specs = {"resnets": {str(i): _resnet(d_in if i == 0 else d_out, d_out)
                         for i in range(resnets)}}
    return specs | {"resample": conv(d_out, d_out, 3)} if resample else specs


def specs(cfg: Config) -> Tree:
    """The weights. Levels differ in width, so they are not stacked."""
    widths, n = cfg.block_out_channels, len(cfg.block_out_channels)
    down = zip((widths[0], *widths), widths, strict=False)
    up = zip((widths[-1], *widths[::-1]), widths[::-1], strict=False)
    return {
        "encoder": {
            "conv_in": conv(cfg.in_channels, widths[0], 3),
            "levels": {str(i): _level(a, b, cfg.layers_per_block, i < n - 1)
                       for i, (a, b) in enumerate(down)},
            "middle": _middle(widths[-1]),
            "norm_out": norm(widths[-1]),
            "conv_out": conv(widths[-1], 2 * cfg.latent_channels, 3),
        },
        "decoder": {
            "conv_in": conv(cfg.latent_channels, widths[-1], 3),
            "middle": _middle(widths[-1]),
            "levels": {str(i): _level(a, b, cfg.layers_per_block + 1, i < n - 1)
                       for i, (a, b) in enumerate(up)},
            "norm_out": norm(widths[0]),
            "conv_out": conv(widths[0], cfg.out_channels, 3),
        },
    }


def encode(cfg: Config, params: Tree, pictures: jax.Array) -> Posterior:
    """Pictures [B, H, W, 3] in [-1, 1], sides multiples of `cfg.factor` -> posterior."""
    p = params["encoder"]
    x = ops.conv(p["conv_in"], pictures)
    for i in range(len(cfg.block_out_channels)):
        level = p["levels"][str(i)]
        for j in range(cfg.layers_per_block):
            x = _apply_resnet(cfg, level["resnets"][str(j)], x)
        if "resample" in level:
            x = ops.conv(level["resample"], x, stride=2, padding=((0, 1), (0, 1)))
    x = _apply_middle(cfg, p["middle"], x)
    x = ops.conv(p["conv_out"], _norm_silu(cfg, p["norm_out"], x))
    mean, logvar = jnp.split(x, 2, -1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))


def decode(cfg: Config, params: Tree, latents: jax.Array) -> jax.Array:
    """Unscaled latents [B, h, w, C] -> pictures [B, H, W, 3], about [-1, 1]."""
    p = params["decoder"]
    x = _apply_middle(cfg, p["middle"], ops.conv(p["conv_in"], latents))
    for i in range(len(cfg.block_out_channels)):
        level = p["levels"][str(i)]
        for j in range(cfg.layers_per_block + 1):
            x = _apply_resnet(cfg, level["resnets"][str(j)], x)
        if "resample" in level:
            x = ops.conv(level["resample"], x.repeat(2, 1).repeat(2, 2))
    return ops.conv(p["conv_out"], _norm_silu(cfg, p["norm_out"], x))


def scale(cfg: Config, latents: jax.Array) -> jax.Array:
    """The autoencoder's latents to the transformer's, about unit variance."""
    return (latents - cfg.shift_factor) * cfg.scaling_factor


def unscale(cfg: Config, latents: jax.Array) -> jax.Array:
    """The transformer's latents to the autoencoder's."""
    return latents / cfg.scaling_factor + cfg.shift_factor


def _norm_silu(cfg, p, x):
    return jax.nn.silu(ops.group_norm(x, p, groups=cfg.norm_num_groups, eps=EPS))


def _apply_resnet(cfg, p, x):
    y = ops.conv(p["conv1"], _norm_silu(cfg, p["norm1"], x))
    y = ops.conv(p["conv2"], _norm_silu(cfg, p["norm2"], y))
    return (ops.conv(p["shortcut"], x) if "shortcut" in p else x) + y


def _apply_middle(cfg, p, x):
    x = _apply_resnet(cfg, p["resnet1"], x)
    a, (B, h, w, D) = p["attention"], x.shape
    y = ops.group_norm(x, a["norm"], groups=cfg.norm_num_groups, eps=EPS).reshape(B, h * w, D)
    q, k, v = (ops.linear(a[n], y)[:, :, None] for n in "qkv")  # one head as wide as the level
    y = ops.linear(a["out"], attention(q, k, v)[:, :, 0]).reshape(B, h, w, D)
    return _apply_resnet(cfg, p["resnet2"], x + y)
