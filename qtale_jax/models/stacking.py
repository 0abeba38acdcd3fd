"""Two layouts of the same parameters: one tree per layer, or layers stacked on a leading axis.

Training scans over stacks, so that one compiled layer serves all of them. Inference and everything on disk has one tree
per layer, so that a skipped layer is never read and layers may differ in storage format. Layers without a router
("always_on") and with one ("routed") have different trees, hence two stacks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qtale_jax.models.decoder import Parameters
from qtale_jax.models.specification import ModelSpecification

ALWAYS_ON, ROUTED = "always_on", "routed"


def stacks(spec: ModelSpecification) -> dict[str, tuple[int, ...]]:
    """Maps each stack that is not empty to the indices of its layers, in order."""
    routed = spec.routed_layers
    always_on = tuple(range(spec.architecture.num_layers - len(routed)))
    return {name: layers for name, layers in ((ALWAYS_ON, always_on), (ROUTED, routed)) if layers}


def is_stacked(params: Parameters) -> bool:
    """Whether `params` has the stacked layout."""
    return any(name in params["layers"] for name in (ALWAYS_ON, ROUTED))


def can_stack(spec: ModelSpecification) -> bool:
    """Whether all layers of each stack have the same storage formats."""
    if spec.quantization is None:
        return True
    formats = spec.quantization.formats

    def of(layer: int) -> dict:
        return {name.split("/")[1]: entry for name, entry in formats.items() if name.split("/")[0] == str(layer)}

    return all(all(of(layer) == of(layers[0]) for layer in layers) for layers in stacks(spec).values())


def _stack(*leaves):
    """Stacks arrays, abstract arrays, or tuples of axis names."""
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    if isinstance(first, tuple):
        return ("layers", *first)
    return np.stack(leaves) if isinstance(first, np.ndarray) else jnp.stack(leaves)


def stack_layers(spec: ModelSpecification, params: Parameters) -> Parameters:
    """Returns the stacked layout; leaves may be arrays, abstract arrays or axis names (tuples).

    Raises:
        ValueError: layers of one stack differ in storage format.
    """
    if not can_stack(spec):
        raise ValueError("layers with different storage formats cannot be stacked")
    layers = {
        name: jax.tree.map(_stack, *(params["layers"][i] for i in indices), is_leaf=lambda x: isinstance(x, tuple))
        for name, indices in stacks(spec).items()
    }
    return {**params, "layers": layers}


def unstack_layers(spec: ModelSpecification, params: Parameters) -> Parameters:
    """Returns the layout with one tree per layer."""
    layers = {
        index: jax.tree.map(lambda leaf, position=position: leaf[position], params["layers"][name])
        for name, indices in stacks(spec).items()
        for position, index in enumerate(indices)
    }
    return {**params, "layers": dict(sorted(layers.items()))}
