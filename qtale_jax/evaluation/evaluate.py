"""Evaluating one model: accuracy on multiple choice, nats per token, what was executed, what it costs."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtale_jax.artifact import LoadedModel, weight_bytes
from qtale_jax.config.schema import Config
from qtale_jax.data.records import Choice, Document, Record, is_continuous
from qtale_jax.data.sources import read
from qtale_jax.data.tokens import encode_pairs, pieces, tokenize, truncate
from qtale_jax.evaluation.likelihood import HISTOGRAM_EDGES, Counted, Likelihoods, Row, likelihoods
from qtale_jax.evaluation.rouge import written_responses
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.cost import flops_per_token
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.forward import forward
from qtale_jax.models.placement import mesh_of, stack_on_mesh, stacked_shardings
from qtale_jax.models.policy import Policy
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.models.stacking import can_stack, stack_layers
from qtale_jax.parallel.axes import constrain


@dataclass(frozen=True)
class Accuracy:
    """Accuracy per task and their mean, with the standard error of the mean over tasks."""

    tasks: dict[str, float]
    mean: float
    standard_error: float


def choice_rows(examples: Sequence[Choice], tokenizer: Any) -> tuple[list[Row], np.ndarray]:
    """One row per choice, and which example each row belongs to."""
    owners = np.repeat(np.arange(len(examples)), [len(example.choices) for example in examples])
    pairs = [(example.query, " " + choice) for example in examples for choice in example.choices]
    return [Row(*tokens) for tokens in encode_pairs(tokenizer, pairs)], owners


def score_choices(examples: Sequence[Choice], owners: np.ndarray, found: Likelihoods, normalize: bool) -> Accuracy:
    """The choice with the highest log-likelihood, per token if `normalize`, is the answer; ties go to the first."""
    scores = found.log_likelihood / found.tokens if normalize else found.log_likelihood
    hits: dict[str, list[bool]] = {}
    for index, example in enumerate(examples):
        hits.setdefault(example.task, []).append(int(np.argmax(scores[owners == index])) == example.gold)
    tasks = {task: float(np.mean(values)) for task, values in hits.items()}
    variances = [np.mean(v) * (1 - np.mean(v)) / len(v) for v in hits.values()]
    return Accuracy(tasks, float(np.mean(list(tasks.values()))), math.sqrt(sum(variances)) / len(tasks))


def nats_per_token(found: Likelihoods) -> tuple[float, float | None]:
    """Mean negative log-likelihood per token and its standard error, rows being the independent units.

    One row has no standard error.
    """
    nats, tokens = -found.log_likelihood, found.tokens
    mean = float(nats.sum() / tokens.sum())
    if len(nats) < 2:
        return mean, None
    residual = nats - mean * tokens
    return mean, float(np.sqrt(len(nats) / (len(nats) - 1) * np.sum(residual**2)) / tokens.sum())


def per_task(records: Sequence[Record], limit: int | None) -> list[Record]:
    """The first `limit` records of every task."""
    seen: dict[str, int] = {}
    kept = []
    for record in records:
        task = record.task if isinstance(record, Choice) else ""
        seen[task] = seen.get(task, 0) + 1
        if limit is None or seen[task] <= limit:
            kept.append(record)
    return kept


def likelihood_rows(records: Sequence[Record], tokenizer: Any, config: Config, limit: int | None = None) -> list[Row]:
    """One row per record: the gold response, or the whole document cut to `data.length`.

    Of a continuous text its pieces of that length, the first `limit` of them.
    """
    tokens = tokenize(records, tokenizer, config.data.loss_on)
    if is_continuous(records):
        return [Row(*piece) for piece in pieces(tokens, config.data.length)[:limit]]
    policy = "right" if isinstance(records[0], Document) else config.data.truncation
    kept, _ = truncate(tokens, config.data.model_copy(update={"truncation": policy}))
    return [Row(*entry) for entry in kept if entry.start < len(entry.ids)]


def layout(spec: ModelSpecification, params: Parameters) -> Parameters:
    """Stacked where possible: one compiled layer instead of all of them; on the mesh that the parameters are on."""
    if not can_stack(spec):
        return params
    mesh = mesh_of(params)
    if mesh is None:
        return stack_layers(spec, params)
    return stack_on_mesh(spec, dict(params), stacked_shardings(spec, mesh))


def cost(spec: ModelSpecification, counted: Counted) -> dict[str, Any]:
    """Executed share per layer and FLOPs per token, from the decisions taken."""
    shares = (counted.executed / counted.tokens).tolist()
    contexts = (counted.keys / np.maximum(counted.executed, 1.0)).tolist()
    return {"executed_per_layer": shares, "flops_per_token": flops_per_token(spec, shares, contexts)}


def routing_summary(counted: Counted) -> dict[str, Any]:
    """Mean |logit gap|, expected flip rate under Gumbel noise, histogram; empty values for a dense model."""
    if counted.decisions == 0:
        return {"gap_histogram": None, "logit_gap_mean": None, "flip_rate": None}
    return {
        "gap_histogram": {"edges": HISTOGRAM_EDGES.tolist(), "counts": counted.histogram.tolist()},
        "logit_gap_mean": float(counted.gap / counted.decisions),
        "flip_rate": float(counted.flips / counted.decisions),
    }


def execution_maps(
    spec: ModelSpecification,
    params: Parameters,
    rows: Sequence[Row],
    tasks: Sequence[str],
    policy: Policy,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """What each token of a few examples executes, with its probabilities."""
    if spec.routing is None or not rows:
        return []
    width = max(len(row.ids) for row in rows)
    tokens = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row.ids)] = row.ids
    lengths = np.asarray([len(row.ids) for row in rows], np.int32)
    mesh = mesh_of(params)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        execute, probability = map(np.asarray, _decisions(spec.structure, params, tokens, lengths, policy))
    return [
        {
            "tokens": tokenizer.convert_ids_to_tokens(list(row.ids)),
            "execute": execute[i, : len(row.ids)].tolist(),
            "probability": probability[i, : len(row.ids)].tolist(),
            "always_on_layers": spec.routing.always_on_layers,
            "task": task,
        }
        for i, (row, task) in enumerate(zip(rows, tasks, strict=True))
    ]


@functools.partial(jax.jit, static_argnames="spec")
def _decisions(spec, params, tokens, lengths, policy):
    routing = forward(spec, params, tokens, lengths=lengths, policy=policy).routing
    return tuple(constrain(x, None, None, None) for x in (routing.execute, routing.probability))


def evaluated_records(config: Config) -> list[Record]:
    """What is evaluated: the first `evaluate.max_examples` records of every task of `evaluate.split`."""
    data = config.data.model_copy(update={"tasks": config.evaluate.tasks or config.data.tasks})
    return per_task(read(data, config.evaluate.split), config.evaluate.max_examples)


def evaluate(
    model: LoadedModel,
    config: Config,
    *,
    theta: float | None = None,
    point: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluates a model on `evaluate.split`.

    Args:
        model: a loaded model directory.
        config: data and evaluate sections.
        theta: one threshold for all layers; default: `evaluate.threshold`, or the model's own.
        point: label of how theta was set, for reports; default: from the model's calibration.
        progress: called with the number of rows done.

    Returns:
        The evaluation file's content: `row` is one row of results.json, beside it what reports draw.
    """
    spec, tokenizer = model.spec, model.tokenizer
    theta = config.evaluate.threshold if theta is None and spec.routing else theta
    params, policy = layout(spec, model.params), inference_policy(spec, theta)
    records = evaluated_records(config)
    dtype = jnp.dtype(config.train.compute_dtype)
    settings = {"batch_size": config.evaluate.batch_size, "compute_dtype": dtype, "progress": progress}
    gold_rows = likelihood_rows(records, tokenizer, config, config.evaluate.max_examples)
    gold = likelihoods(spec, params, gold_rows, policy, **settings) if _needs_nats(records, config) else None
    nats, error = nats_per_token(gold) if gold else (None, None)
    accuracy, counted = None, gold
    choices = [record for record in records if isinstance(record, Choice)]
    if choices:
        rows, owners = choice_rows(choices, tokenizer)
        counted = likelihoods(spec, params, rows, policy, **settings)
        accuracy = score_choices(choices, owners, counted, config.evaluate.normalize)
        error = accuracy.standard_error
    assert counted is not None
    written = written_responses(model, records, policy, config, progress) if config.evaluate.rouge else None
    costs = cost(spec, counted.counted)
    format = spec.quantization.main_format if spec.quantization else None
    thetas = spec.thresholds if theta is None else (theta,)
    routing = spec.routing.method if spec.routing else "dense"
    sizes = weight_bytes(model.params)
    return {
        "row": {
            "model": config.evaluate.name or routing,
            "routing": routing,
            "quantizer": _quantizer(spec),
            "bits": spec.bits,
            "group_size": format.group_size if format else -1,
            "theta": float(np.mean(thetas)) if spec.routing else None,
            "executed_ratio": counted.executed_ratio * spec.kept_share,
            "accuracy": {**accuracy.tasks, "mean": accuracy.mean} if accuracy else None,
            "standard_error": error,
            "nats_per_token": nats,
            "weight_bytes": sizes["total"],
            "flops_per_token": costs["flops_per_token"],
            "seed": model.provenance.get("seed") or 0,
        },
        "point": point or default_point(spec, theta),
        "bytes": {part: size for part, size in sizes.items() if part != "total"},
        "executed_per_layer": costs["executed_per_layer"],
        "executed_ratio_scored": counted.executed_ratio_scored * spec.kept_share,
        **routing_summary(counted.counted),
        "written": written,
        "maps": execution_maps(spec, params, *_examples(records, tokenizer, config), policy, tokenizer),
    }


def _quantizer(spec: ModelSpecification) -> str:
    """The method that made the weights, with "-a8" where activations are rounded too; "none"."""
    if spec.quantization is None:
        return "none"
    return spec.quantization.method + ("-a8" if spec.quantization.main_format.activation_bits == 8 else "")


def _needs_nats(records: Sequence[Record], config: Config) -> bool:
    return config.evaluate.perplexity or not isinstance(records[0], Choice)


def _examples(records: Sequence[Record], tokenizer: Any, config: Config) -> tuple[list[Row], list[str]]:
    """The first record of each of the first `evaluate.maps` tasks, or the first records of a single task."""
    count = config.evaluate.maps
    firsts = per_task(records, 1)
    chosen = (firsts if len(firsts) > 1 else list(records))[:count]
    rows = [Row(tokens.ids[:48], 1) for tokens in tokenize(chosen, tokenizer, "all")] if chosen else []
    return rows, [record.task if isinstance(record, Choice) else config.data.kind for record in chosen]


def default_point(spec: ModelSpecification, theta: float | None) -> str:
    """How theta came about: given, calibrated to a ratio, or the one of training."""
    calibration = spec.routing.calibration.get(str(spec.bits)) if spec.routing and theta is None else None
    if calibration:
        objective = calibration["objective"]
        return f"ratio {calibration['ratio']:.2f}" if objective == "ratio" else objective
    values = (theta,) if theta is not None else spec.thresholds or (0.5,)
    return f"threshold {np.mean(values):.2f}"
