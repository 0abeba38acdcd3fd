"""config.json of a checkpoint <-> `Architecture`."""

import json
from pathlib import Path
from typing import Any

from qtale_jax.errors import InputError, nearest
from qtale_jax.models.huggingface.families import (
    FAMILIES,
    FULL,
    SLIDING,
    STALE,
    Family,
    family_of,
    named_family,
)
from qtale_jax.models.huggingface.multimodal import text_config
from qtale_jax.models.huggingface.windows import described_windows, windows_of
from qtale_jax.models.specification import Architecture, LinearScaling, ModelSpecification, RopeScaling

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
"""Keys that a config must have, and what `Architecture` calls them."""

LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}

Config = dict[str, Any]


def read_json(file: Path) -> Config:
    """Reads a JSON object.

    Raises:
        InputError: missing, not JSON, or not an object.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged or truncated: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def architecture_from(config: Config, where: str) -> Architecture:
    """The architecture that a config.json describes; absent keys have the defaults of its family.

    Of a checkpoint that takes images too, that of its text model.

    Args:
        config: the parsed file.
        where: its name, for messages.

    Raises:
        InputError: of no supported family, or with parts that this library does not have.
    """
    config, where = text_config(config, where)
    family = named_family(config, where)
    config = {**family.defaults, **config}
    _refuse_unsupported(config, family, where)
    sizes: Config = {ours: _positive(config, theirs, where) for theirs, ours in SIZES.items()}
    heads, hidden = sizes["num_heads"], sizes["hidden_size"]
    if config.get("head_dim") is None and hidden % heads:
        raise InputError(f"{where}: num_attention_heads={heads} does not divide hidden_size={hidden}")
    head_dim = _positive(config, "head_dim", where, hidden // heads)
    if head_dim % 2:
        raise InputError(f"{where}: head_dim={head_dim} is odd; rotary embeddings need an even one")
    kv_heads = _positive(config, "num_key_value_heads", where, heads)
    if heads % kv_heads:
        raise InputError(f"{where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    window, global_layers = windows_of(config, where)
    return Architecture(
        family=config["model_type"],
        **sizes,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_length=_positive(config, "max_position_embeddings", where, family.defaults["max_position_embeddings"]),
        norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
        **_numbers(config, family, where) | _rope(config, family, where),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        sliding_window=window,
        global_layers=global_layers,
        **family.fields,
    )


def _refuse_unsupported(config: Config, family: Family, where: str) -> None:
    for key in family.refused:
        if config.get(key):
            allowed = "false" if config[key] is True else "null"
            raise InputError(f"{where}: {key}={config[key]!r} is not supported; allowed: {allowed}")
    key, names = family.activation
    if config.get(key, names[0]) not in names:
        raise InputError(f"{where}: {key}={config[key]!r} is not supported; supported: {names[0]!r}")


def _numbers(config: Config, family: Family, where: str) -> Config:
    """Fields of the architecture that only some families have a key for; null is None."""
    given = {ours: theirs for theirs, ours in family.numbers.items() if config.get(theirs) is not None}
    return {ours: _number(config, theirs, where) for ours, theirs in given.items()}


def _rope(config: Config, family: Family, where: str) -> Config:
    """Base and scaling, from `rope_scaling` + `rope_theta` or, as transformers 5 writes them, `rope_parameters`.

    Of families whose local layers have a base of their own, `rope_parameters` has an object for each type of layer, and
    `rope_scaling` is that of the global ones.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = _object(config, key, where)
    where_key = f"{where}: {key}"
    local: Config = {}
    if "local_rope_theta" in family.numbers.values():
        nested = bool({FULL, SLIDING} & set(parameters))
        holder = key if nested else "rope_parameters"
        by_type = _object(config, holder, where)
        everywhere, own = (_object(by_type, kind, f"{where}: {holder}") for kind in (FULL, SLIDING))
        if (kind := own.get("rope_type", own.get("type", "default"))) != "default":
            raise InputError(f"{where}: {holder}.{SLIDING}: rope_type={kind!r} is not supported; supported: 'default'")
        if "rope_theta" in own:
            local = {"local_rope_theta": _number(own, "rope_theta", f"{where}: {holder}.{SLIDING}")}
        if nested:
            where_key, parameters = f"{where_key}.{FULL}", everywhere
        else:
            parameters = {**everywhere, **parameters}
    theta = _number(parameters, "rope_theta", where_key, _number(config, "rope_theta", where, 10000.0))
    for holder in (config, parameters):
        if holder.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
            factor = holder["partial_rotary_factor"]
            raise InputError(f"{where}: partial_rotary_factor={factor!r} is not supported; allowed: 1.0")
    return {"rope_theta": theta, "rope_scaling": _scaling(parameters, where_key), **local}


def _scaling(parameters: Config, where: str) -> RopeScaling | LinearScaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=_number(parameters, "factor", where))
    if kind != "llama3":
        supported = ("default", "linear", "llama3")
        hint = nearest(str(kind), supported)
        raise InputError(
            f"{where}: rope_type={kind!r} is not supported; supported: {', '.join(map(repr, supported))}{hint}"
        )
    values = {ours: _number(parameters, theirs, where) for theirs, ours in LLAMA3_KEYS.items()}
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        raise InputError(f"{where}: high_freq_factor must be greater than low_freq_factor, found {values}")
    return RopeScaling(**{**values, "original_length": int(values["original_length"])})


def _object(config: Config, key: str, where: str) -> Config:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"{where}: {key}={found!r} is not an object")
    return found


def _positive(config: Config, key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{where}: {key} is missing{nearest(key, config)}")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise InputError(f"{where}: {key}={value!r}; allowed: a positive integer")
    return value


def _number(config: Config, key: str, where: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{where}: {key} is missing{nearest(key, config)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise InputError(f"{where}: {key}={value!r}; allowed: a positive number")
    return float(value)


def config_for(
    spec: ModelSpecification, original: Config | None, dtype: str, tokens: Config, quantization: Config | None = None
) -> Config:
    """config.json for a model.

    A checkpoint that was converted keeps its own config, unknown keys included; only what the architecture changed, the
    type and what it says about quantization are replaced.

    Args:
        spec: the model.
        original: the config it was converted from, or None.
        dtype: type of the tensors written.
        tokens: `bos_token_id` and the like, for models that have no original config.
        quantization: `quantization_config`; None for tensors in floating point.

    Raises:
        InputError: the family does not have parts that the model has.
    """
    family = family_of(spec.architecture)
    config = {key: value for key, value in (original or {}).items() if key != "quantization_config"}
    if not config or architecture_from(config, "config.json") != spec.architecture:
        for stale in ("rope_parameters", "rope_scaling", "rope_theta", *STALE):
            config.pop(stale, None)
        config = {**tokens, **config, **_described(spec.architecture)}
    config["architectures"] = [family.opened_by]
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = dtype
    return config if quantization is None else {**config, "quantization_config": quantization}


def _described(architecture: Architecture) -> Config:
    """`Architecture` in the older spelling of RoPE, which every version of transformers reads."""
    family, scaling = FAMILIES[architecture.family], architecture.rope_scaling
    rope: Config = {"rope_theta": architecture.rope_theta}
    if scaling is not None:
        keys = LLAMA3_KEYS if scaling.kind == "llama3" else {"factor": "factor"}
        values = {theirs: getattr(scaling, ours) for theirs, ours in keys.items()}
        rope["rope_scaling"] = {"rope_type": scaling.kind, **values}
    return {
        "model_type": architecture.family,
        **{theirs: getattr(architecture, ours) for theirs, ours in SIZES.items()},
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "max_position_embeddings": architecture.max_length,
        "rms_norm_eps": architecture.norm_eps,
        **rope,
        **_described_numbers(architecture, family),
        family.activation[0]: family.activation[1][0],
        "tie_word_embeddings": architecture.tied_head,
        **described_windows(architecture),
        **family.described,
    }


def _described_numbers(architecture: Architecture, family: Family) -> Config:
    """The keys that only some families have; where they have no word for None, what None stands for."""
    found = {theirs: getattr(architecture, ours) for theirs, ours in family.numbers.items()}
    if "query_pre_attn_scalar" in found:
        scalar = architecture.query_pre_attn_scalar or architecture.head_dim
        found["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    if "rope_local_base_freq" in found and architecture.local_rope_theta is None:
        found["rope_local_base_freq"] = architecture.rope_theta
    return found
