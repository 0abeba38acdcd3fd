"""Arithmetic of a forward pass, counted from what was executed, and the peak rate of the device that ran it."""

import functools
import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qtale_jax.models.specification import LINEARS, ModelSpecification


def layer_flops(spec: ModelSpecification, context: float) -> float:
    """FLOPs of one block for one token that executes it and attends to `context` keys; a multiply-add is two."""
    architecture = spec.architecture
    linears = sum(2 * i * o for i, o in (architecture.linear_shape(name) for name in LINEARS))
    return linears + 4.0 * architecture.num_heads * architecture.head_dim * context


def router_flops(spec: ModelSpecification) -> float:
    """FLOPs of one router for one token; paid whether or not the layer is executed."""
    if spec.routing is None or spec.routing.router == "hashed":
        return 0.0
    return 2.0 * spec.routing.router_hidden * (spec.architecture.hidden_size + 2)


def flops_per_token(spec: ModelSpecification, executed_per_layer: Sequence[float], contexts: Sequence[float]) -> float:
    """FLOPs of a forward pass per token, head and routers included.

    Without eviction, tokens that skip a layer leave keys and values there all the same, which are counted.

    Args:
        spec: the model.
        executed_per_layer: measured share of tokens that executed each layer.
        contexts: measured mean number of keys that an executing token saw in each layer.
    """
    blocks = sum(s * layer_flops(spec, c) for s, c in zip(executed_per_layer, contexts, strict=True))
    if spec.routing is not None and not spec.routing.eviction:
        skipped = sum(1.0 - executed_per_layer[layer] for layer in spec.routed_layers)
        blocks += skipped * sum(2.0 * math.prod(spec.architecture.linear_shape(name)) for name in ("key", "value"))
    head = 2.0 * spec.architecture.hidden_size * spec.architecture.vocab_size
    return blocks + head + router_flops(spec) * len(spec.routed_layers)


def training_flops_per_token(spec: ModelSpecification, length: float) -> float:
    """FLOPs of forward and backward per token under masked execution, which computes every block: three forwards."""
    architecture = spec.architecture

    def keys(layer: int) -> float:
        window = architecture.window(layer)
        if window is None or window >= length:
            return length / 2
        return window - window**2 / (2 * length)  # half of the window while it fills, then all of it

    layers = range(architecture.num_layers)
    return 3.0 * flops_per_token(spec, [1.0] * len(layers), [keys(layer) for layer in layers])


PEAK_BF16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bf16 FLOP/s by device kind, from the vendors' data sheets; longest matching prefix counts."""


@functools.lru_cache(maxsize=1)
def peak_flops() -> float:
    """Peak FLOP/s of all devices together: data sheet where known, otherwise a float32 matmul measured once."""
    device, count = jax.local_devices()[0], jax.device_count()
    names = [name for name in PEAK_BF16 if device.device_kind.startswith(name)]
    if names:
        return PEAK_BF16[max(names, key=len)] * count
    size = 768
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()
    start = time.perf_counter()
    for _ in range(3):
        multiply(matrix, matrix).block_until_ready()
    # Forced host devices share the cores, so the rate of a process is one device's rate.
    return jax.process_count() * 3 * 2.0 * size**3 / (time.perf_counter() - start)
