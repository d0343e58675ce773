"""The PyTorch side of every comparison: diffusers' Stable Diffusion 3 with a reference picture.

Nothing else but the tests imports torch.
"""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput


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
            if i not in (skip_layers or ()):
                text, x = block(x, text, condition)
        x = self.proj_out(self.norm_out(x[:, -T:], condition))
        P = self.config.patch_size  # a token is P x P latents, channels last
        x = x.view(B, h // P, w // P, P, P, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(B, self.out_channels, h, w)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> KontextTransformer:
    """The transformer of a release (its `transformer` folder), for inference."""
    return KontextTransformer.from_pretrained(folder, torch_dtype=dtype).eval()
