"""QTALE-JAX: token-adaptive layer execution that survives quantization.

import qtale_jax
model = qtale_jax.load("runs/quickstart/qtale-seed0/rtn-3bit-sym-ratio0.6")
model.generate(["..."], max_new_tokens=20)
"""

import os
from typing import TYPE_CHECKING, Any

# transformers would remark on every import that torch, which nothing here needs, is not installed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["Generation", "Model", "Results", "Score", "TextRouting", "__version__", "load", "results"]

if TYPE_CHECKING:
    from qtale_jax.model import Generation, Model, Score, TextRouting, load
    from qtale_jax.reporting.comparison import Results, results


def __getattr__(name: str) -> Any:
    # The public names need JAX; importing them on first use keeps `--help` and refused configurations fast.
    if name in ("Generation", "Model", "Score", "TextRouting", "load"):
        from qtale_jax import model

        return getattr(model, name)
    if name in ("Results", "results"):
        from qtale_jax.reporting import comparison

        return getattr(comparison, name)
    raise AttributeError(f"module 'qtale_jax' has no attribute {name!r}")
