"""Running the harness on a model directory, with what each task executed beside the harness's metrics."""

import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate

from qtale_jax.artifact import LoadedModel, weight_bytes
from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError
from qtale_jax.evaluation.evaluate import cost, default_point
from qtale_jax.evaluation.harness.adapter import HarnessModel, TaskCounts
from qtale_jax.evaluation.harness.tasks import load_tasks
from qtale_jax.models.specification import ModelSpecification


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keeps the harness's remarks on its own settings off the console; errors are shown."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def evaluate_harness(
    model: LoadedModel, config: Config, *, progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Runs `harness.tasks` on a model.

    Args:
        model: a loaded model directory.
        config: harness and evaluate sections; batch size, threshold and name are those of `evaluate`.
        progress: called with the number of requests done.

    Returns:
        The result file's content: `row` says which model it was and what it executed over all tasks, `tasks` has the
        metrics, counts and cost of every task, `groups` the metrics that the harness aggregates.

    Raises:
        InputError: an unknown task, data that cannot be had, or a task that the model cannot answer.
    """
    settings, spec = config.harness, model.spec
    if settings.chat_template and not getattr(model.tokenizer, "chat_template", None):
        raise InputError("harness.chat_template: the model's tokenizer has no chat template; allowed: false")
    theta = config.evaluate.threshold if spec.routing else None
    lm = HarnessModel(
        model,
        theta=theta,
        batch_size=config.evaluate.batch_size,
        compute_dtype=config.train.compute_dtype,
        max_new_tokens=settings.max_new_tokens,
        progress=progress,
    )
    with quiet_harness():
        loaded = load_tasks(settings)
        for task in loaded["tasks"].values():
            _set_examples(task, settings.num_fewshot, config.seed)
        found = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            log_samples=settings.samples,
        )
    if found is None:
        raise InputError("harness: lm-evaluation-harness gave no results; it runs in one process")
    thetas = spec.thresholds if theta is None else (theta,)
    total = TaskCounts()
    for counts in lm.counts.values():
        total.add(counts.counted)
    return {
        "row": {
            "model": config.evaluate.name or (spec.routing.method if spec.routing else "dense"),
            "routing": spec.routing.method if spec.routing else "dense",
            "quantizer": spec.quantization.method if spec.quantization else "none",
            "bits": spec.bits,
            "theta": float(np.mean(thetas)) if spec.routing else None,
            "weight_bytes": weight_bytes(model.params)["total"],
            "seed": model.provenance.get("seed") or 0,
            **_cost(spec, total),
        },
        "point": default_point(spec, theta),
        "tasks": {name: _task(spec, name, lm.counts[name], found) for name in loaded["tasks"]},
        "groups": {name: _metrics(values) for name, values in (found.get("groups") or {}).items()},
        **({"samples": _samples(found)} if settings.samples else {}),
        "settings": {"limit": settings.limit, "chat_template": settings.chat_template, "split": "the task's own"},
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "datasets", "transformers")},
    }


def _set_examples(task: Any, count: int | None, seed: int) -> None:
    """Sets how many examples a prompt has: `count`, except where a task is defined to have none, or its own number."""
    own = task.get_config("num_fewshot")
    if count is not None and own != 0:
        task.set_config(key="num_fewshot", value=count)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


def _task(spec: ModelSpecification, name: str, counts: TaskCounts, found: Any) -> dict[str, Any]:
    values = found["results"][name]
    return {
        "metrics": _metrics(values),
        "documents": found["n-samples"][name]["effective"],
        "requests": counts.requests,
        "truncated": counts.truncated,
        "few_shot": found["n-shot"].get(name, 0),
        "version": found["versions"].get(name),
        **_cost(spec, counts),
    }


def _samples(found: Any) -> dict[str, list[Any]]:
    """The responses to every document of every task, in the order of documents and of choices."""
    return {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers only, as `acc`, `acc_stderr`; a filter's name is kept where it is not the plain one."""
    named = {}
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if filter_name and (value == "N/A" or isinstance(value, (int, float))):
            suffix = "" if filter_name == "none" else f",{filter_name}"
            named[metric + suffix] = None if value == "N/A" else float(value)
    return named


def _cost(spec: ModelSpecification, counts: TaskCounts) -> dict[str, Any]:
    """Executed share of all tokens and layers, FLOPs per token, tokens run."""
    counted = counts.counted
    if counted is None:
        return {"executed_ratio": None, "flops_per_token": None, "tokens": 0}
    share = float(np.sum(counted.executed) / (counted.tokens * counted.executed.shape[0])) * spec.kept_share
    return {
        "executed_ratio": share,
        "flops_per_token": cost(spec, counted)["flops_per_token"],
        "tokens": int(counted.tokens),
    }
