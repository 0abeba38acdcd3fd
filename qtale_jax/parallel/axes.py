"""Logical axis names, the rules that map them to mesh axes, and activation constraints.

Models name axes by meaning ("embed", "heads"); only this table names mesh axes. Nothing here knows about models.
"""

import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters: fsdp shards the axis of the residual stream, tensor the axis inside a block
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_vocab": "tensor",
}


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Maps logical names, one per dimension (None: replicated), to a PartitionSpec.

    Raises:
        ValueError: two dimensions of one array map to the same mesh axis, or a name has no rule.
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"no sharding rule for axes {unknown}; known: {sorted(RULES)}")
    entries = [None if name is None else RULES[name] for name in names]
    used = [axis for entry in entries if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {names} map to {entries}: a mesh axis appears twice")
    return PartitionSpec(*entries)


def constrain(x: Array, *names: str | None) -> Array:
    """Pins an activation to its logical axes when a mesh is active (`jax.set_mesh`); otherwise returns it as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names))


def shards(name: str) -> int:
    """Devices that the active mesh (`jax.set_mesh`) divides an axis of this logical name among; 1 without a mesh."""
    mesh, axes = jax.sharding.get_abstract_mesh(), RULES[name] or ()
    return math.prod(mesh.shape.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes))
