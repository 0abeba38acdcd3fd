"""From a YAML file and `key=value` overrides to a checked `Config`, and back to plain data."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from qtale_jax.config.document import (
    COMMAND_LINE,
    Document,
    assign,
    drop_refused,
    merge,
    parse_assignment,
    read_document,
)
from qtale_jax.config.explain import explain
from qtale_jax.config.presets import with_preset
from qtale_jax.config.schema import Config, ExperimentConfig, RoutingConfig
from qtale_jax.errors import InputError

Overrides = Mapping[str, Any] | Sequence[str]

ROUTING_METHODS: tuple[str, ...] = get_args(RoutingConfig.model_fields["method"].annotation)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, lays `key=value` overrides on it and checks the result, grid of methods included.

    Args:
        path: YAML file; `extends: other.yaml` in it, relative to it, names a file to start from.
        overrides: `section.key=value`, the value read as YAML; later ones win.

    Raises:
        InputError: anything wrong with the file, a key, a value or a combination, in one line.
    """
    document = read_document(path)
    _apply(document, overrides)
    config = _validate(document, str(path))
    _check_experiment(config, str(path))
    return config


def with_overrides(config: Config, overrides: Overrides, *, source: str = "overrides") -> Config:
    """Returns `config` with overrides laid on it.

    Args:
        config: what to start from; only the values that were set explicitly are inherited as such, so that defaults
            which depend on others stay defaults.
        overrides: a nested mapping, merged key by key, or a list of `key=value`, each replacing what it names. Either
            way a new `routing.method` drops an inherited `routing.entropy_weight` or `train.skipped_share` that it has
            no use for.
        source: named in messages.

    Raises:
        InputError: an unknown key, a bad value or an impossible combination.
    """
    document = Document(config.model_dump(mode="json", exclude_unset=True))
    if isinstance(overrides, Mapping):
        document.values = merge(document.values, dict(overrides))
    else:
        _apply(document, overrides)
        document.origins = {}
    return _validate(document, source)


def base_config(config: Config, *, source: str = "configuration") -> Config:
    """Returns the configuration that trains the base of an experiment: dense, all parameters, from nothing.

    `experiment.base` is laid on `config` without its grid and with `routing.method: dense`, `lora: null`,
    `train.parameters: all`, and neither distillation nor quantization-aware training.

    Raises:
        InputError: an override with an unknown key, a bad value or an impossible combination.
    """
    implied = {
        "routing": {"method": "dense"},
        "lora": None,
        "model": {"drop": {"keep": 1.0}},
        "train": {
            "parameters": "all",
            "distillation": {"weight": 0.0, "hidden_weight": 0.0},
            "quantization_aware": {"formats": []},
        },
    }
    return _with_part(config, merge(implied, config.experiment.base or {}), f"{source}: experiment.base")


def method_config(config: Config, name: str, *, base: str | None = None, source: str = "configuration") -> Config:
    """Returns the configuration of one entry of `experiment.methods`, without the grid.

    An entry whose name is a routing method (`dense`, `dllm`, `qtale`) is that method unless it says otherwise.

    Args:
        config: the experiment.
        name: a key of `experiment.methods`.
        base: model directory to start from, when the experiment trained one.
        source: named in messages.

    Raises:
        InputError: an override with an unknown key, a bad value or an impossible combination.
    """
    implied: dict[str, Any] = {"routing": {"method": name}} if name in ROUTING_METHODS else {}
    if base is not None:
        implied["model"] = {"path": base}
    overrides = merge(implied, config.experiment.methods[name])
    return _with_part(config, overrides, f"{source}: experiment.methods.{name}")


def resolve(config: Config) -> dict[str, Any]:
    """Returns every key with its value as nested plain data; loading it again gives an equal `resolve`."""
    values = config.model_dump(mode="json")
    if config.routing.method == "dllm":
        values["routing"]["entropy_weight"] = 0.0  # as applied; the default would be refused when it is read again
    return values


def _with_part(config: Config, overrides: dict[str, Any], source: str) -> Config:
    for key in ("experiment", "output", "seed"):
        if key in overrides:
            raise InputError(f"{source}: found {key!r}, which belongs to the whole experiment; allowed: other sections")
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"experiment"})
    return _validate(Document(merge(values, overrides)), source)


def _apply(document: Document, assignments: Sequence[str]) -> None:
    """Carries out `key=value` assignments in place."""
    defaults = {"experiment": Config().experiment.model_dump(mode="json", include={"methods", "quantizers"})}
    paths = []
    for text in assignments:
        path, value = parse_assignment(text)
        assign(document.values, path, value, defaults)
        document.origins = {key: origin for key, origin in document.origins.items() if key[: len(path)] != path}
        document.origins[path] = COMMAND_LINE
        paths.append(path)
    if ("routing", "method") in paths:
        drop_refused(document.values, paths)


def _validate(document: Document, source: str) -> Config:
    try:
        return Config.model_validate(with_preset(document.values))
    except ValidationError as error:
        raise InputError(explain(error, document, source)) from None


def _check_experiment(config: Config, source: str) -> None:
    """Validates the overrides of the grid now rather than hours into it."""
    experiment = config.experiment
    if experiment.base is None and experiment.methods == ExperimentConfig().methods:
        return  # no grid was asked for: a training run need not be able to become each of the methods
    if experiment.base is not None:
        if config.model.path is not None:
            raise InputError(
                f"{source}: experiment.base trains from nothing, but model.path={config.model.path!r} is given; "
                "allowed: one of them"
            )
        base_config(config, source=source)
    for name, overrides in experiment.methods.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.@-]*", name):
            raise InputError(
                f"{source}: experiment.methods: found the name {name!r}; allowed: letters, digits, '_', '.', '-', '@'"
            )
        if name != "dense" or overrides:
            base = None if experiment.base is None else f"{config.output}/base"
            method_config(config, name, base=base, source=source)
