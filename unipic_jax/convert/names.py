"""The released names of every weight: one table a model, read both ways.

A `Rule` ties a leaf of our tree to its tensor in the release, or to one tensor a layer where the
leaf is a stack. `form` says how the axes are rearranged on the way.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from unipic_jax.models import (
    autoencoder,
    clip_text,
    connector,
    edit_judge,
    mmdit,
    qwen2_5_vl,
    t5_encoder,
)

FORMS = {  # name -> (from the release, back): both are views
    "same": (lambda a: a, lambda a: a),
    "dense": (np.transpose, np.transpose),  # [out, in] <-> [in, out]
    "conv": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "conv3d": (lambda a: a.transpose(2, 3, 4, 1, 0), lambda a: a.transpose(4, 3, 0, 1, 2)),
    "batched": (lambda a: a[0], lambda a: a[None]),  # [1, ...] <-> [...]
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A leaf (`path` in our tree), its tensor in the release, or for a stack one a layer."""

    path: tuple[str, ...]
    names: tuple[str, ...]
    form: str = "same"
    stacked: bool = False


def _leaves(path: str, name: str, form: str = "dense", *, bias: bool = True) -> Iterable[Rule]:
    """Weight and bias of a dense or convolution layer."""
    at = tuple(path.split("/"))
    yield Rule((*at, "kernel"), (f"{name}.weight",), form)
    if bias:
        yield Rule((*at, "bias"), (f"{name}.bias",))


def _norm(path: str, name: str, *, bias: bool = True) -> Iterable[Rule]:
    at = tuple(path.split("/"))
    yield Rule((*at, "scale"), (f"{name}.weight",))
    if bias:
        yield Rule((*at, "bias"), (f"{name}.bias",))


def _stack(path: str, name: str, layers: Iterable[int], rules: Iterable[Rule]) -> Iterable[Rule]:
    """The rules of one layer, for all `layers`; `{}` in `name` is the layer's number."""
    layers = list(layers)
    for r in rules if layers else ():
        names = tuple(f"{name.format(i)}.{r.names[0]}" for i in layers)
        yield Rule((*path.split("/"), *r.path), names, r.form, stacked=True)


def _under(path: str, name: str, rules: Iterable[Rule]) -> Iterable[Rule]:
    for r in rules:
        yield Rule((path, *r.path), (f"{name}.{r.names[0]}",), r.form)


def _mmdit_block(*, dual: bool, last: bool) -> Iterable[Rule]:
    streams = [("image", "attn", "to_q to_k to_v to_out.0", "norm_q norm_k"),
               ("text", "attn", "add_q_proj add_k_proj add_v_proj to_add_out",
                "norm_added_q norm_added_k")]
    if dual:
        streams.append(("image2", "attn2", "to_q to_k to_v to_out.0", "norm_q norm_k"))
    for stream, attn, dense, norms in streams:
        for ours, theirs in zip(("q", "k", "v", "out"), dense.split(), strict=True):
            if not (last and stream == "text" and ours == "out"):
                yield from _leaves(f"{stream}/{ours}", f"{attn}.{theirs}")
        for ours, theirs in zip(("norm_q", "norm_k"), norms.split(), strict=True):
            yield from _norm(f"{stream}/{ours}", f"{attn}.{theirs}", bias=False)
    for stream, suffix in (("image", ""), ("text", "_context")):
        yield from _leaves(f"{stream}/ada", f"norm1{suffix}.linear")
        if not (last and stream == "text"):
            yield from _leaves(f"{stream}/up", f"ff{suffix}.net.0.proj")
            yield from _leaves(f"{stream}/down", f"ff{suffix}.net.2")


def _mmdit(cfg: mmdit.Config) -> Iterable[Rule]:
    yield Rule(("positions",), ("pos_embed.pos_embed",), "batched")
    yield from _leaves("patch", "pos_embed.proj", "conv")
    for ours, theirs in (("time", "timestep"), ("pooled", "text")):
        for side, n in (("in", 1), ("out", 2)):
            yield from _leaves(f"{ours}_{side}", f"time_text_embed.{theirs}_embedder.linear_{n}")
    yield from _leaves("context", "context_embedder")
    for kind in ("dual", "plain"):
        yield from _stack(kind, "transformer_blocks.{}", cfg.stacked(kind),
                          _mmdit_block(dual=kind == "dual", last=False))
    last = cfg.num_layers - 1
    yield from _under("last", f"transformer_blocks.{last}",
                      _mmdit_block(dual=cfg.is_dual(last), last=True))
    yield from _leaves("ada", "norm_out.linear")
    yield from _leaves("out", "proj_out")


def _resnet(path: str, name: str, *, shortcut: bool) -> Iterable[Rule]:
    for n in ("1", "2"):
        yield from _norm(f"{path}/norm{n}", f"{name}.norm{n}")
        yield from _leaves(f"{path}/conv{n}", f"{name}.conv{n}", "conv")
    if shortcut:
        yield from _leaves(f"{path}/shortcut", f"{name}.conv_shortcut", "conv")


def _autoencoder(cfg: autoencoder.Config) -> Iterable[Rule]:
    widths = cfg.block_out_channels
    for half, blocks, resample, order, resnets in (
            ("encoder", "down_blocks", "downsamplers", widths, cfg.layers_per_block),
            ("decoder", "up_blocks", "upsamplers", widths[::-1], cfg.layers_per_block + 1)):
        yield from _leaves(f"{half}/conv_in", f"{half}.conv_in", "conv")
        for i, width in enumerate(order):
            at, name = f"{half}/levels/{i}", f"{half}.{blocks}.{i}"
            for j in range(resnets):
                yield from _resnet(f"{at}/resnets/{j}", f"{name}.resnets.{j}",
                                   shortcut=j == 0 and i > 0 and order[i - 1] != width)
            if i < len(order) - 1:
                yield from _leaves(f"{at}/resample", f"{name}.{resample}.0.conv", "conv")
        at, name = f"{half}/middle", f"{half}.mid_block"
        for n in (1, 2):
            yield from _resnet(f"{at}/resnet{n}", f"{name}.resnets.{n - 1}", shortcut=False)
        yield from _norm(f"{at}/attention/norm", f"{name}.attentions.0.group_norm")
        for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            yield from _leaves(f"{at}/attention/{ours}", f"{name}.attentions.0.{theirs}")
        yield from _norm(f"{half}/norm_out", f"{half}.conv_norm_out")
        yield from _leaves(f"{half}/conv_out", f"{half}.conv_out", "conv")


def _encoder_layer() -> Iterable[Rule]:
    """A layer as CLIP's text encoder and UniPic's connector name it."""
    for n in "12":
        yield from _norm(f"norm{n}", f"layer_norm{n}")
    for n in ("q", "k", "v", "out"):
        yield from _leaves(n, f"self_attn.{n}_proj")
    for ours, theirs in (("up", "fc1"), ("down", "fc2")):
        yield from _leaves(ours, f"mlp.{theirs}")


def _clip_text(cfg: clip_text.Config) -> Iterable[Rule]:
    for n in ("token", "position"):
        yield Rule((n,), (f"text_model.embeddings.{n}_embedding.weight",))
    yield from _stack("layers", "text_model.encoder.layers.{}", range(cfg.num_hidden_layers),
                      _encoder_layer())
    yield from _norm("norm", "text_model.final_layer_norm")
    yield from _leaves("projection", "text_projection", bias=False)


def _t5_layer() -> Iterable[Rule]:
    for ours, theirs in (("q", "0.SelfAttention.q"), ("k", "0.SelfAttention.k"),
                         ("v", "0.SelfAttention.v"), ("out", "0.SelfAttention.o"),
                         ("gate", "1.DenseReluDense.wi_0"), ("up", "1.DenseReluDense.wi_1"),
                         ("down", "1.DenseReluDense.wo")):
        yield from _leaves(ours, f"layer.{theirs}", bias=False)
    for i in (0, 1):
        yield from _norm(f"norm{i + 1}", f"layer.{i}.layer_norm", bias=False)


def _t5_encoder(cfg: t5_encoder.Config) -> Iterable[Rule]:
    yield Rule(("token",), ("shared.weight",))
    yield Rule(("relative_bias",),
               ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",))
    yield from _stack("layers", "encoder.block.{}", range(cfg.num_layers), _t5_layer())
    yield from _norm("norm", "encoder.final_layer_norm", bias=False)


def _connector(cfg: connector.Config) -> Iterable[Rule]:
    yield Rule(("queries",), ("meta_queries",))
    for ours, theirs in (("project_in", 1), ("pooled", 2), ("context", 3)):
        yield from _leaves(ours, f"projector_{theirs}")
    yield from _stack("layers", "connector.layers.{}", range(cfg.num_hidden_layers),
                      _encoder_layer())


def _qwen_vision_block() -> Iterable[Rule]:
    for n in "12":
        yield from _norm(f"norm{n}", f"norm{n}", bias=False)
    for ours, theirs in (("qkv", "attn.qkv"), ("out", "attn.proj"), ("gate", "mlp.gate_proj"),
                         ("up", "mlp.up_proj"), ("down", "mlp.down_proj")):
        yield from _leaves(ours, theirs)


def _qwen_layer() -> Iterable[Rule]:
    for n in ("q", "k", "v"):
        yield from _leaves(n, f"self_attn.{n}_proj")
    yield from _leaves("out", "self_attn.o_proj", bias=False)
    for n in ("gate", "up", "down"):
        yield from _leaves(n, f"mlp.{n}_proj", bias=False)
    yield from _norm("norm1", "input_layernorm", bias=False)
    yield from _norm("norm2", "post_attention_layernorm", bias=False)


def _qwen2_5_vl(cfg: qwen2_5_vl.Config) -> Iterable[Rule]:
    yield from _leaves("vision/patch", "visual.patch_embed.proj", "conv3d", bias=False)
    yield from _stack("vision/blocks", "visual.blocks.{}", range(cfg.vision.depth),
                      _qwen_vision_block())
    yield from _norm("vision/merger/norm", "visual.merger.ln_q", bias=False)
    for ours, theirs in (("up", 0), ("down", 2)):
        yield from _leaves(f"vision/merger/{ours}", f"visual.merger.mlp.{theirs}")
    yield Rule(("token",), ("model.embed_tokens.weight",))
    yield from _stack("layers", "model.layers.{}", range(cfg.num_hidden_layers), _qwen_layer())
    yield from _norm("norm", "model.norm", bias=False)
    if not cfg.tie_word_embeddings:
        yield from _leaves("head", "lm_head", bias=False)


def _edit_judge(cfg: edit_judge.Config) -> Iterable[Rule]:
    yield from _leaves("score", "score")


TABLES = {mmdit: _mmdit, autoencoder: _autoencoder, clip_text: _clip_text, t5_encoder: _t5_encoder,
          connector: _connector, qwen2_5_vl: _qwen2_5_vl, edit_judge: _edit_judge}

# Names of another generation of the same files, by prefix; the first that fits is replaced.
PREFIXES = {qwen2_5_vl: (("model.visual.", "visual."), ("model.language_model.", "model."))}

# Tensors that repeat another one, where a file stores both.
TIED = {t5_encoder: {"encoder.embed_tokens.weight": "shared.weight"}}


def rules(model, cfg) -> list[Rule]:
    """The table of a model (one of the modules of `unipic_jax.models`) at a config."""
    return list(TABLES[model](cfg))


def canonical(model, name: str) -> str:
    """A tensor's name in the table, from its name in a file."""
    for old, new in PREFIXES.get(model, ()):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return TIED.get(model, {}).get(name, name)
