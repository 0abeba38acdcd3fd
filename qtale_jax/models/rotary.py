"""Rotary position embedding, half-rotation layout as in Hugging Face checkpoints, and the scaling of frequencies."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qtale_jax.models.specification import Architecture, LinearScaling


def frequencies(architecture: Architecture, local: bool = False) -> np.ndarray:
    """Returns the (head_dim / 2,) float32 angular frequencies, radians per position.

    With linear `rope_scaling` all wavelengths are stretched by `factor` (Gemma 3 from 4B on). With that of Llama 3.1
    those longer than original_length / low_freq_factor are, those shorter than original_length / high_freq_factor are
    kept, and between the two the frequency is interpolated. With `local` those of layers with a sliding window, which
    are not scaled where these have a base of their own.
    """
    own_base = local and architecture.local_rope_theta is not None
    theta = architecture.local_rope_theta if own_base else architecture.rope_theta
    half = np.arange(0, architecture.head_dim, 2, dtype=np.float32) / np.float32(architecture.head_dim)
    base = (1.0 / np.float32(theta) ** half).astype(np.float32)
    scaling = None if own_base else architecture.rope_scaling
    if scaling is None:
        return base
    if isinstance(scaling, LinearScaling):
        return base / np.float32(scaling.factor)
    wavelength = 2 * math.pi / base
    smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * base / scaling.factor + smooth * base).astype(np.float32)


def rotary_tables(
    architecture: Architecture, positions: Int[Array, "b t"], local: bool = False
) -> tuple[Float[Array, "b t 1 h"], Float[Array, "b t 1 h"]]:
    """Returns float32 cosine and sine for each position, shaped to broadcast over heads; h = head_dim / 2.

    With `local` those of layers with a sliding window.
    """
    found = jnp.asarray(frequencies(architecture, local))
    angles = positions.astype(jnp.float32)[:, :, None, None] * found[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "b t n d"], tables: tuple[Array, Array]) -> Float[Array, "b t n d"]:
    """Rotates pairs (x_i, x_{i + d/2}) by the angle of their position, in float32."""
    cosine, sine = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
