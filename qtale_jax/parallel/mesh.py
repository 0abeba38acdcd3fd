"""Meshes from configuration, and shardings of whole parameter trees."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from qtale_jax.config.schema import MeshConfig
from qtale_jax.errors import InputError
from qtale_jax.parallel.axes import AXES, partition_spec


def build_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Builds the (data, fsdp, tensor) mesh over `devices` (default: all).

    Raises:
        InputError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or math.prod(sizes) != len(devices):
        shape = f"(data={config.data}, fsdp={config.fsdp}, tensor={config.tensor})"
        raise InputError(f"mesh {shape} does not fit {len(devices)} devices: the product has to be {len(devices)}")
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fits(mesh: Mesh, entry: str | tuple[str, ...] | None, size: int) -> bool:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return size % math.prod(mesh.shape[name] for name in names) == 0


def sharding(mesh: Mesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of one array by its logical axes; a dimension that the mesh does not divide stays whole."""
    entries = partition_spec(names)
    return NamedSharding(
        mesh, PartitionSpec(*(e if _fits(mesh, e, n) else None for e, n in zip(entries, shape, strict=True)))
    )


def shardings(mesh: Mesh, axes: Any, abstract: Any) -> Any:
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


def replicated(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, PartitionSpec())
