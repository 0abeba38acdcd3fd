"""Calibrating one model: measure on calibration data, search, store theta for the model's bit width."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from qtale_jax.artifact import LoadedModel
from qtale_jax.calibration.latency import LatencyTable, decoding_shares
from qtale_jax.calibration.threshold import Found, OutOfReach, search_budget, search_quality, search_ratio
from qtale_jax.config.schema import Config
from qtale_jax.data.records import Choice, Record, is_continuous
from qtale_jax.data.sources import read
from qtale_jax.errors import InputError
from qtale_jax.evaluation.evaluate import choice_rows, layout, likelihood_rows, nats_per_token, score_choices
from qtale_jax.evaluation.likelihood import Row, likelihoods
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.specification import ModelSpecification, RoutingSpecification


def calibration_records(config: Config) -> list[Record]:
    """The first `calibrate.examples` rows of the calibration split; of a continuous text the whole, to be cut.

    Raises:
        InputError: there are fewer rows than asked for.
    """
    records = read(config.data, "calibration")
    if not is_continuous(records) and len(records) < config.calibrate.examples:
        raise InputError(
            f"calibrate.examples={config.calibrate.examples}, but the calibration split has only {len(records)} rows; "
            "raise data.held_out or lower it"
        )
    return records[: config.calibrate.examples]


def _digest(records: list[Record]) -> str:
    text = json.dumps([dataclasses.asdict(record) for record in records], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def calibration_rows(records: list[Record], tokenizer: Any, config: Config) -> tuple[list[Row], np.ndarray | None]:
    """The rows that evaluation would run, and for choices the question that each belongs to.

    Every choice is run, since tokens of answers execute more than those of questions.
    """
    choices = [record for record in records if isinstance(record, Choice)]
    if choices:
        return choice_rows(choices, tokenizer)
    return likelihood_rows(records, tokenizer, config, config.calibrate.examples), None


def search(model: LoadedModel, config: Config, records: list[Record], table: LatencyTable | None = None) -> Found:
    """Finds theta for a loaded, routed model.

    Raises:
        InputError: no theta up to `calibrate.max_threshold` meets the budget.
    """
    settings, spec = config.calibrate, model.spec
    params = layout(spec, model.params)
    choices = [record for record in records if isinstance(record, Choice)]
    rows, owners = calibration_rows(records, model.tokenizer, config)
    batch = {"batch_size": config.evaluate.batch_size, "compute_dtype": jnp.dtype(config.train.compute_dtype)}
    if settings.objective == "ratio":
        return search_ratio(
            lambda theta: likelihoods(spec, params, rows, inference_policy(spec, theta), **batch).executed_ratio,
            settings.ratio,
            settings.tolerance,
            settings.max_threshold,
        )
    if settings.objective == "budget":
        assert table is not None and spec.routing is not None, "measured before"
        always_on_tokens = spec.routing.always_on_tokens
        scored = [(row.start - 1, len(row.ids) - 1) for row in rows]  # what writes a response, token by token

        def predicted(theta: float) -> tuple[float, float]:
            found = likelihoods(spec, params, rows, inference_policy(spec, theta), **batch)
            counted = found.counted
            executed, tokens = np.asarray(counted.executed_scored), float(counted.scored)
            shares = decoding_shares(executed, tokens, scored, always_on_tokens)
            return table.step_seconds(shares), found.executed_ratio

        try:
            return search_budget(predicted, config.budget.seconds, settings.tolerance, settings.max_threshold)
        except OutOfReach as error:
            raise InputError(_out_of_reach(config, table, error)) from None

    def quality(theta: float) -> tuple[float, float]:
        found = likelihoods(spec, params, rows, inference_policy(spec, theta), **batch)
        if owners is None:  # a difference of this logarithm is a difference in percent of nats
            return -100 * math.log(nats_per_token(found)[0]), found.executed_ratio
        return 100 * score_choices(choices, owners, found, config.evaluate.normalize).mean, found.executed_ratio

    return search_quality(quality, settings.within)


def _out_of_reach(config: Config, table: LatencyTable, error: OutOfReach) -> str:
    assert config.budget.asked is not None, "checked with the objective"
    name, value = config.budget.asked
    if name == "tokens_per_second":
        low, high = table.rows / error.slowest, table.rows / error.fastest
        allowed = f"up to {_rounded(high, math.floor):.4g}"
    else:
        low, high = 1000 * error.slowest, 1000 * error.fastest
        allowed = f"{_rounded(high, math.ceil):.4g} or more"
    rows, highest = f"{table.rows} row{'s' if table.rows > 1 else ''}", config.calibrate.max_threshold
    return (
        f"budget.{name}={value:g} is out of reach for {rows} after {table.context} tokens on {table.hardware}: "
        f"predicted are {low:.4g} at theta 0 to {high:.4g} at calibrate.max_threshold={highest:g}; "
        f"allowed: {allowed}"
    )


def _rounded(value: float, whole: Callable[[float], int]) -> float:
    """Four digits of a positive number, rounded to the side that can be reached."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return whole(value / unit) * unit


def check_calibrated(spec: ModelSpecification, tokenizer: Any) -> RoutingSpecification:
    """The routing of a model that can be calibrated.

    Raises:
        InputError: the model is dense, or has no tokenizer.
    """
    if spec.routing is None:
        raise InputError("calibrate.model has no routers: a dense model has no threshold")
    if tokenizer is None:
        raise InputError("calibrate.model has no tokenizer")
    return spec.routing


def calibrate(model: LoadedModel, config: Config, table: LatencyTable | None = None) -> tuple[LoadedModel, Found]:
    """Returns the model with theta for its bit width, and how it was found.

    Args:
        model: a routed model.
        config: data, calibrate and budget.
        table: what speed is predicted from; needed where the objective is a budget.

    Raises:
        InputError: the model is dense, has no tokenizer, there is too little calibration data, or the budget is out of
            reach.
    """
    spec, routing = model.spec, check_calibrated(model.spec, model.tokenizer)
    records = calibration_records(config)
    found, settings, bits = search(model, config, records, table), config.calibrate, str(spec.bits)
    note = {
        "objective": settings.objective,
        "ratio": settings.ratio if settings.objective == "ratio" else found.ratio,
        "reached": found.ratio,
        "theta": found.theta,
        "examples": settings.examples if is_continuous(records) else len(records),
        "data": {"kind": config.data.kind, "split": "calibration", "sha256": _digest(records)},
        "path": [list(point) for point in found.path],
    }
    if table is not None:
        note["budget"] = _budget_note(config, table, found)
    routing = routing.model_copy(
        update={
            "thresholds": {**routing.thresholds, bits: (found.theta,) * len(spec.routed_layers)},
            "calibration": {**routing.calibration, bits: note},
        }
    )
    return dataclasses.replace(model, spec=spec.model_copy(update={"routing": routing})), found


def _budget_note(config: Config, table: LatencyTable, found: Found) -> dict[str, Any]:
    """What was asked for and what is predicted, at theta and along the path."""
    assert config.budget.asked is not None, "checked with the objective"
    name, value = config.budget.asked
    return {
        name: value,
        "batch_size": table.rows,
        "context": table.context,
        "hardware": table.hardware,
        "predicted_tokens_per_second": table.tokens_per_second(found.step_seconds),
        "predicted_milliseconds_per_token": 1000 * found.step_seconds,
        "path_tokens_per_second": [table.tokens_per_second(seconds) for seconds in found.seconds],
    }
