"""Which matrix gets which format: the quantizer's own settings, then the rules that match."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from qtale_jax.config.schema import QuantizationRuleConfig, QuantizeConfig
from qtale_jax.errors import InputError
from qtale_jax.models.specification import LINEARS, ModelSpecification, TensorFormat
from qtale_jax.quantization.rounding import validate


def formats_of(spec: ModelSpecification, config: QuantizeConfig) -> dict[str, TensorFormat]:
    """The formats of `QuantizationSpecification`, in the order in which matrices are quantized.

    Raises:
        InputError: a group size that does not divide, a rule that matches nothing, bits for a head that the
            model does not have, or a quantizer that leaves every linear in floating point.
    """
    layers = range(spec.architecture.num_layers)
    names = [f"{layer}/{name}" for layer in layers for name in LINEARS]
    _check_rules(config.rules, names)
    formats, keys = {}, {name: _group_size_key(name, config) for name in names}
    inputs: dict[str, set[int]] = {}
    for name, key in keys.items():
        if _format(name, config) is not None:
            inputs.setdefault(key, set()).add(spec.architecture.linear_shape(name.split("/")[1])[0])
    for layer in layers:
        # A dense model has no routers, and is quantized beside routed ones by the same settings.
        if config.router_bits != 16 and layer in spec.layers_with_router:
            formats[f"{layer}/router"] = _plain(config)
        for name in LINEARS:
            full = f"{layer}/{name}"
            format = _format(full, config)
            if format is not None:
                width, key = spec.architecture.linear_shape(name)[0], keys[full]
                validate(format, width, f"linear {full!r}", key, inputs[key])
                formats[full] = format
    if not formats.keys() & set(names):
        raise InputError("quantize.rules leave every linear in floating point; allowed: rules for some of them")
    return formats | _ends(spec, config)


def _check_rules(rules: Sequence[QuantizationRuleConfig], names: Sequence[str]) -> None:
    for index, rule in enumerate(rules):
        if not any(fnmatchcase(name, rule.match) for name in names):
            raise InputError(
                f"quantize.rules.{index}.match={rule.match!r} matches no linear; the names are "
                f"LAYER/LINEAR, from {names[0]} to {names[-1]}, with LINEAR one of {', '.join(LINEARS)}"
            )


def _format(name: str, config: QuantizeConfig) -> TensorFormat | None:
    settings = {"bits": config.bits, "group_size": config.group_size, "symmetric": config.symmetric}
    for rule in config.rules:
        if fnmatchcase(name, rule.match):
            settings |= {key: value for key in settings if (value := getattr(rule, key)) is not None}
    if settings["bits"] == 16:
        return None
    return TensorFormat(**settings, scale_dtype=config.scale_dtype, activation_bits=config.activation_bits)


def _group_size_key(name: str, config: QuantizeConfig) -> str:
    """The configuration key that says the group size of a linear."""
    key = "quantize.group_size"
    for index, rule in enumerate(config.rules):
        if rule.group_size is not None and fnmatchcase(name, rule.match):
            key = f"quantize.rules.{index}.group_size"
    return key


def _plain(config: QuantizeConfig) -> TensorFormat:
    """8 bits, one scale per output channel: for what is read once per token or decides the routing."""
    return TensorFormat(bits=8, symmetric=True, scale_dtype=config.scale_dtype)


def _ends(spec: ModelSpecification, config: QuantizeConfig) -> dict[str, TensorFormat]:
    if config.head_bits != 16 and spec.architecture.tied_head:
        raise InputError(
            f"quantize.head_bits={config.head_bits}: the model's head is its embedding; use quantize.embedding_bits"
        )
    wanted = {"embedding": config.embedding_bits, "head": config.head_bits}
    return {name: _plain(config) for name, bits in wanted.items() if bits != 16}
