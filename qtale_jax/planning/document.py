"""A plan as JSON and as tables."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from qtale_jax.artifact import versions
from qtale_jax.config.schema import Config
from qtale_jax.models.describe import describe
from qtale_jax.parallel.axes import AXES
from qtale_jax.planning.inference import InferenceEstimate
from qtale_jax.planning.plan import Plan
from qtale_jax.planning.proposal import Proposal, usable_bytes
from qtale_jax.planning.training import TrainingEstimate
from qtale_jax.reporting.console import table
from qtale_jax.reporting.dry_run import bytes_text

ESTIMATE = "estimated from shapes, not measured; times are the least that peak rates allow"
"""What the numbers are."""


def document(config: Config, plan: Plan, compiled: dict[str, Any] | None) -> dict[str, Any]:
    """The plan as plain data; `compiled` is what libtpu's programs say, if any."""
    subject, usable = plan.subject, usable_bytes(config, plan.subject.topology)
    train, length = config.train, config.data.length
    return {
        "numbers": ESTIMATE,
        "model": {"name": subject.name, "parameters": subject.parameters, **describe(subject.spec)},
        "deployed": describe(subject.deployed),
        "topology": {"name": subject.topology.name, "devices": subject.topology.count},
        "device": {name: value for name, value in asdict(subject.topology.device).items() if name != "shapes"},
        "mesh": dict(zip(AXES, subject.sizes, strict=True)),
        "usable_bytes": usable,
        "training": {
            "parameters": train.parameters,
            "batch_size": train.batch_size,
            "length": length,
            "remat": train.remat,
            "compute_dtype": train.compute_dtype,
            **_training(plan.training, usable),
        },
        "inference": [_inference(estimate, usable, config) for estimate in plan.inference],
        "proposal": {
            "on_this_topology": _proposal(plan.here),
            "smallest_topology": _proposal(plan.smallest),
        },
        "compiled": compiled,
        "versions": versions(),
    }


def _training(estimate: TrainingEstimate, usable: float) -> dict[str, Any]:
    return {
        "bytes_per_device": {**estimate.memory, "total": estimate.total},
        "fits": estimate.total <= usable,
        "rows_per_device": estimate.rows,
        "microbatches": estimate.microbatches,
        "model_flops": estimate.model_flops,
        "per_device": estimate.work.document(),
        "tokens_per_second": estimate.tokens_per_second,
    }


def _inference(estimate: InferenceEstimate, usable: float, config: Config) -> dict[str, Any]:
    return {
        "step": estimate.step,
        "rows": estimate.rows,
        "context": config.plan.context or config.data.length,
        "executed_ratio": config.routing.target,
        "bytes": {**estimate.memory, "total": estimate.total},
        "fits": estimate.total <= usable,
        "per_device": estimate.work.document(),
        "tokens_per_second": estimate.tokens_per_second,
    }


def _proposal(found: Proposal | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "topology": found.topology,
        "mesh": dict(zip(AXES, found.mesh, strict=True)),
        "largest_rows_per_device": found.rows,
        "microbatches": found.microbatches,
        "bytes_per_device": found.bytes,
    }


def tables(config: Config, plan: Plan) -> list[Table]:
    """Training, inference and what would fit, to print."""
    usable = usable_bytes(config, plan.subject.topology)
    return [_training_table(config, plan, usable), _inference_table(config, plan.inference, usable)]


def _training_table(config: Config, plan: Plan, usable: float) -> Table:
    estimate, work, device = plan.training, plan.training.work, plan.subject.topology.device
    axes = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, plan.subject.sizes, strict=True))
    title = (
        f"training {plan.subject.name} on {plan.subject.topology.name} ({axes}): batches of {config.train.batch_size}, "
        f"{config.data.length} tokens, remat {config.train.remat}; per device"
    )
    rows = [(name, bytes_text(size), f"{size / device.memory:.1%}") for name, size in estimate.memory.items()]
    fits = "fits" if estimate.total <= usable else "does not fit"
    rows.append(("all of it", bytes_text(estimate.total), f"{estimate.total / device.memory:.1%}, {fits}"))
    rows += [
        ("arithmetic of a step", f"{work.flops / 1e12:.2f} TFLOP", _seconds(work.arithmetic)),
        ("memory read and written", bytes_text(work.moved), _seconds(work.memory)),
        ("sent to others", bytes_text(work.sent), _seconds(work.interconnect)),
        ("step, at least", f"bound by {work.bound}", _seconds(work.seconds)),
        ("tokens per second, at most", f"{estimate.tokens_per_second:,.0f}", "all devices"),
    ]
    return table(title, ("what", "how much", f"of {bytes_text(device.memory)}, or time"), rows)


def _inference_table(config: Config, estimates: list[InferenceEstimate], usable: float) -> Table:
    context = config.plan.context or config.data.length
    title = f"inference on one device: rows of {context} tokens, executed ratio {config.routing.target:g}"
    rows = [
        (
            f"{estimate.step}, batch {estimate.rows}",
            *(bytes_text(estimate.memory[part]) for part in ("weights", "KV cache", "activations")),
            f"{bytes_text(estimate.total)}, {'fits' if estimate.total <= usable else 'does not fit'}",
            f"{_seconds(estimate.work.seconds)} ({estimate.work.bound})",
            f"{estimate.tokens_per_second:,.0f}",
        )
        for estimate in estimates
    ]
    return table(title, ("step", "weights", "KV cache", "activations", "all", "time, at least", "tokens/s"), rows)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms" if value >= 1e-4 else f"{value * 1e6:.2f} µs"


def sentences(config: Config, plan: Plan) -> list[str]:
    """What would fit, in words."""
    kind = plan.subject.topology.device.kind
    here, least = plan.here, plan.smallest
    found = []
    if here is None:
        found.append(f"{plan.subject.topology.name}: not even one row per device fits")
    else:
        found.append(
            f"{here.topology}: up to {here.rows} rows per device and microbatch fit, "
            f"that is {here.rows * here.mesh[0] * here.mesh[1]} rows"
        )
    if least is None:
        found.append(
            f"no topology of {kind} takes train.batch_size={config.train.batch_size} with this mesh; a larger "
            "mesh.tensor, another remat or fewer trained parameters need less"
        )
    else:
        mesh = " ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, least.mesh, strict=True))
        found.append(
            f"smallest that takes train.batch_size={config.train.batch_size}: {least.topology} with {mesh} "
            f"train.microbatches={least.microbatches}, {bytes_text(least.bytes)} per device"
        )
    return found
