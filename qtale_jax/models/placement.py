"""Parameters on a mesh: where each array goes, and layers stacked straight into their shards."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from qtale_jax.models.decoder import Parameters, abstract_parameters, logical_axes
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.models.stacking import stack_layers, stacks
from qtale_jax.parallel.mesh import replicated, sharding, shardings

Tree = TypeVar("Tree")


def layer_shardings(spec: ModelSpecification, mesh: Mesh | AbstractMesh) -> Parameters:
    """A sharding for every array of the layout with one tree per layer."""
    return shardings(mesh, logical_axes(spec), abstract_parameters(spec))


def stacked_shardings(spec: ModelSpecification, mesh: Mesh | AbstractMesh) -> Parameters:
    """A sharding for every array of the stacked layout."""
    axes, abstract = stack_layers(spec, logical_axes(spec)), stack_layers(spec, abstract_parameters(spec))
    return shardings(mesh, axes, abstract)


def mesh_of(params: Parameters) -> Mesh | None:
    """The mesh of several devices that the parameters are on, if they are."""
    leaf = jax.tree.leaves(params)[0]
    mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def stack_on_mesh(spec: ModelSpecification, params: Parameters, placed: Parameters) -> Parameters:
    """Stacks layers leaf by leaf, each straight into its shards; layers are let go as their leaves are stacked.

    `params` loses its layers; callers that keep them pass a copy of the outermost dict.
    """
    layers = {index: _flat(layer) for index, layer in params.pop("layers").items()}
    whole = {name: jax.tree.map(place, tree, placed[name]) for name, tree in params.items()}
    stacked = {}
    for name, indices in stacks(spec).items():
        targets = _flat(placed["layers"][name])
        leaves = {}
        for path, target in targets.items():
            parts = [layers[index].pop(path) for index in indices]
            parts = [part if part.committed else place(part, replicated(target.mesh)) for part in parts]
            leaves[path] = jax.jit(_stack, out_shardings=target)(parts)
        stacked[name] = traverse_util.unflatten_dict(leaves)
    return {**whole, "layers": stacked}


def _flat(tree: Parameters) -> dict[tuple, Any]:
    flat: Any = traverse_util.flatten_dict(tree)
    return dict(flat)


def place(leaf: jax.Array | np.ndarray, target: NamedSharding) -> jax.Array:
    """Puts an array into its shards; each process cuts what it computed itself, and has computed the same as others."""
    if getattr(leaf, "committed", False) or jax.process_count() == 1:
        return jax.device_put(leaf, target)
    values = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, target, lambda index: values[index])


def rows_on(mesh: Mesh, batch: Sequence[np.ndarray]) -> list[jax.Array]:
    """Arrays of (rows, length) or (rows,), rows over the data axes; whole everywhere if these do not divide them."""
    return [place(array, sharding(mesh, ("batch", "length")[: array.ndim], array.shape)) for array in batch]


def everywhere(mesh: Mesh, tree: Tree) -> Tree:
    """The arrays whole on every device, so that every process can read them."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def _stack(parts: list[jax.Array]) -> jax.Array:
    return jnp.stack(parts)
