"""How many bytes a model takes, counted from the arrays held."""

from qtale_jax.artifact.arrays import flatten
from qtale_jax.models.decoder import Parameters
from qtale_jax.quantization.storage import array_bytes

PARTS = ("embedding", "head", "norms", "routers", "adapters", "linears", "scales")


def weight_bytes(params: Parameters) -> dict[str, int]:
    """Bytes by part, and "total"; two int4 share a byte.

    "linears" are the kernels or stored integers of the seven linears of a block, "scales" what stands beside these:
    scales, zero points, orders. "adapters" are LoRA; all that an embedding, head or router takes is counted as that.
    Works on arrays and on `abstract_parameters`, with one tree per layer.
    """
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, leaf in flatten(params).items():
        parts[_part(name)] += array_bytes(leaf)
    return {**parts, "total": sum(parts.values())}


def _part(name: str) -> str:
    keys = name.split("/")
    if "router" in keys:
        return "routers"
    if "lora" in keys:
        return "adapters"
    if keys[0] in ("embedding", "head"):
        return keys[0]
    if keys[-1] in ("scales", "zero_points", "order"):
        return "scales"
    return "norms" if keys[-2].endswith("norm") else "linears"
