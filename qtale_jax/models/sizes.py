"""Shapes of published models by name, for what needs no weights."""

from typing import Any

from qtale_jax.models.specification import Architecture, RopeScaling


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **fields: Any) -> Architecture:
    defaults: dict[str, Any] = {"vocab_size": 32000, "head_dim": hidden // heads, "max_length": 4096}
    return Architecture(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        **{**defaults, **fields},
    )


def _llama3(*sizes: int, factor: float, **fields: Any) -> Architecture:
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    context: dict[str, Any] = {"vocab_size": 128256, "max_length": 131072, "rope_theta": 500000.0}
    return _llama(*sizes, **{**context, "rope_scaling": scaling, **fields})


SIZES = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 8, factor=8.0),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 8, factor=8.0),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 8, factor=32.0, tied_head=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 8, factor=32.0, tied_head=True),
}
"""The Llamas that D-LLM and QTALE report, and their neighbours; others are read from a config.json."""
