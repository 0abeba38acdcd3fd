"""From an experiment's configuration to jobs: train the base, fine-tune every method and seed, then measure each."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qtale_jax.artifact.document import read_model_json
from qtale_jax.config import resolve
from qtale_jax.config.experiment import shown
from qtale_jax.config.loading import base_config, method_config, with_overrides
from qtale_jax.config.schema import Config, ExperimentConfig, QuantizeConfig
from qtale_jax.errors import InputError
from qtale_jax.paths import HELD_OUT, quantizer_name

Stage = Literal["train", "quantize", "calibrate", "evaluate"]


UNREAD = ("experiment", "distributed", "profile", "plan", "generate", "serve")
"""Sections that no stage of an experiment reads, or that change nothing about what it finds."""


@dataclass(frozen=True)
class Step:
    """One stage with its configuration; `output` appears when it is done, `parent` tells what it starts from."""

    stage: Stage
    config: Config
    output: Path
    parent: str = ""

    def fingerprint(self) -> str:
        """Identifies what was asked for: equal fingerprints need not run again."""
        asked = {name: value for name, value in resolve(self.config).items() if name not in UNREAD}
        text = json.dumps([self.stage, asked, self.parent], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """Steps that run one after the other in one process, after the jobs named in `needs`."""

    name: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...] = ()


def plan(config: Config) -> list[Job]:
    """The jobs of an experiment, in an order in which they could run one by one.

    Raises:
        InputError: there is nothing to start from, an override is wrong, or an asked threshold would be shown as the
            trained one is.
    """
    if config.distributed.enabled:
        raise InputError("distributed.enabled=true: an experiment runs in one process; allowed: train with it")
    root, jobs, last_looks = Path(config.output), [], []
    if config.experiment.base is None:
        base, base_needs, base_parent = str(config.model.path), (), _document(config.model.path)
    else:
        step = Step("train", _at(base_config(config), root / "base"), root / "base" / "trained")
        base, base_needs, base_parent = str(step.output), ("base",), step.fingerprint()
        jobs.append(Job("base", (step,)))
    for method, overrides in config.experiment.methods.items():
        looks: list[Step] = []
        for seed in config.experiment.seeds:
            merged = method_config(config, method, base=base)
            _check_thresholds(merged, config.experiment, method)
            is_base = merged.routing.method == "dense" and not overrides
            if is_base and seed != config.experiment.seeds[0]:
                continue  # the base does not depend on the seed of fine-tuning
            name = method if is_base else f"{method}-seed{seed}"
            merged = with_overrides(_at(merged, root / name), {"seed": seed})
            needs, parent, model = base_needs, base_parent, Path(base)
            if not is_base:
                step = Step("train", merged, root / name / "trained", parent)
                jobs.append(Job(f"train {name}", (step,), base_needs))
                needs, parent, model = (f"train {name}",), step.fingerprint(), step.output
            steps = _measure(merged, config.experiment, method, model)
            steps = tuple(replace(step, parent=parent) for step in steps)
            jobs.append(Job(f"measure {name}", steps, needs))
            if config.experiment.held_out_tasks:
                asked = [step for step in steps if step.stage == "evaluate" and _compares(step, steps)]
                looks += [_last_look(step, config.experiment.held_out_tasks) for step in asked]
        if looks:  # those of all seeds in one process: asking takes less than starting
            last_looks.append(Job(f"ask {method} once more", tuple(looks)))
    everything = tuple(job.name for job in jobs)
    return jobs + [replace(job, needs=everything) for job in last_looks]


def _check_thresholds(config: Config, grid: ExperimentConfig, method: str) -> None:
    """Results of an asked threshold stand beside those of the trained one: labels have to tell them apart."""
    trained, own = config.routing.threshold, method in grid.points
    if config.routing.method == "dense":
        return
    for theta in (grid.points[method] if own else grid).thresholds:
        if theta != trained and shown(theta) == shown(trained):
            key = f"experiment.points.{method}.thresholds" if own else "experiment.thresholds"
            raise InputError(
                f"{key}: {theta:g} and the trained threshold of {method}, {trained:g}, are both shown as "
                f"{shown(theta)}; allowed: {trained:g} itself, or one further from it"
            )


def _compares(evaluation: Step, steps: Sequence[Step]) -> bool:
    """Whether a model stands beside others here: at an asked ratio or, where none is asked, as it was trained."""
    calibrated = {str(step.output) for step in steps if step.stage == "calibrate"}
    settings = evaluation.config.evaluate
    return settings.model in calibrated if calibrated else settings.threshold is None


def _last_look(step: Step, tasks: Sequence[str]) -> Step:
    """The same evaluation on the tasks that nothing else has seen, in a folder of its own."""
    output = step.output.parent.with_name(HELD_OUT) / step.output.name
    asked = {"output": str(output), "tasks": list(tasks)}
    return replace(step, config=with_overrides(step.config, {"evaluate": asked}), output=output)


def _document(path: str | None) -> str:
    """Identifies a model directory that no job makes, by its model.json."""
    if path is None:
        raise InputError("the experiment has nothing to start from: give model.path or experiment.base")
    read_model_json(path)
    return hashlib.sha256((Path(path) / "model.json").read_bytes()).hexdigest()


def _at(config: Config, folder: Path) -> Config:
    return with_overrides(config, {"output": str(folder)})


def _measure(config: Config, grid: ExperimentConfig, method: str, model: Path) -> list[Step]:
    """Quantize at every format; evaluate at the trained threshold and, if routed, at every asked ratio."""
    steps, folder, points = [], Path(config.output), grid.points.get(method, grid)
    for quantizer in grid.quantizers:
        name = quantizer_name(quantizer)
        target = model
        if quantizer.bits != 16:
            target = folder / name
            steps.append(_step(config, "quantize", target, {"quantize": _quantizer(quantizer, model, target)}))
        label = f"{folder.name}-{name}"
        steps.append(_evaluation(config, method, target, label))
        if config.routing.method == "dense":
            continue
        for theta in points.thresholds:
            if theta == config.routing.threshold:  # measured already
                continue
            steps.append(_evaluation(config, method, target, f"{label}-theta{theta:g}", threshold=theta))
        for ratio in points.ratios:
            calibrated = folder / f"{name}-ratio{ratio:g}"
            settings = {"model": str(target), "output": str(calibrated), "objective": "ratio", "ratio": ratio}
            nothing = dict.fromkeys(("tokens_per_second", "milliseconds_per_token"))
            steps.append(_step(config, "calibrate", calibrated, {"calibrate": settings, "budget": nothing}))
            steps.append(_evaluation(config, method, calibrated, f"{label}-ratio{ratio:g}"))
    return steps


def _quantizer(quantizer: QuantizeConfig, model: Path, target: Path) -> dict[str, Any]:
    return {**quantizer.model_dump(), "model": str(model), "output": str(target)}


def _evaluation(config: Config, method: str, model: Path, label: str, **settings: Any) -> Step:
    output = Path(config.output).parent / "evaluation" / f"{label}.json"
    settings = {"threshold": None, **settings, "model": str(model), "output": str(output), "name": method}
    return _step(config, "evaluate", output, {"evaluate": settings})


def _step(config: Config, stage: Stage, output: Path, overrides: dict[str, Any]) -> Step:
    return Step(stage, with_overrides(config, overrides), output)
