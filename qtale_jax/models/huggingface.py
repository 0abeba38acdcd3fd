"""What Hugging Face Llama checkpoints and this package's models have in common: configuration and tensor names.

Both use half-rotation rotary embeddings, so tensors only change their names, and kernels are transposed: (outputs,
inputs) there, (inputs, outputs) here.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from qtale_jax.errors import InputError
from qtale_jax.models.specification import LINEARS, Architecture, RopeScaling

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ROUTERS, ROUTING = "routers.safetensors", "qtale.json"
"""Files of a routed model that Hugging Face does not know: router tensors, and the routing specification."""

ROUTING_FORMAT = 1
"""Version of `qtale.json`."""

_MODULES = {"attention": "self_attn", "mlp": "mlp"}
_PROJECTIONS = dict(zip(LINEARS, ("q", "k", "v", "o", "gate", "up", "down"), strict=True))
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
_ROUTER_LEAVES = (("hidden", "kernel"), ("hidden", "bias"), ("norm", "scale"), ("output", "kernel"), ("output", "bias"))


class Tensor(NamedTuple):
    """A tensor in both worlds: name in the files, path in the parameters, shape in the files."""

    name: str
    path: tuple[str | int, ...]
    shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether it is a kernel, (outputs, inputs) in the files."""
        return self.path[-1] == "kernel"

    @property
    def is_norm(self) -> bool:
        """Whether it stays float32 whatever the type of the kernels."""
        return self.path[-1] == "scale"


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    """All tensors of a model without routers and adapters, in the order of a forward pass."""
    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    yield Tensor("model.embed_tokens.weight", ("embedding", "table"), (vocab, hidden))
    for layer in range(architecture.num_layers):
        for norm, name in _NORMS.items():
            yield Tensor(f"model.layers.{layer}.{name}.weight", ("layers", layer, norm, "scale"), (hidden,))
        for linear in LINEARS:
            part = "mlp" if linear in ("gate", "up", "down") else "attention"
            inputs, outputs = architecture.linear_shape(linear)
            name = f"model.layers.{layer}.{_MODULES[part]}.{_PROJECTIONS[linear]}_proj.weight"
            yield Tensor(name, ("layers", layer, part, linear, "kernel"), (outputs, inputs))
    yield Tensor("model.norm.weight", ("final_norm", "scale"), (hidden,))
    if not architecture.tied_head:
        yield Tensor("lm_head.weight", ("head", "kernel"), (vocab, hidden))


def router_tensors(architecture: Architecture, layers: tuple[int, ...], width: int) -> Iterator[Tensor]:
    """The tensors of `routers.safetensors`; kernels are (outputs, inputs) as in the other files."""
    shapes = ((width, architecture.hidden_size), (width,), (width,), (2, width), (2,))
    for layer in layers:
        for leaf, shape in zip(_ROUTER_LEAVES, shapes, strict=True):
            yield Tensor(f"layers.{layer}.router.{'.'.join(leaf)}", ("layers", layer, "router", *leaf), shape)


def parse_config(config: dict[str, Any], where: str) -> Architecture:
    """The architecture that a `config.json` describes; keys that do not concern it are not looked at.

    Args:
        config: the parsed file; rotary settings may be `rope_theta` and `rope_scaling`, or `rope_parameters`.
        where: the file's name, for messages.

    Raises:
        InputError: a model that this package cannot represent, or keys that are missing or make no sense.
    """
    _refuse_unsupported(config, where)
    missing = [key for key in _SIZES if config.get(key) is None]
    if missing:
        raise InputError(f"{where}: {missing[0]} is missing")
    theta, scaling = _rotary(config, where)
    heads = config["num_attention_heads"]
    sizes = {ours: config[theirs] for theirs, ours in _SIZES.items()}
    try:
        sizes["num_kv_heads"] = _given(config, "num_key_value_heads", heads)
        sizes["head_dim"] = _given(config, "head_dim", config["hidden_size"] // heads)
        architecture = Architecture(
            **sizes,
            max_length=_given(config, "max_position_embeddings", 2048),
            norm_eps=_given(config, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_head=_given(config, "tie_word_embeddings", False),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: {first['loc'][0]} is {first['input']!r}: {first['msg']}") from error
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"{where}: sizes must be positive integers: {error}") from error
    _check_sizes(architecture, where)
    return architecture


def _given(config: dict[str, Any], key: str, default: Any) -> Any:
    """The value of a key; Hugging Face writes null for defaults."""
    value = config.get(key)
    return default if value is None else value


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    supported = {
        "model_type": ("llama", "llama"),
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "mlp_bias": (False, False),
        "quantization_config": (None, None),
    }
    for key, (default, allowed) in supported.items():
        # An absent model_type is not assumed to be Llama: the file might belong to anything.
        found = config.get(key) if key == "model_type" else _given(config, key, default)
        if found != allowed:
            what = found.get("quant_method", "given") if isinstance(found, dict) else found
            raise InputError(f"{where}: {key} is {what!r}; supported: {allowed!r}")


def _rotary(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, in the spelling of transformers 5 (`rope_parameters`) or of earlier versions."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    values = config.get(key) or {}
    if not isinstance(values, dict):
        raise InputError(f"{where}: {key} is {values!r}; expected a mapping or null")
    theta = _given(values, "rope_theta", _given(config, "rope_theta", 10000.0))
    if not isinstance(theta, int | float) or theta <= 0:
        raise InputError(f"{where}: rope_theta is {theta!r}; expected a positive number")
    if _given(values, "partial_rotary_factor", _given(config, "partial_rotary_factor", 1)) != 1:
        raise InputError(f"{where}: partial_rotary_factor is not 1; supported: 1")
    kind = _given(values, "rope_type", values.get("type") or "default")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise InputError(f"{where}: {key}.rope_type is {kind!r}; supported: 'default', 'llama3'")
    names = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
    names["original_max_position_embeddings"] = "original_length"
    numbers = {ours: values.get(theirs) for theirs, ours in names.items()}
    for theirs, ours in names.items():
        if not isinstance(numbers[ours], int | float) or numbers[ours] <= 0:
            raise InputError(f"{where}: {key}.{theirs} is {numbers[ours]!r}; expected a positive number")
    if numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise InputError(f"{where}: {key}.high_freq_factor must be above low_freq_factor")
    try:
        return float(theta), RopeScaling(**numbers)
    except ValidationError as error:
        raise InputError(f"{where}: {key}: {error.errors()[0]['msg']}") from error


def _check_sizes(architecture: Architecture, where: str) -> None:
    for theirs, ours in {**_SIZES, "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}.items():
        if getattr(architecture, ours) <= 0:
            raise InputError(f"{where}: {theirs} is {getattr(architecture, ours)}; expected a positive integer")
    if architecture.num_heads % architecture.num_kv_heads:
        raise InputError(
            f"{where}: num_key_value_heads is {architecture.num_kv_heads}, "
            f"which does not divide num_attention_heads, {architecture.num_heads}"
        )
    if architecture.head_dim % 2:
        raise InputError(f"{where}: head_dim is {architecture.head_dim}; rotary embeddings need an even number")


def build_config(architecture: Architecture, dtype: str, original: dict[str, Any] | None) -> dict[str, Any]:
    """The `config.json` of a model; an original configuration that says the same is returned as it is."""
    if original is not None and parse_config(original, CONFIG) == architecture:
        return original
    built: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(architecture, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "max_position_embeddings": architecture.max_length,
        "rms_norm_eps": architecture.norm_eps,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": architecture.tied_head,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }
    scaling = architecture.rope_scaling
    if scaling is not None:
        built["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    extra = {key: value for key, value in (original or {}).items() if key not in (*built, "rope_parameters", "dtype")}
    return {**built, **extra}
