"""The families of checkpoints: what each adds to a Llama, and what its config.json may leave out."""

from dataclasses import dataclass, field
from typing import Any

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
    """

    name: str
    opened_by: str
    defaults: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(
        "Llama",
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048},
        described={"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Family(
        "Qwen2",
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768},
        fields={"biases": ("query", "key", "value")},
        described={"use_sliding_window": False},
    ),
}
"""By `model_type`, which is `Architecture.family`."""

FIXED = ("biases",)
"""Fields of `Architecture` that the family alone decides."""

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
