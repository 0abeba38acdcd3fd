"""What lives on each device through a whole run: parameters, optimizer, the teacher's copies; by the sharding rules."""

import functools
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from qtale_jax.config.schema import Config
from qtale_jax.quantization.storage import array_bytes
from qtale_jax.training.optimizer import Flat, build_optimizer
from qtale_jax.training.start import Start, state_shardings
from qtale_jax.training.step import initial_state


def device_shards(arrays: Any, shardings: Any) -> list[jax.ShapeDtypeStruct]:
    """What the first device holds of a tree of (abstract) arrays."""
    shards = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(where.shard_shape(leaf.shape), leaf.dtype), arrays, shardings
    )
    return jax.tree.leaves(shards)


def device_bytes(arrays: Any, shardings: Any) -> int:
    """Bytes that the first device holds of a tree of (abstract) arrays."""
    return sum(map(array_bytes, device_shards(arrays, shardings)))


def trained_part(config: Config) -> str:
    """What the parameters that train are called."""
    return {"adapters": "adapters and routers", "routers": "routers", "all": "parameters"}[config.train.parameters]


def state_shards(config: Config, start: Start, mesh: Mesh | AbstractMesh) -> dict[str, list[jax.ShapeDtypeStruct]]:
    """What each device holds through the whole run: parameters, optimizer, the teacher's copies."""
    optimizer = build_optimizer(config.train.optimizer, 1)
    state = jax.eval_shape(functools.partial(initial_state, optimizer=optimizer), start.trainable)
    placed = state_shardings(start, optimizer, mesh)
    found = {
        "frozen parameters": device_shards(start.frozen, _placed(start, start.frozen)),
        trained_part(config): device_shards(start.trainable, placed.trainable),
        "optimizer": device_shards(
            (state.step, state.bad_step, state.optimizer), (placed.step, placed.bad_step, placed.optimizer)
        ),
    }
    if config.train.distillation.active:
        copied = {path: leaf for path, leaf in start.trainable.items() if "/lora/" not in path}
        found["teacher"] = device_shards(copied, _placed(start, copied))
    return found


def state_bytes(config: Config, start: Start, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes per device of `state_shards`."""
    return total_bytes(state_shards(config, start, mesh))


def repeated_bytes(config: Config, start: Start) -> int:
    """Bytes per device of frozen parameters that a step is given a second time, as the teacher's.

    Those of layers and embedding: a frozen head serves both.
    """
    if not config.train.distillation.active:
        return 0
    twice = {path: leaf for path, leaf in start.frozen.items() if path.startswith(("layers/", "embedding/"))}
    return device_bytes(twice, _placed(start, twice))


def total_bytes(held: dict[str, list[jax.ShapeDtypeStruct]]) -> dict[str, int]:
    """Bytes of lists of arrays, by name."""
    return {name: sum(map(array_bytes, leaves)) for name, leaves in held.items()}


def _placed(start: Start, leaves: Flat) -> Flat:
    return {path: start.shardings[path] for path in leaves}
