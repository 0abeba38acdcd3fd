"""Fine-tuning that sees the quantizer: merged weights are rounded, or disturbed as much, on some of the steps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qtale_jax.config.schema import QuantizationAwareConfig
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.lora import map_linears, merged_kernel, with_weight
from qtale_jax.models.specification import LINEARS, TensorFormat
from qtale_jax.quantization.rounding import fake_quantize_straight_through, fit_grid, grouped


def formats_of(config: QuantizationAwareConfig) -> tuple[TensorFormat, ...]:
    """The formats that are trained for."""
    return tuple(TensorFormat(**format.model_dump()) for format in config.formats)


def disturb(weight: Float[Array, "i o"], format: TensorFormat, key: PRNGKeyArray) -> Float[Array, "i o"]:
    """Adds noise uniform over one step of the grid that `weight` would be rounded to: the variance of its error."""
    scales = jax.lax.stop_gradient(fit_grid(grouped(weight, format), format).scales)
    noise = jax.random.uniform(key, weight.shape, jnp.float32, -0.5, 0.5)
    steps = jnp.repeat(scales.astype(jnp.float32), weight.shape[0] // len(scales), axis=0)
    return weight + (noise * steps).astype(weight.dtype)


def quantizer_transform(config: QuantizationAwareConfig, step: Int[Array, ""], key: PRNGKeyArray):
    """Returns a transformation of a layer's parameters that merges adapters and, on every k-th step, quantizes.

    The step's format is drawn from the configured ones. Works inside the layer scan, so only one layer's merged weights
    exist at a time.

    Args:
        config: formats, of which there is at least one, and how they act.
        step: number of the step.
        key: of the run; folded with the step.

    Raises:
        ValueError: there is no format.
    """
    formats = formats_of(config)
    if not formats:
        raise ValueError("there is no format to train for")
    draw = jax.random.fold_in(key, step)
    chosen = jax.random.randint(draw, (), 1, len(formats) + 1)
    index = jnp.where(step % config.every == 0, chosen, 0)

    def apply(kernel: Array, format: TensorFormat, key: PRNGKeyArray) -> Array:
        if config.form == "noise":
            return disturb(kernel, format, key)
        return fake_quantize_straight_through(kernel, format)

    def transform(layer: Parameters, number: Array | int) -> Parameters:
        layer_key = jax.random.fold_in(draw, number)

        def one(name: str, linear: Parameters) -> Parameters:
            kernel = merged_kernel(linear) if "lora" in linear else linear["kernel"]
            noise_key = jax.random.fold_in(layer_key, LINEARS.index(name))
            branches = [lambda kernel: kernel]
            branches += [lambda kernel, format=format: apply(kernel, format, noise_key) for format in formats]
            return with_weight(linear, {"kernel": jax.lax.switch(index, branches, kernel)})

        return map_linears(one, layer)

    return transform
