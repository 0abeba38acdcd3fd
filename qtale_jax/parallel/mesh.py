"""Meshes from configuration, and shardings of whole parameter trees."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from qtale_jax.config.schema import MeshConfig
from qtale_jax.errors import InputError
from qtale_jax.parallel.axes import AXES, partition_spec


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Sizes of the axes (data, fsdp, tensor) over a number of devices.

    Raises:
        InputError: the axis sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if -1 in sizes or math.prod(sizes) != devices:
        shape = f"(data={config.data}, fsdp={config.fsdp}, tensor={config.tensor})"
        raise InputError(f"mesh {shape} does not fit {devices} devices: the product has to be {devices}")
    return sizes[0], sizes[1], sizes[2]


def build_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Builds the (data, fsdp, tensor) mesh over `devices` (default: all).

    Raises:
        InputError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """The (data, fsdp, tensor) mesh of these sizes without devices, which is enough for shardings of shapes."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fits(mesh: Mesh | AbstractMesh, entry: str | tuple[str, ...] | None, size: int) -> bool:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return size % math.prod(mesh.shape[name] for name in names) == 0


def sharding(mesh: Mesh | AbstractMesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of one array by its logical axes; a dimension that the mesh does not divide stays whole."""
    entries = partition_spec(names)
    return NamedSharding(
        mesh, PartitionSpec(*(e if _fits(mesh, e, n) else None for e, n in zip(entries, shape, strict=True)))
    )


def shardings(mesh: Mesh | AbstractMesh, axes: Any, abstract: Any) -> Any:
    """Maps a tree of logical axes and a tree of (abstract) arrays to a tree of shardings."""
    return jax.tree.map(
        lambda names, leaf: sharding(mesh, names, leaf.shape), axes, abstract, is_leaf=lambda x: isinstance(x, tuple)
    )


def rows_held(mesh: Mesh, batch_size: int, devices: list | None = None) -> Int[np.ndarray, " rows"]:
    """The rows of a global batch that `devices` (default: those of this process) hold, in ascending order.

    They need not be next to each other, and processes that share their place on the data axes hold the same ones.
    """
    placed = NamedSharding(mesh, partition_spec(("batch",))).devices_indices_map((batch_size,))
    held = [placed[device] for device in (jax.local_devices() if devices is None else devices) if device in placed]
    return np.unique([np.arange(batch_size)[index] for index in held])


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())
