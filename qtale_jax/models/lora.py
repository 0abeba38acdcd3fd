"""Low-rank adapters: folding them into the weights they stand beside."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qtale_jax.models.decoder import Parameters
from qtale_jax.models.specification import LINEARS, ModelSpecification


def merged_kernel(linear: Parameters) -> Float[Array, "... i o"]:
    """W + A B in float32, returned in the type of W; also for stacked layers (a leading axis)."""
    delta = jnp.matmul(linear["lora"]["down"], linear["lora"]["up"], precision="float32")
    return (linear["kernel"].astype(jnp.float32) + delta).astype(linear["kernel"].dtype)


def with_weight(linear: Parameters, weight: Parameters) -> Parameters:
    """A linear whose weight is `weight` ({"kernel": ...} or {"quantized": ...}), without an adapter; its bias stays."""
    return weight | {name: leaf for name, leaf in linear.items() if name == "bias"}


def map_linears(function, layer: Parameters) -> Parameters:
    """Applies `function(name, linear)` to each linear of a layer (or stack of layers); the rest is kept."""

    def one(name: str, module: Parameters) -> Parameters:
        return function(name, module) if name in LINEARS else module

    return {
        part: {name: one(name, module) for name, module in tree.items()} if part in ("attention", "mlp") else tree
        for part, tree in layer.items()
    }


def merge_lora(spec: ModelSpecification, params: Parameters) -> tuple[ModelSpecification, Parameters]:
    """Folds every adapter into its kernel; works on either layout. A model without adapters is returned as it is.

    Raises:
        ValueError: the model is quantized (merge first, then quantize).
    """
    if spec.lora is None:
        return spec, params
    if spec.quantization is not None:
        raise ValueError("adapters cannot be merged into quantized weights")

    def merge(name: str, linear: Parameters) -> Parameters:
        return with_weight(linear, {"kernel": jax.jit(merged_kernel)(linear)}) if "lora" in linear else linear

    layers = {index: map_linears(merge, layer) for index, layer in params["layers"].items()}
    return spec.model_copy(update={"lora": None}), {**params, "layers": layers}
