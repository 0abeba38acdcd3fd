"""What was planned beside what the compiler counts: arguments, temporary arrays, and what all-gathers put together."""

from typing import Any

from qtale_jax.planning.plan import Plan
from qtale_jax.planning.roofline import Estimate
from qtale_jax.planning.training import TrainingEstimate

TRAIN, PROPOSAL = "train", "train, as proposed"
"""Names of the training step on the topology, and on the smallest that is proposed."""


def name_of(step: str, rows: int) -> str:
    """What prefill or decode of so many rows is called."""
    return f"{step}, batch {rows}"


def compared(plan: Plan, compiled: dict[str, Any], usable: float) -> dict[str, Any]:
    """What the compiler says of each program, with what was planned for it.

    Adds `fits` and, for `arguments`, `temporary` arrays with the gaps between them, and the `peak`, arguments and
    temporary arrays without gaps, bytes `planned` and `compiled` and their `difference`, as a share of what is
    compiled; positive: more was planned. Training also has `pieces`, the largest array that fsdp puts together in a
    layer, in the embedding and in the head, beside which its largest all-gathers can be held. Programs that were
    refused have none of it.

    Args:
        plan: the estimates.
        compiled: by name, what `compile_steps` returns.
        usable: bytes of a device that arrays may take.
    """
    planned: dict[str, Estimate] = {TRAIN: plan.training}
    planned |= {name_of(estimate.step, estimate.rows): estimate for estimate in plan.inference}
    if plan.there is not None:
        planned[PROPOSAL] = plan.there
    return {
        name: told if "error" in told else {**told, **_against(planned[name], told, usable)}
        for name, told in compiled.items()
    }


def _against(estimate: Estimate, told: dict[str, Any], usable: float) -> dict[str, Any]:
    sizes, repeated = told["bytes"], 0
    pairs = {
        "arguments": (estimate.arguments, sizes["argument"]),
        "temporary": (estimate.temporary + estimate.gaps, sizes["temp"]),
        "peak": (estimate.arguments + estimate.temporary, told["peak bytes"]),
    }
    found: dict[str, Any] = {
        name: {"planned": mine, "compiled": theirs, "difference": (mine - theirs) / theirs if theirs else None}
        for name, (mine, theirs) in pairs.items()
    }
    if isinstance(estimate, TrainingEstimate):
        found["pieces"], repeated = estimate.pieces, estimate.repeated
    return {"fits": sizes["total"] - repeated <= usable, **found}
