"""Post-training quantization of a whole model, layer by layer."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.lora import map_linears
from qtale_jax.models.specification import LINEARS, ModelSpecification, QuantizationSpecification, TensorFormat
from qtale_jax.quantization.rounding import validate
from qtale_jax.quantization.storage import array_bytes, store, unstore


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one layer: relative Frobenius error per linear, bytes before and after."""

    layer: int
    weight_error: dict[str, float]
    bytes_before: int
    bytes_after: int


@functools.partial(jax.jit, static_argnames=("format",))
def _round(kernel: jax.Array, format: TensorFormat) -> tuple[dict[str, jax.Array], jax.Array]:
    """Stored arrays of a kernel and the relative error ||W - W'|| / ||W||."""
    inputs, outputs = kernel.shape
    stored = store(kernel, format)
    wide = kernel.astype(jnp.float32)
    error = jnp.linalg.norm(wide - unstore(stored, (inputs, outputs), format))
    return stored, error / jnp.maximum(jnp.linalg.norm(wide), 1e-30)


def quantize_parameters(
    spec: ModelSpecification,
    params: Parameters,
    config: QuantizeConfig,
    progress: Callable[[int], None] = lambda layer: None,
) -> tuple[ModelSpecification, Parameters, list[LayerReport]]:
    """Rounds the seven linears of every layer; embedding, head, norms and routers stay in floating point.

    Args:
        spec: a model in floating point, without adapters.
        params: one tree per layer.
        config: method, bits, group size, symmetry; 16 bits return the model as it is.
        progress: called with the index of every finished layer.

    Raises:
        InputError: the model is quantized already, has adapters, the group size does not divide a linear's inputs, or
            a weight is not finite.
    """
    if config.bits == 16:
        return spec, params, []
    if spec.quantization is not None:
        raise InputError(f"quantize.model has {spec.bits}-bit weights already; start from the model it was made of")
    if spec.lora is not None:
        raise InputError("quantize.model has adapters that are not merged; train with train.merge_lora=true")
    format = TensorFormat(bits=config.bits, group_size=config.group_size, symmetric=config.symmetric)
    for name in LINEARS:
        validate(format, spec.architecture.linear_shape(name)[0], f"linear {name!r}")
    layers, report = {}, []
    for index, layer in params["layers"].items():
        errors: dict[str, float] = {}

        def one(name: str, linear: Parameters, index=index, errors=errors) -> Parameters:
            stored, error = _round(linear["kernel"], format)
            errors[name] = float(error)
            if not math.isfinite(errors[name]):
                raise InputError(f"quantize.model: layer {index}, linear {name!r} holds weights that are not finite")
            return {"quantized": stored}

        layers[index] = map_linears(one, layer)
        before, after = (sum(map(array_bytes, jax.tree.leaves(tree))) for tree in (layer, layers[index]))
        report.append(LayerReport(index, errors, before, after))
        progress(index)
    formats = {f"{layer}/{name}": format for layer in layers for name in LINEARS}
    quantization = QuantizationSpecification(method="rtn", formats=formats)
    return spec.model_copy(update={"quantization": quantization}), {**params, "layers": layers}, report
