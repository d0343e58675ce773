"""Skywork UniPic 2.0 in JAX: pure functions over trees of arrays.

The letters used for array shapes throughout the package:
B batch, T image tokens, S text tokens, D width, H heads, K head size, F feed-forward width,
L layers, N steps, C latent channels, P patch side, V vocabulary, G group size.
Pictures are [B, height, width, 3] and latents [B, h, w, C]: channels last inside the package,
channels first in the `.npy` files of the command line.
"""

__version__ = "0.1.0"
