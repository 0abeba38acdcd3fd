"""The families of checkpoints: what each adds to a Llama, and what its config.json may leave out."""

from dataclasses import dataclass, field
from typing import Any, Literal

from qtale_jax.errors import InputError, nearest
from qtale_jax.models.specification import Architecture


@dataclass(frozen=True)
class Family:
    """What a `model_type` means.

    Attributes:
        name: as messages say it.
        opened_by: the class of transformers that opens its checkpoints.
        defaults: values of keys that config.json may leave out.
        fields: of `Architecture`, those that all models of the family have and that are not the default there.
        described: keys of config.json that say what every model written here is.
        window: how config.json says which layers have a sliding window: not at all, by the one key `sliding_window` for
            all layers, or layer by layer (`window_of`).
    """

    name: str
    opened_by: str
    defaults: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    window: Literal["none", "key", "layers"] = "none"


QWEN_WINDOW = {"sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False}

FAMILIES = {
    "llama": Family(
        "Llama",
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048},
        described={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        "Mistral",
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        window="key",
    ),
    "qwen2": Family(
        "Qwen2",
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, **QWEN_WINDOW},
        fields={"biases": ("query", "key", "value")},
        window="layers",
    ),
    "qwen3": Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, **QWEN_WINDOW},
        fields={"query_key_norm": True},
        described={"attention_bias": False},
        window="layers",
    ),
}
"""By `model_type`, which is `Architecture.family`."""

FIXED = ("biases", "query_key_norm")
"""Fields of `Architecture` that the family alone decides."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Entries of `layer_types`."""

STALE = ("layer_types",)
"""Keys that do not hold for a model whose layers have changed."""


def family_of(architecture: Architecture) -> Family:
    """The family of a model that can be written as a checkpoint.

    Raises:
        InputError: it has parts that the family does not have, or lacks some.
    """
    family = FAMILIES[architecture.family]
    for name in FIXED:
        found = getattr(architecture, name)
        expected = family.fields.get(name, Architecture.model_fields[name].default)
        if found != expected:
            raise InputError(
                f"a {family.name} checkpoint cannot hold a model with {name}={found!r}; allowed: {expected!r}"
            )
    window = architecture.sliding_window
    if window is not None and family.window == "none":
        raise InputError(f"a {family.name} checkpoint cannot hold a model with sliding_window={window}; allowed: None")
    return family


def named_family(config: dict[str, Any], where: str) -> Family:
    """The family that a config.json names.

    Raises:
        InputError: one that is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(map(repr, FAMILIES))
        hint = nearest(str(kind), list(FAMILIES))
        raise InputError(f"{where}: model_type={kind!r} is not supported; supported: {supported}{hint}")
    return FAMILIES[kind]


def window_of(config: dict[str, Any], where: str) -> int | None:
    """The sliding window of all layers, by a config.json with the defaults of its family.

    Layer by layer it is `layer_types`, or all layers from `max_window_layers` on if `use_sliding_window` is set.

    Args:
        config: the parsed file.
        where: its name, for messages.

    Raises:
        InputError: some layers have it and some do not, or a key is not what it should be.
    """
    way = named_family(config, where).window
    unused = way == "none" or (way == "layers" and not config.get("use_sliding_window"))
    window = None if unused else config.get("sliding_window")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window <= 0):
        raise InputError(f"{where}: sliding_window={window!r}; allowed: null or a positive integer")
    types = config.get("layer_types") if way == "layers" else None
    layers = config["num_hidden_layers"]
    if types is None:
        if window is None:
            return None
        first = config.get("max_window_layers") if way == "layers" else 0
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise InputError(f"{where}: max_window_layers={first!r}; allowed: an integer from 0 on")
        if 0 < first < layers:
            raise InputError(
                f"{where}: max_window_layers={first} gives a sliding window to some of {layers} layers, which is not "
                f"supported; allowed: 0 (all) or {layers} (none)"
            )
        return window if first == 0 else None
    if not isinstance(types, list) or len(types) != layers or len(set(map(str, types))) != 1:
        raise InputError(
            f"{where}: layer_types={str(types):.80} is not supported; supported: one type for all {layers} layers"
        )
    if types[0] not in (FULL, SLIDING) or (types[0] == SLIDING and window is None):
        raise InputError(
            f"{where}: layer_types of {types[0]!r} with sliding_window={window!r} are not supported; "
            f"supported: {FULL!r}, or {SLIDING!r} with use_sliding_window=true and a sliding_window"
        )
    return window if types[0] == SLIDING else None


def described_window(architecture: Architecture) -> dict[str, Any]:
    """What config.json says about the sliding window of a model."""
    way, window = FAMILIES[architecture.family].window, architecture.sliding_window
    if way == "none":
        return {}
    if way == "key":
        return {"sliding_window": window}
    used = window is not None
    first = 0 if used else architecture.num_layers
    return {"use_sliding_window": used, "sliding_window": window, "max_window_layers": first}
