"""Means and standard errors over seeds: one `Summary` per model, number format and operating point."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qtale_jax.reporting.results import Evaluation, Histogram

ROUTINGS = ("dense", "dllm", "qtale", "mod", "random")
LEAST_THETAS = 3  # fewer do not show how a ratio follows its threshold
_SWEPT = re.compile(r"(?P<name>.+)@(?P<value>\d*\.?\d+(?:e[+-]?\d+)?)")


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds. `error` is its standard error; with one seed that of the measurement, if known."""

    mean: float
    error: float | None
    count: int


def estimate(values: Sequence[float], measurement_error: float | None = None) -> Estimate:
    """Mean and standard error of the mean, s / sqrt(n) with n - 1 degrees of freedom.

    Args:
        values: one value per seed, at least one.
        measurement_error: the standard error of a single value, used when there is only one.
    """
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(mean, measurement_error, 1)
    if min(values) == max(values):  # exactly: rounding would leave an error of 1e-17
        return Estimate(values[0], 0.0, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


@dataclass(frozen=True)
class Format:
    """How the linears are stored."""

    quantizer: str
    bits: int
    group_size: int | None

    @property
    def order(self) -> tuple:
        """Sorts full precision first, then falling bits, then coarse groups before fine ones."""
        group = self.group_size if self.group_size and self.group_size > 0 else math.inf
        return (self.quantizer != "none", -self.bits, self.quantizer, -group)


@dataclass(frozen=True)
class Summary:
    """All seeds of one model in one format at one operating point.

    `accuracy` holds fractions per task and `mean`, and is empty where none was measured.
    """

    model: str
    routing: str
    format: Format
    point: str
    seeds: tuple[int, ...]
    theta: Estimate | None
    executed_ratio: Estimate
    accuracy: dict[str, Estimate]
    nats_per_token: Estimate | None
    weight_bytes: float
    flops_per_token: float
    parts: dict[str, float]
    executed_per_layer: tuple[float, ...]
    executed_ratio_scored: Estimate | None
    logit_gap: Estimate | None
    flip_rate: Estimate | None
    histogram: Histogram | None
    evaluations: tuple[Evaluation, ...]


def runs_all_layers(summary: Summary) -> bool:
    """Whether a model has no routers and no layer was dropped: `dense` alone does not say so."""
    return summary.routing == "dense" and summary.executed_ratio.mean > 1 - 1e-6


def threshold_of(point: str) -> float | None:
    """The number of a point `threshold 0.50`; none of other points."""
    found = re.fullmatch(r"threshold\s+(\d*\.?\d+)", point)
    return float(found.group(1)) if found else None


def point_order(point: str) -> tuple:
    """Sorts operating points: thresholds (as trained) before ratios, then by their number."""
    number = re.search(r"(\d*\.?\d+)\s*$", point)
    kinds = ("", "threshold", "ratio")
    kind = next(
        (rank for rank, name in enumerate(kinds) if name and point.startswith(name)), 0 if not point else len(kinds)
    )
    return (kind, float(number.group(1)) if number else 0.0, point)


def summary_order(summary: Summary) -> tuple:
    """Sorts dense first, then by operating point, routing and name, then by format."""
    routing = ROUTINGS.index(summary.routing)
    return (summary.routing != "dense", point_order(summary.point), routing, summary.model, summary.format.order)


def merge_histograms(histograms: Sequence[Histogram]) -> Histogram | None:
    """Adds up histograms; where their edges differ, onto equal bins over their common range."""
    if not histograms:
        return None
    first = histograms[0]
    if all(histogram.edges == first.edges for histogram in histograms):
        counts = zip(*(histogram.counts for histogram in histograms), strict=True)
        return Histogram(edges=first.edges, counts=tuple(map(sum, counts)))
    low, high = min(h.edges[0] for h in histograms), max(h.edges[-1] for h in histograms)
    edges = np.linspace(low, high, len(first.edges))
    cumulative = np.zeros_like(edges)
    for histogram in histograms:
        cumulative += np.interp(edges, histogram.edges, np.concatenate([[0.0], np.cumsum(histogram.counts)]))
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(float(count) for count in np.diff(cumulative)))


def _known(evaluations: Iterable[Evaluation], value: Callable[[Evaluation], float | None]) -> Estimate | None:
    values = [found for found in map(value, evaluations) if found is not None]
    return estimate(values) if values else None


def _accuracy(evaluations: Sequence[Evaluation]) -> dict[str, Estimate]:
    measured = [evaluation.row.accuracy for evaluation in evaluations if evaluation.row.accuracy is not None]
    error = next(
        (evaluation.row.standard_error for evaluation in evaluations if evaluation.row.accuracy is not None), None
    )
    values: dict[str, list[float]] = {}
    for accuracy in measured:
        for task, share in accuracy.items():
            values.setdefault(task, []).append(share)
    return {task: estimate(shares, error if task == "mean" else None) for task, shares in values.items()}


def _nats(evaluations: Sequence[Evaluation]) -> Estimate | None:
    rows = [evaluation.row for evaluation in evaluations if evaluation.row.nats_per_token is not None]
    if not rows:
        return None
    # A row's standard error belongs to its accuracy where it has one.
    error = rows[0].standard_error if rows[0].accuracy is None else None
    return estimate([row.nats_per_token for row in rows if row.nats_per_token is not None], error)


def _summary(evaluations: Sequence[Evaluation]) -> Summary:
    rows = [evaluation.row for evaluation in evaluations]
    first = rows[0]
    layers = [evaluation.executed_per_layer for evaluation in evaluations if evaluation.executed_per_layer]
    same_depth = [shares for shares in layers if len(shares) == len(layers[0])]
    parts = dict.fromkeys(part for evaluation in evaluations for part in evaluation.bytes)
    return Summary(
        model=first.model,
        routing=first.routing,
        format=Format(first.quantizer, first.bits, first.group_size),
        point="" if first.routing == "dense" else evaluations[0].point,
        seeds=tuple(row.seed for row in rows),
        theta=_known(evaluations, lambda evaluation: evaluation.row.theta),
        executed_ratio=estimate([row.executed_ratio for row in rows]),
        accuracy=_accuracy(evaluations),
        nats_per_token=_nats(evaluations),
        weight_bytes=estimate([row.weight_bytes for row in rows]).mean,
        flops_per_token=estimate([row.flops_per_token for row in rows]).mean,
        parts={part: estimate([evaluation.bytes.get(part, 0) for evaluation in evaluations]).mean for part in parts},
        executed_per_layer=tuple(np.mean(same_depth, axis=0).tolist()) if same_depth else (),
        executed_ratio_scored=_known(evaluations, lambda evaluation: evaluation.executed_ratio_scored),
        logit_gap=_known(evaluations, lambda evaluation: evaluation.logit_gap_mean),
        flip_rate=_known(evaluations, lambda evaluation: evaluation.flip_rate),
        histogram=merge_histograms([e.gap_histogram for e in evaluations if e.gap_histogram is not None]),
        evaluations=tuple(evaluations),
    )


def summarize(evaluations: Iterable[Evaluation]) -> list[Summary]:
    """Groups evaluations by model, routing, format and point, and averages each group over its seeds."""
    groups: dict[tuple, list[Evaluation]] = {}
    for evaluation in sorted(evaluations, key=lambda evaluation: evaluation.row.seed):
        row = evaluation.row
        point = "" if row.routing == "dense" else evaluation.point
        groups.setdefault((row.model, row.routing, row.quantizer, row.bits, row.group_size, point), []).append(
            evaluation
        )
    return sorted(map(_summary, groups.values()), key=summary_order)


def formats(summaries: Iterable[Summary]) -> list[Format]:
    """The formats that occur, full precision first."""
    return sorted({summary.format for summary in summaries}, key=lambda found: found.order)


def reference_point(summaries: Sequence[Summary]) -> str:
    """The point at which routed models are shown where only one fits.

    Among the points that most routed models have: the asked ratio nearest to one half, since models compare at equal
    ratio; without such ratios the first threshold.
    """
    models: dict[str, set[str]] = {}
    for summary in summaries:
        if summary.routing != "dense":
            models.setdefault(summary.point, set()).add(summary.model)
    if not models:
        return ""
    shared = [point for point, found in models.items() if len(found) == max(map(len, models.values()))]
    ratios = [point for point in shared if point.startswith("ratio")]
    if ratios:
        return min(ratios, key=lambda point: (abs(point_order(point)[1] - 0.5), point))
    return min(shared, key=point_order)


def at_reference(summaries: Sequence[Summary]) -> list[Summary]:
    """Dense models, and routed ones at the reference point."""
    point = reference_point(summaries)
    return [summary for summary in summaries if summary.routing == "dense" or summary.point == point]


def theta_series(summaries: Iterable[Summary]) -> dict[str, dict[float, Summary]]:
    """Per routed model, theta to summary at full precision, theta rising; models with several thetas only."""
    found: dict[str, dict[float, Summary]] = {}
    for summary in summaries:
        theta = threshold_of(summary.point)
        if theta is not None and summary.routing != "dense" and summary.format.quantizer == "none":
            found.setdefault(summary.model, {}).setdefault(theta, summary)
    return {model: dict(sorted(series.items())) for model, series in found.items() if len(series) >= LEAST_THETAS}


def swept(model: str) -> tuple[str, float] | None:
    """Name and value of a model called NAME@VALUE; none of other models."""
    found = _SWEPT.fullmatch(model)
    return (found["name"], float(found["value"])) if found else None


def families(summaries: Iterable[Summary]) -> dict[str, dict[str, float]]:
    """Sweeps of one hyper-parameter: NAME to its models NAME@VALUE and their values, where there are several values."""
    found: dict[str, dict[str, float]] = {}
    for summary in summaries:
        member = swept(summary.model)
        if member:
            found.setdefault(member[0], {})[summary.model] = member[1]
    return {name: members for name, members in found.items() if len(set(members.values())) > 1}
