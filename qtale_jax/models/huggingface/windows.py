"""Which layers of a checkpoint have a sliding window: config.json <-> `Architecture`."""

from typing import Any

from qtale_jax.errors import InputError
from qtale_jax.models.huggingface.families import FAMILIES, FULL, SLIDING, Family, named_family
from qtale_jax.models.specification import Architecture


def windows_of(config: dict[str, Any], where: str) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window, and the layers that do not have it, by a config.json with the defaults of its family.

    Args:
        config: the parsed file.
        where: its name, for messages.

    Returns:
        `sliding_window` and `global_layers` of the architecture; (None, ()) if no layer has a window.

    Raises:
        InputError: a key is not what it should be.
    """
    family = named_family(config, where)
    unused = family.window == "none" or (family.window == "last" and not config.get("use_sliding_window"))
    window = None if unused else config.get("sliding_window")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window <= 0):
        raise InputError(f"{where}: sliding_window={window!r}; allowed: null or a positive integer")
    types = _layer_types(family, config, window, where)
    if SLIDING not in types:
        return None, ()
    if window is None:
        raise InputError(
            f"{where}: layer_types of {SLIDING!r} with sliding_window=None are not supported; supported: {FULL!r}, or "
            f"{SLIDING!r} with a sliding_window" + (" and use_sliding_window=true" if family.window == "last" else "")
        )
    return window, tuple(layer for layer, kind in enumerate(types) if kind == FULL)


def _layer_types(family: Family, config: dict[str, Any], window: int | None, where: str) -> list[str]:
    """One of `FULL` and `SLIDING` per layer."""
    layers = config["num_hidden_layers"]
    if family.window in ("none", "all"):
        return [FULL if window is None else SLIDING] * layers
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= {FULL, SLIDING}:
            raise InputError(
                f"{where}: layer_types={str(types):.80} is not supported; supported: {FULL!r} or {SLIDING!r} for each "
                f"of {layers} layers"
            )
        return types
    if window is None:
        return [FULL] * layers
    key, least = ("max_window_layers", 0) if family.window == "last" else ("sliding_window_pattern", 1)
    number = config.get(key)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise InputError(f"{where}: {key}={number!r}; allowed: an integer from {least} on")
    if family.window == "last":
        return [SLIDING if layer >= number else FULL for layer in range(layers)]
    return [SLIDING if (layer + 1) % number else FULL for layer in range(layers)]


def described_windows(architecture: Architecture) -> dict[str, Any]:
    """What config.json says about the sliding window of a model."""
    way, window = FAMILIES[architecture.family].window, architecture.sliding_window
    if way == "none":
        return {}
    local = [architecture.is_local(layer) for layer in range(architecture.num_layers)]
    types = {"layer_types": [SLIDING if is_local else FULL for is_local in local]}
    if way == "all":
        return {"sliding_window": window}
    if way == "pattern":
        return {"sliding_window": window, **types}
    first = local.index(True) if window is not None else architecture.num_layers
    switch = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first}
    return {**switch, **types} if architecture.global_layers else switch
