"""A model directory on the devices of a configuration."""

from pathlib import Path

from qtale_jax.artifact import LoadedModel, load_model, read_model_json
from qtale_jax.config.schema import MeshConfig
from qtale_jax.models.placement import layer_shardings
from qtale_jax.parallel.mesh import build_mesh
from qtale_jax.parallel.processes import check_joined


def load_on_mesh(path: str | Path, config: MeshConfig) -> LoadedModel:
    """Loads a model straight into its shards on the mesh; on a single device, as `load_model` does.

    Raises:
        InputError: as `load_model`, the mesh does not fit the devices, or processes that were not joined.
    """
    check_joined()
    mesh = build_mesh(config)
    if mesh.size == 1:
        return load_model(path)
    return load_model(path, shardings=layer_shardings(read_model_json(path).spec, mesh))
