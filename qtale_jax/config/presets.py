"""Named recipes: values for several sections at once, which keys that are given win over."""

from copy import deepcopy
from typing import Any

from qtale_jax.config.document import merge

PRESETS: dict[str, dict[str, Any]] = {
    "qtale_plus": {
        "routing": {
            "method": "qtale",
            "target": 0.5,
            "eviction": False,
            "rate_loss": "batch",
            "entropy_weight": 0.03,
            "entropy_schedule": "anneal",
        },
        "train": {
            "distillation": {"weight": 1.0},
            "quantization_aware": {
                "formats": [
                    {"bits": 4, "group_size": -1, "symmetric": False},
                    {"bits": 3, "group_size": -1, "symmetric": False},
                    {"bits": 2, "group_size": 32, "symmetric": False},
                ],
                "every": 1,
            },
        },
    },
}
"""`routing.preset` -> values. `qtale_plus` holds the rate of a batch instead of every token's, so that layers go to the
tokens that need them; sees the quantizer and the dense model while it trains, which helps at 3 and 2 bits; and lets the
entropy term go before the end. It keeps the keys and values of skipped tokens, for the price of their projections and
of the memory of a whole cache (configs/study)."""


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Lays `values` on the preset that their `routing.preset` names; without one they are returned as they are."""
    routing = values.get("routing")
    name = routing.get("preset") if isinstance(routing, dict) else None
    if name not in PRESETS:
        return values
    return merge(deepcopy(PRESETS[name]), values)
