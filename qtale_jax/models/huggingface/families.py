"""The families of checkpoints: what each adds to a Llama, and what its config.json may leave out."""

from dataclasses import dataclass, field
from typing import Any, Literal

from qtale_jax.errors import InputError, nearest
from qtale_jax.models.huggingface.multimodal import TEXT_MODELS
from qtale_jax.models.specification import Architecture


@dataclass(frozen=True)
class Family:
    """What a `model_type` means.

    Attributes:
        name: as messages say it.
        opened_by: the class of transformers that opens its checkpoints.
        defaults: values of keys that config.json may leave out.
        fields: of `Architecture`, those that all models of the family have and that are not the default there.
        numbers: keys of config.json, beside those of all families, and the fields of `Architecture` that they set;
            null is None.
        activation: key of config.json that names the activation of the MLP, and the names it may have.
        refused: keys of config.json that have to be false, null or absent.
        described: keys of config.json that say what every model written here is.
        window: which layers config.json gives a sliding window: none; all, if the key `sliding_window` is set; the last
            ones (from `max_window_layers` on, if `use_sliding_window` is set); or all but every n-th. In the last two
            ways `layer_types` may say so layer by layer.
    """

    name: str
    opened_by: str
    defaults: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu", "swish"))
    refused: tuple[str, ...] = ("attention_bias", "mlp_bias")
    described: dict[str, Any] = field(default_factory=dict)
    window: Literal["none", "all", "last", "pattern"] = "none"


QWEN_WINDOW = {"sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False}

GEMMA: dict[str, Any] = {
    "fields": {
        "norm_offset": 1.0,
        "post_norms": True,
        "scaled_embedding": True,
        "activation": "gelu_tanh",
    },
    "activation": ("hidden_activation", ("gelu_pytorch_tanh",)),
    "described": {"attention_bias": False},
    "window": "pattern",
}
"""What Gemma 2 and Gemma 3 have in common, beside `GEMMA_DEFAULTS`."""

GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

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
        window="all",
    ),
    "qwen2": Family(
        "Qwen2",
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, **QWEN_WINDOW},
        fields={"biases": ("query", "key", "value")},
        window="last",
    ),
    "qwen3": Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, **QWEN_WINDOW},
        fields={"query_key_norm": True},
        described={"attention_bias": False},
        window="last",
    ),
    "gemma2": Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        {
            **GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        numbers={
            "query_pre_attn_scalar": "query_pre_attn_scalar",
            "attn_logit_softcapping": "attention_softcap",
            "final_logit_softcapping": "logit_softcap",
        },
        refused=("attention_bias", "use_bidirectional_attention"),
        **GEMMA,
    ),
    "gemma3_text": Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        {
            **GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        numbers={
            "query_pre_attn_scalar": "query_pre_attn_scalar",
            "final_logit_softcapping": "logit_softcap",
            "rope_local_base_freq": "local_rope_theta",
        },
        # transformers reads a cap on attention from the config of a Gemma 3 and does not apply it.
        refused=("attention_bias", "use_bidirectional_attention", "attn_logit_softcapping"),
        **{**GEMMA, "fields": {**GEMMA["fields"], "query_key_norm": True}},
    ),
}
"""By `model_type`, which is `Architecture.family`."""

FIXED = ("biases", "query_key_norm", "norm_offset", "post_norms", "scaled_embedding", "activation")
"""Fields of `Architecture` that the family alone decides."""

NUMBERS = ("attention_softcap", "logit_softcap", "local_rope_theta", "query_pre_attn_scalar")
"""Fields of `Architecture` that only some families have a key for."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Entries of `layer_types`."""

STALE = ("layer_types", "sliding_window_pattern", "_sliding_window_pattern")
"""Keys that do not hold for a model whose layers have changed."""


def family_of(architecture: Architecture) -> Family:
    """The family of a model that can be written as a checkpoint.

    Raises:
        InputError: it has parts that the family does not have, or lacks some.
    """
    family = FAMILIES[architecture.family]
    expected = {name: family.fields.get(name, Architecture.model_fields[name].default) for name in FIXED}
    expected |= {name: None for name in NUMBERS if name not in family.numbers.values()}
    if family.window == "none":
        expected["sliding_window"] = None
    if family.window in ("none", "all"):
        expected["global_layers"] = ()
    for name, value in expected.items():
        found = getattr(architecture, name)
        if found != value:
            raise InputError(
                f"a {family.name} checkpoint cannot hold a model with {name}={found!r}; allowed: {value!r}"
            )
    own_base = "local_rope_theta" in family.numbers.values()
    if own_base and architecture.rope_scaling and architecture.sliding_window and not architecture.local_rope_theta:
        raise InputError(
            f"a {family.name} checkpoint cannot hold a model with rope_scaling in its local layers too; allowed: a "
            "local_rope_theta, whose layers are not scaled"
        )
    return family


def named_family(config: dict[str, Any], where: str) -> Family:
    """The family that a config.json names.

    Raises:
        InputError: one that is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        names = (*FAMILIES, *TEXT_MODELS)
        supported = ", ".join(map(repr, names))
        raise InputError(
            f"{where}: model_type={kind!r} is not supported; supported: {supported}{nearest(str(kind), names)}"
        )
    return FAMILIES[kind]
