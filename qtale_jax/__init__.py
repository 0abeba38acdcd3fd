"""QTALE-JAX: token-adaptive layer execution that survives quantization.

import qtale_jax
model = qtale_jax.load("runs/quickstart/qtale-seed0/rtn-3bit-sym-ratio0.6")
model.generate(["..."], max_new_tokens=20)
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# transformers would remark on every import that torch, which nothing here needs, is not installed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "EngineOptions",
    "Generation",
    "InputError",
    "Model",
    "QueueFull",
    "RequestOptions",
    "Results",
    "Score",
    "TextRouting",
    "TooLong",
    "__version__",
    "load",
    "results",
]

if TYPE_CHECKING:
    from qtale_jax.engine.engine import Engine
    from qtale_jax.engine.options import EngineOptions, RequestOptions
    from qtale_jax.engine.requests import QueueFull, TooLong
    from qtale_jax.errors import InputError
    from qtale_jax.model import Generation, Model, Score, TextRouting, load
    from qtale_jax.reporting.comparison import Results, results

_HOMES = {
    "qtale_jax.model": ("Generation", "Model", "Score", "TextRouting", "load"),
    "qtale_jax.engine.engine": ("Engine",),
    "qtale_jax.engine.options": ("EngineOptions", "RequestOptions"),
    "qtale_jax.engine.requests": ("QueueFull", "TooLong"),
    "qtale_jax.errors": ("InputError",),
    "qtale_jax.reporting.comparison": ("Results", "results"),
}


def __getattr__(name: str) -> Any:
    # The public names need JAX; importing them on first use keeps `--help` and refused configurations fast.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'qtale_jax' has no attribute {name!r}")
