"""Where the stages of a run find and leave their model directories, when a configuration does not say."""

import hashlib
import json
from pathlib import Path

from qtale_jax.config.schema import Config, QuantizeConfig
from qtale_jax.errors import InputError

HELD_OUT = "held_out"
"""Folder of an experiment, beside `evaluation`, with what `experiment.held_out_tasks` gave."""


def quantizer_name(config: QuantizeConfig) -> str:
    """A short name such as "rtn-4bit-g128-sym", different for different settings; "float" for 16 bits."""
    if config.bits == 16:
        return "float"
    group = "" if config.group_size == -1 else f"-g{config.group_size}"
    parts = f"{'-sym' if config.symmetric else ''}{'-a8' if config.activation_bits == 8 else ''}"
    return f"{config.method}-{config.bits}bit{group}{parts}{_other_settings(config)}"


def _other_settings(config: QuantizeConfig) -> str:
    """A few letters that stand for the settings which a name does not spell out; nothing if all are the defaults."""
    spelt = {"model", "output", "method", "bits", "group_size", "symmetric", "activation_bits"}
    others = config.model_dump(mode="json", exclude=spelt, exclude_defaults=True)
    return f"-{hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:6]}" if others else ""


def trained(config: Config) -> Path:
    """The fine-tuned model."""
    return Path(config.output) / "trained"


def quantized(config: Config) -> Path:
    """What `quantize` writes."""
    return Path(config.quantize.output or Path(config.output) / quantizer_name(config.quantize))


def newest(config: Config) -> Path:
    """The model that evaluation and generation use by default: calibrated, else quantized, else trained.

    Raises:
        InputError: none of them is there.
    """
    candidates = (calibrated(config), quantized(config), trained(config))
    for path in candidates:
        if path.exists():
            return path
    raise InputError(f"no model in {config.output}: none of {', '.join(p.name for p in candidates)} is there")


def calibrated(config: Config) -> Path:
    """What `calibrate` writes."""
    source = Path(config.calibrate.model or quantized(config))
    return Path(config.calibrate.output or source.with_name(f"{source.name}-calibrated"))
