"""Shapes of published models by name, for what needs no weights."""

from typing import Any

from qtale_jax.models.specification import Architecture, LinearScaling, RopeScaling


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


def _gemma3(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **fields: Any) -> Architecture:
    """The text model of a Gemma 3 that takes images: five local layers, a global one, and again."""
    shared: dict[str, Any] = {
        "family": "gemma3_text",
        "vocab_size": 262208,
        "head_dim": 256,
        "max_length": 131072,
        "norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": LinearScaling(factor=8.0),
        "local_rope_theta": 1e4,
        "sliding_window": 1024,
        "global_layers": tuple(range(5, layers, 6)),
        "query_pre_attn_scalar": 256,
        "tied_head": True,
        "query_key_norm": True,
        "norm_offset": 1.0,
        "post_norms": True,
        "scaled_embedding": True,
        "activation": "gelu_tanh",
    }
    return _llama(hidden, mlp, layers, heads, kv_heads, **{**shared, **fields})


SIZES = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 8, factor=8.0),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 8, factor=8.0),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 8, factor=32.0, tied_head=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 8, factor=32.0, tied_head=True),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
}
"""The Llamas that D-LLM and QTALE report, their neighbours, and Gemma 3 (text); others are read from a config.json."""
