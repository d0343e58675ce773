"""MMDiT-X: the SD3.5-Medium transformer, with a reference picture's tokens before the noise's.

Reference: `SD3Transformer2DModel` of diffusers and UniPic 2.0's Kontext form of it. Reference
and noise share the position table and the timestep; only their order tells them apart.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unipic_jax.core import config, ops
from unipic_jax.core import mesh as meshes
from unipic_jax.core import remat as remats
from unipic_jax.core.attention import attention
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Spec, Tree, linear, norm, stack

EPS = 1e-6
TIME_WIDTH = 256  # sinusoids of the timestep; fixed in the released code
# What Flow-GRPO adapts: the joint attention of both streams.
LORA_TARGETS = ("*/image/[qkv]", "*/image/out", "*/text/[qkv]", "*/text/out")


@dataclasses.dataclass(frozen=True)
class Config:
    """The transformer's `config.json`, under its own names."""

    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    in_channels: int
    out_channels: int
    patch_size: int
    joint_attention_dim: int
    caption_projection_dim: int
    pooled_projection_dim: int
    pos_embed_max_size: int
    dual_attention_layers: tuple[int, ...] = ()
    sample_size: int = 128

    @classmethod
    def from_json(cls, raw: dict, where: str) -> "Config":
        cfg = config.parse(cls, raw, where, fixed={"qk_norm": ("rms_norm",)})
        if raw.get("qk_norm") is None:
            raise InputError(f"{where}: key 'qk_norm' is missing")
        if cfg.caption_projection_dim != cfg.width:
            raise InputError(f"{where}: caption_projection_dim = {cfg.caption_projection_dim} is "
                             f"not the transformer's width {cfg.width}")
        if any(not isinstance(i, int) or not 0 <= i < cfg.num_layers
               for i in cfg.dual_attention_layers):
            raise InputError(f"{where}: dual_attention_layers names a layer that is not there")
        return cfg

    @property
    def max_side(self) -> int:
        """The longest side of the latents that the position table covers."""
        return self.pos_embed_max_size * self.patch_size

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def is_dual(self, layer: int) -> bool:
        return layer in self.dual_attention_layers

    def stacked(self, kind: str) -> list[int]:
        """The layers of a stack ("dual" or "plain"): all but the last, which has its own form."""
        return [i for i in range(self.num_layers - 1) if self.is_dual(i) == (kind == "dual")]

    @property
    def runs(self) -> list[tuple[str, int, int]]:
        """The order of the layers: (stack, first, end), each one scan."""
        runs, seen = [], {"dual": 0, "plain": 0}
        for dual, group in itertools.groupby(range(self.num_layers - 1), self.is_dual):
            kind, n = ("dual" if dual else "plain"), len(list(group))
            runs.append((kind, seen[kind], seen[kind] + n))
            seen[kind] += n
        return runs


def _attention_specs(cfg: Config, *, out: bool = True) -> Tree:
    D = cfg.width
    specs = {n: linear(D, D, ("embed", "heads")) for n in ("q", "k", "v")}
    specs |= {n: norm(cfg.attention_head_dim, bias=False) for n in ("norm_q", "norm_k")}
    return specs | {"out": linear(D, D, ("heads", "embed"))} if out else specs


def _block_specs(cfg: Config, *, dual: bool, last: bool = False) -> Tree:
    D, zeros = cfg.width, jax.nn.initializers.zeros

    def stream(chunks, *, whole=True):
        specs = {"ada": linear(D, chunks * D, ("embed", None), init=zeros)}
        specs |= _attention_specs(cfg, out=whole)
        if whole:
            specs |= {"up": linear(D, 4 * D, ("embed", "mlp")),
                      "down": linear(4 * D, D, ("mlp", "embed"))}
        return specs

    block = {"image": stream(9 if dual else 6),
             "text": stream(2 if last else 6, whole=not last)}
    return block | {"image2": _attention_specs(cfg)} if dual else block


def specs(cfg: Config) -> Tree:
    """The weights; each stack of equal layers has a leading axis L."""
    D, P, C = cfg.width, cfg.patch_size, cfg.in_channels
    glorot = jax.nn.initializers.glorot_uniform()
    tree = {
        "patch": {"kernel": Spec((P, P, C, D), (None, None, None, "embed"), _patch_init),
                  "bias": Spec((D,), (None,))},
        "positions": Spec((cfg.pos_embed_max_size**2, D), (None, "embed"), _sincos(cfg),
                          buffer=True),
        "time_in": linear(TIME_WIDTH, D, (None, "embed"), init=glorot),
        "time_out": linear(D, D, ("embed", None), init=glorot),
        "pooled_in": linear(cfg.pooled_projection_dim, D, (None, "embed"), init=glorot),
        "pooled_out": linear(D, D, ("embed", None), init=glorot),
        "context": linear(cfg.joint_attention_dim, D, (None, "embed"), init=glorot),
        "last": _block_specs(cfg, dual=cfg.is_dual(cfg.num_layers - 1), last=True),
        "ada": linear(D, 2 * D, ("embed", None), init=jax.nn.initializers.zeros),
        "out": linear(D, P * P * cfg.out_channels, ("embed", None), init=jax.nn.initializers.zeros),
    }
    for kind in ("dual", "plain"):
        if layers := cfg.stacked(kind):
            tree[kind] = stack(_block_specs(cfg, dual=kind == "dual"), len(layers))
    return tree


def _patch_init(key, shape, dtype):
    flat = jax.nn.initializers.glorot_uniform()(key, (shape[0] * shape[1] * shape[2], shape[3]))
    return flat.reshape(shape).astype(dtype)


def _sincos(cfg: Config):
    """The fixed 2-D sinusoids that the position table is filled with (a buffer, never trained):
    half of the width for the column, half for the row, each sines then cosines."""

    def init(_, shape, dtype):
        N, quarter = cfg.pos_embed_max_size, cfg.width // 4
        base = cfg.sample_size // cfg.patch_size
        # Places in float32 and angles in float64, as diffusers has them, to the last bit.
        place = np.arange(N, dtype=np.float32) / np.float32(N / base)
        angle = place[:, None].astype(np.float64) / 10000.0 ** (np.arange(quarter) / quarter)
        axis = np.concatenate([np.sin(angle), np.cos(angle)], -1)  # [N, D/2]
        axis = jnp.asarray(axis.astype(np.float32), dtype)
        column = jnp.broadcast_to(axis[None], (N, N, 2 * quarter))
        row = jnp.broadcast_to(axis[:, None], (N, N, 2 * quarter))
        return jnp.concatenate([column, row], -1).reshape(shape)

    return init


def apply(
    cfg: Config, params: Tree, latents: jax.Array, timestep: jax.Array, context: jax.Array,
    pooled: jax.Array, reference: jax.Array | None = None, *,
    skip_layers: tuple[int, ...] = (), remat: str = "none", dtype=None,
) -> jax.Array:
    """The velocity of the flow at `latents`.

    latents, reference [B, h, w, C]; timestep [B] in [0, 1000]; context [B, S, joint_attention_dim];
    pooled [B, pooled_projection_dim]. Blocks in `skip_layers` are left out (skip-layer guidance).
    `remat` is what the gradient computes again of each block (`core.remat`). Computed in
    `dtype` (by default that of the latents); returns [B, h, w, out_channels] in that type.
    Raises ValueError where the reference has another shape than the latents, or where they have
    more tokens a side than the position table.
    """
    dtype = dtype or latents.dtype
    B, h, w, _ = latents.shape
    x = _patches(cfg, params, latents.astype(dtype))  # [B, T, D]
    if reference is not None:
        if reference.shape != latents.shape:
            raise ValueError(f"the reference {reference.shape} must have the shape of the latents "
                             f"{latents.shape}")
        x = jnp.concatenate([_patches(cfg, params, reference.astype(dtype)), x], 1)  # [B, 2T, D]
    time = ops.timestep_embedding(timestep, TIME_WIDTH).astype(dtype)
    c = _mlp(params["time_in"], params["time_out"], time)
    c = jax.nn.silu(c + _mlp(params["pooled_in"], params["pooled_out"], pooled.astype(dtype)))
    text = ops.linear(params["context"], context.astype(dtype))  # [B, S, D]

    skipped = set(skip_layers)
    for kind, first, end in cfg.runs:
        layers = cfg.stacked(kind)[first:end]
        stacked = params[kind]
        if (first, end) != (0, len(cfg.stacked(kind))):
            stacked = jax.tree.map(lambda a: a[first:end], stacked)  # noqa: B023
        keep = jnp.array([i not in skipped for i in layers])
        (x, text), _ = ops.scan_layers(
            _scanned(cfg, c, kind, remat, bool(skipped & set(layers))), (x, text), (stacked, keep))
    if cfg.num_layers - 1 not in skipped:
        x, _ = _block(cfg, params["last"], c, x, text)

    x = x[:, x.shape[1] - (h // cfg.patch_size) * (w // cfg.patch_size):]  # the noise's tokens
    scale, shift = _modulation(params["ada"], c, 2)
    x = ops.linear(params["out"], _modulate(x, shift, scale))
    P = cfg.patch_size
    x = ops.reshape(x, B, h // P, w // P, P, P, cfg.out_channels)
    return ops.reshape(x.transpose(0, 1, 3, 2, 4, 5), B, h, w, cfg.out_channels)


def _scanned(cfg, c, kind, policy, skips):
    run = remats.remat(lambda p, x, text: _block(cfg, p, c, x, text), policy)

    def body(carry, layer):
        p, keep = layer
        if not skips:
            return run(p, *carry), None
        return lax.cond(keep, run, lambda p, x, text: (x, text), p, *carry), None

    return body


def _patches(cfg, params, latents):
    """Latents [B, h, w, C] -> tokens [B, T, D] with the positions of a centred crop."""
    B, h, w, C = latents.shape
    P, N, D = cfg.patch_size, cfg.pos_embed_max_size, cfg.width
    h, w = h // P, w // P
    if h > N or w > N:
        raise ValueError(f"{h}x{w} tokens are more than the {N}x{N} of the position table")
    x = ops.reshape(latents, B, h, P, w, P, C).transpose(0, 1, 3, 2, 4, 5)
    x = ops.reshape(x, B, h * w, P * P * C)
    flat = {"kernel": params["patch"]["kernel"].reshape(P * P * C, D),
            "bias": params["patch"]["bias"]}
    top, left = (N - h) // 2, (N - w) // 2
    table = params["positions"].reshape(N, N, D)[top:top + h, left:left + w]
    table = lax.stop_gradient(table.astype(x.dtype)).reshape(h * w, D)
    return ops.linear(flat, x) + meshes.gather(table)


def _mlp(p_in, p_out, x):
    return ops.linear(p_out, jax.nn.silu(ops.linear(p_in, x)))


def _modulation(p, c, chunks):
    """`chunks` shifts, scales and gates [B, 1, D] from the conditioning c [B, D]."""
    return jnp.split(ops.linear(p, c)[:, None], chunks, -1)


def _modulate(x, shift, scale):
    return ops.layer_norm(x, eps=EPS) * (1 + scale) + shift


def _qkv(cfg, p, x):
    """Queries, keys and values [B, T, H, K], queries and keys normalized."""
    q, k, v = (ops.linear(p[n], x).reshape(*x.shape[:2], -1, cfg.attention_head_dim) for n in "qkv")
    return ops.rms_norm(q, p["norm_q"], eps=EPS), ops.rms_norm(k, p["norm_k"], eps=EPS), v


def _attend(q, k, v):
    out = attention(q, k, v)
    return out.reshape(*out.shape[:2], -1)  # [B, T, D]


@jax.named_scope("block")
def _block(cfg, p, c, x, text):
    """One block: x [B, T, D] and text [B, S, D] attend to each other; dual blocks also let the
    picture attend to itself; the last block has no text output."""
    dual, last = "image2" in p, "out" not in p["text"]
    shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = _modulation(
        p["image"]["ada"], c, 9 if dual else 6)
    if last:
        text_scale, text_shift = _modulation(p["text"]["ada"], c, 2)
    else:
        text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = (
            _modulation(p["text"]["ada"], c, 6))

    q, k, v = _qkv(cfg, p["image"], _modulate(x, shift, scale))
    tq, tk, tv = _qkv(cfg, p["text"], _modulate(text, text_shift, text_scale))
    T = x.shape[1]
    joint = _attend(*(jnp.concatenate(pair, 1) for pair in ((q, tq), (k, tk), (v, tv))))
    y = gate * ops.linear(p["image"]["out"], joint[:, :T])
    if dual:
        shift2, scale2, gate2 = second
        own = _attend(*_qkv(cfg, p["image2"], _modulate(x, shift2, scale2)))
        y += gate2 * ops.linear(p["image2"]["out"], own)
    x = x + y
    x = x + gate_ff * ops.feed_forward(p["image"], _modulate(x, shift_ff, scale_ff), jax.nn.gelu)
    if not last:
        text = text + text_gate * ops.linear(p["text"]["out"], joint[:, T:])
        text = text + text_gate_ff * ops.feed_forward(
            p["text"], _modulate(text, text_shift_ff, text_scale_ff), jax.nn.gelu)
    return x, text
