"""Experiment configuration: typed sections, YAML files, `key=value` overrides."""

from qtale_jax.config.loading import load_config, resolve, with_overrides
from qtale_jax.config.schema import Config

__all__ = ["Config", "load_config", "resolve", "with_overrides"]
