"""What fsdp and tensor parallelism make devices put together and send."""

from dataclasses import dataclass
from typing import Any

from qtale_jax.config.schema import Config
from qtale_jax.parallel.mesh import abstract_mesh
from qtale_jax.planning.state import device_bytes
from qtale_jax.training.start import Start, prepare_abstract

Sizes = tuple[int, int, int]
"""Of the mesh axes: data, fsdp, tensor."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of each device that fsdp and tensor parallelism need besides.

    Attributes:
        gathered: weights that are put together at once: of the attention of a `layer`, or of its MLP with the output
            projection, the larger, and of the `head` or the embedding.
        pieces: the largest array that is put together in a layer, in the embedding and in the head.
        weights: sent to put all weights together once.
        gradients: sent to add up the gradients once.
        per_row: sent between the devices of a tensor-parallel group for one row.
    """

    gathered: dict[str, int]
    pieces: dict[str, int]
    weights: float
    gradients: float
    per_row: float


def traffic(config: Config, start: Start, sizes: Sizes) -> Traffic:
    """What the mesh makes devices send, by rings: all-gather and reduce-scatter send (n - 1) / n of the result."""
    data, fsdp, tensor = sizes
    whole = prepare_abstract(config, start.spec, abstract_mesh((1, 1, tensor))).shardings
    gathered: dict[str, int] = {}
    pieces: dict[str, int] = {}
    weights = gradients = 0.0
    for path, leaf in (start.frozen | start.trainable).items():
        full = device_bytes(leaf, whole[path])
        missing = full - device_bytes(leaf, start.shardings[path])
        weights += missing
        part, layers = _part(path, leaf)
        # A layer that is computed again needs the output projection before the MLP, and its gradient after that of the
        # MLP; compilers keep it together in between.
        until = [part, part.replace("attention", "mlp")] if "/attention/output/" in path else [part]
        for moment in until:
            gathered[moment] = gathered.get(moment, 0) + (full // layers if missing else 0)
        if missing:
            name = part.split("/")[0].replace("layers", "layer")
            pieces[name] = max(pieces.get(name, 0), full // layers)
        if path in start.trainable:
            replicas = data if missing else data * fsdp
            gradients += missing + 2 * (replicas - 1) / replicas * (full - missing)
    shape = start.spec.architecture
    # Two sums per layer forward and two backward, of the products that write to and read from the residual stream; the
    # first two again where they are computed again. The embedding's and the head's are one each. All are float32.
    sums = shape.num_layers * (6 if config.train.remat == "full" else 4) + 2
    per_row = sums * 2 * (tensor - 1) / tensor * 4.0 * config.data.length * shape.hidden_size
    largest = {"layer": 0, "head": 0}
    for part, size in gathered.items():
        where = "layer" if part.startswith("layers/") else "head"
        largest[where] = max(largest[where], size)
    return Traffic(largest, pieces, weights, gradients, per_row)


def _part(path: str, leaf: Any) -> tuple[str, int]:
    """What is put together at once with a leaf, and how many of that the leaf has."""
    keys = path.split("/")
    return ("/".join(keys[:3]), leaf.shape[0]) if keys[0] == "layers" else (keys[0], 1)
