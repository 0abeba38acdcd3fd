"""Post-training quantization of a model that is in memory."""

from collections.abc import Callable

import jax

from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.specification import ModelSpecification, QuantizationSpecification, TensorFormat
from qtale_jax.quantization.formats import formats_of
from qtale_jax.quantization.layer import quantize_layer
from qtale_jax.quantization.prefix import Prefix
from qtale_jax.quantization.report import LayerReport
from qtale_jax.quantization.storage import store


def check_source(spec: ModelSpecification) -> None:
    """Checks that a model can be quantized.

    Raises:
        InputError: it is quantized already, or has adapters.
    """
    if spec.quantization is not None:
        raise InputError(f"quantize.model has {spec.bits}-bit weights already; start from the model it was made of")
    if spec.lora is not None:
        raise InputError("quantize.model has adapters that are not merged; train with train.merge_lora=true")


def quantize_parameters(
    spec: ModelSpecification,
    params: Parameters,
    config: QuantizeConfig,
    progress: Callable[[int], None] = lambda layer: None,
    prefix: Prefix | None = None,
) -> tuple[ModelSpecification, Parameters, list[LayerReport]]:
    """Quantizes the linears of every layer, and embedding, head and routers where `config` says so.

    Args:
        spec: a model in floating point, without adapters.
        params: one tree per layer.
        config: method, bits, group size and the rest; 16 bits return the model as it is.
        progress: called with the index of every finished layer.
        prefix: calibration rows that were not started yet; needed by all methods but plain rounding.

    Raises:
        InputError: the model is quantized already, has adapters, a format does not fit, or a weight is not finite.
        ValueError: the method needs calibration rows and there are none.
    """
    if config.bits == 16:
        return spec, params, []
    check_source(spec)
    if config.sees_activations and prefix is None:
        raise ValueError(f"quantize.method={config.method!r} needs calibration rows")
    formats = formats_of(spec, config)
    ends = quantize_ends(params, formats)
    if prefix is not None:
        prefix.start((params | ends)["embedding"], formats.get("embedding"))
    layers, reports = {}, []
    for index, layer in params["layers"].items():
        layers[index], report = quantize_layer(spec, index, layer, formats, config, prefix)
        reports.append(report)
        progress(index)
    quantization = QuantizationSpecification(method=quantizer_of(config), formats=formats)
    return spec.model_copy(update={"quantization": quantization}), {**params, **ends, "layers": layers}, reports


def quantizer_of(config: QuantizeConfig):
    """The method as a specification records it."""
    assert config.method != "none"
    return config.method


_store = jax.jit(store, static_argnames=("format",))


def quantize_ends(params: Parameters, formats: dict[str, TensorFormat]) -> Parameters:
    """Embedding and head, rounded to nearest if they have a format; the embedding's outputs are its tokens."""
    ends = {}
    if "embedding" in formats:
        ends["embedding"] = {"quantized": _store(params["embedding"]["table"].T, format=formats["embedding"])}
    if "head" in formats:
        ends["head"] = {"quantized": _store(params["head"]["kernel"], format=formats["head"])}
    return ends
