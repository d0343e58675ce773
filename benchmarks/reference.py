"""The PyTorch side of every comparison: diffusers' Stable Diffusion 3 with a reference picture.

Nothing else but the tests imports torch.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5EncoderModel,
)


class KontextTransformer(SD3Transformer2DModel):
    """UniPic 2.0's transformer: a reference's tokens go before the noise's, with the same
    positions and the same timestep, and are dropped at the end."""

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep,
                ref_hidden_states=None, skip_layers=(), return_dict=True, **unused):
        """The velocity at the latents `hidden_states` [B, C, h, w].

        ref_hidden_states [B, C, h, w]; encoder_hidden_states [B, S, joint_attention_dim];
        timestep [B] in [0, 1000]. Blocks in `skip_layers` are left out. `unused` is what a
        diffusers pipeline passes besides; it has to be None.
        """
        assert all(v is None for v in unused.values()), unused
        B, _, h, w = hidden_states.shape
        x = self.pos_embed(hidden_states)  # [B, T, D]
        T = x.shape[1]
        if ref_hidden_states is not None:
            x = torch.cat([self.pos_embed(ref_hidden_states), x], dim=1)
        condition = self.time_text_embed(timestep, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        for i, block in enumerate(self.transformer_blocks):
            if i in (skip_layers or ()):
                continue
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                text, x = self._gradient_checkpointing_func(block, x, text, condition)
            else:
                text, x = block(x, text, condition)
        x = self.proj_out(self.norm_out(x[:, -T:], condition))
        P = self.config.patch_size  # a token is P x P latents, channels last
        x = x.view(B, h // P, w // P, P, P, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(B, self.out_channels, h, w)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> KontextTransformer:
    """The transformer of a release (its `transformer` folder), for inference."""
    return KontextTransformer.from_pretrained(folder, torch_dtype=dtype).eval()


def pipeline(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A function (prompt, noise [1, C, h, w], steps, picture=None, negative_prompt="") -> picture
    [1, H, W, 3] in [0, 1]: a guided sample of a Kontext release, as the public pipeline draws it.

    Of an edit, picture is [H, W, 3] in [0, 1].
    """
    def open_part(kind, name):
        return kind.from_pretrained(folder / name).to(device, dtype).eval()

    transformer = load(folder / "transformer", dtype).to(device)
    vae = open_part(AutoencoderKL, "vae")
    clips = [open_part(CLIPTextModelWithProjection, n) for n in ("text_encoder", "text_encoder_2")]
    t5 = open_part(T5EncoderModel, "text_encoder_3")
    tokenizers = [AutoTokenizer.from_pretrained(folder / n) for n in ("tokenizer", "tokenizer_2")]
    tokenizer_3 = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    c = vae.config

    def ids(tokenizer, prompts, length):
        return tokenizer(prompts, padding="max_length", max_length=length, truncation=True,
                         return_tensors="pt").input_ids.to(device)

    def encode(prompts):
        outs = [m(ids(t, prompts, 77), output_hidden_states=True)
                for m, t in zip(clips, tokenizers)]
        text = t5(ids(tokenizer_3, prompts, 256)).last_hidden_state
        clip = torch.cat([o.hidden_states[-2] for o in outs], -1)
        clip = torch.nn.functional.pad(clip, (0, text.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, text], 1), torch.cat([o.text_embeds for o in outs], -1)

    @torch.inference_mode()
    def draw(prompt, noise, steps, picture=None, negative_prompt=""):
        context, pooled = encode([negative_prompt, prompt])
        reference = None
        if picture is not None:
            picture = torch.from_numpy(np.float32(picture) * 2 - 1).permute(2, 0, 1)[None]
            mode = vae.encode(picture.to(device, dtype)).latent_dist.mode()
            reference = ((mode - c.shift_factor) * c.scaling_factor).repeat(2, 1, 1, 1)
        x = torch.from_numpy(noise).to(device, dtype)
        scheduler.set_timesteps(steps, device=device)
        for t in scheduler.timesteps:
            v = transformer(torch.cat([x, x]), context, pooled, t.expand(2),
                            ref_hidden_states=reference, return_dict=False)[0]
            negative, positive = v.chunk(2)
            guided = negative + 3.5 * (positive - negative)
            x = scheduler.step(guided, t, x, return_dict=False)[0]
        out = vae.decode(x / c.scaling_factor + c.shift_factor).sample
        return (out * 0.5 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu().numpy()

    return draw
