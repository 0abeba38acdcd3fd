"""Paired differences over seeds: what one model gains over another when both were trained from the same seeds.

Seeds share data order and noise, so the difference per seed varies less than either model does.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from scipy.stats import false_discovery_control
from scipy.stats import t as student

from qtale_jax.reporting.aggregate import Format, Summary, estimate, runs_all_layers
from qtale_jax.reporting.labels import Metric, metrics
from qtale_jax.reporting.results import ResultRow, write_text

CONFIDENCE = 0.95
EQUAL_RATIO = 0.02  # executed ratios that differ by no more than this count as equal
_BASES = ("dense", "base")


@dataclass(frozen=True)
class Difference:
    """What `model` gains over `reference`: positive is better, accuracy in points, nats as they are.

    `values` belong to `seeds`. `error` is the standard error of their mean, `low` and `high` bound it at the confidence
    `CONFIDENCE` by Student's t, `p` is of the two-sided paired t-test; none of them with one pair, and no `p` where all
    values are the same. The ratios are those of layers executed, as measured.
    """

    metric: str
    model: str
    reference: str
    format: Format
    point: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    error: float | None
    low: float | None
    high: float | None
    p: float | None
    ratio: float
    reference_ratio: float

    @property
    def equal_ratio(self) -> bool:
        """Whether both run about the same share of layers, so that the difference is one of quality alone."""
        return abs(self.ratio - self.reference_ratio) <= EQUAL_RATIO + 1e-9


def base_model(summaries: Iterable[Summary]) -> str | None:
    """The dense model that all others come from: the one called so, else the first that runs all layers."""
    whole = sorted({summary.model for summary in summaries if runs_all_layers(summary)})
    return next((name for name in _BASES if name in whole), whole[0] if whole else None)


def references(summaries: Sequence[Summary]) -> list[str]:
    """The models that others are compared with, as far as they occur: the base, `dense_qat` and `dllm`."""
    models = {summary.model for summary in summaries}
    named = [name for name in ("dense_qat", "dllm") if name in models]
    return list(dict.fromkeys([name for name in (base_model(summaries),) if name] + named))


def several_seeds(summaries: Iterable[Summary]) -> bool:
    """Whether there is anything to pair: some model was measured with two seeds or more."""
    return any(len(summary.seeds) > 1 for summary in summaries)


def t_interval(values: Sequence[float]) -> tuple[float, float, float | None]:
    """Low and high end of the confidence interval of the mean of two values or more, and p of the mean being zero."""
    found, freedom = estimate(values), len(values) - 1
    if not found.error:
        return found.mean, found.mean, None
    reach = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * found.error
    p = 2 * float(student.sf(abs(found.mean) / found.error, freedom))
    return found.mean - reach, found.mean + reach, p


def adjusted(differences: Sequence[Difference]) -> list[float | None]:
    """The p-values of a family of tests, adjusted for their number: their false discovery rate (Benjamini & Hochberg).

    Differences without a p are no tests, and stay without one.
    """
    tests = [each.p for each in differences if each.p is not None]
    found = iter(false_discovery_control(tests).tolist() if tests else ())
    return [None if each.p is None else next(found) for each in differences]


def _pairs(mine: Summary, other: Summary, metric: Metric, base: str | None) -> dict[int, tuple[ResultRow, ResultRow]]:
    """Seed to both rows. The base was trained once: its row stands against every seed of the other model."""
    left, right = (
        {each.row.seed: each.row for each in summary.evaluations if metric.measure(each.row) is not None}
        for summary in (mine, other)
    )
    if other.model == base and len(right) == 1:
        right = dict.fromkeys(left, next(iter(right.values())))
    elif mine.model == base and len(left) == 1:
        left = dict.fromkeys(right, next(iter(left.values())))
    return {seed: (left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())}


def difference(mine: Summary, other: Summary, metric: Metric, base: str | None = None) -> Difference | None:
    """What `mine` gains over `other`; none if format or point differ or no seed is shared.

    Args:
        mine: the model in question.
        other: the reference. A dense model has no point and pairs with every point.
        metric: what is compared.
        base: the model that, where it has a single seed, pairs with every seed.
    """
    points = {summary.point for summary in (mine, other) if summary.routing != "dense"}
    if mine.format != other.format or len(points) > 1:
        return None
    pairs = _pairs(mine, other, metric, base)
    if not pairs:
        return None
    sign = metric.scale if metric.higher_is_better else -metric.scale
    # Rounded, so that equal differences of unequal numbers are equal and do not look surer than they are.
    values = [
        round(sign * ((metric.measure(left) or 0.0) - (metric.measure(right) or 0.0)), 10)
        for left, right in pairs.values()
    ]
    found = estimate(values)
    low, high, p = t_interval(values) if len(values) > 1 else (None, None, None)
    return Difference(
        metric=metric.name,
        model=mine.model,
        reference=other.model,
        format=mine.format,
        point=next(iter(points), ""),
        seeds=tuple(pairs),
        values=tuple(values),
        mean=found.mean,
        error=found.error,
        low=low,
        high=high,
        p=p,
        ratio=math.fsum(left.executed_ratio for left, _ in pairs.values()) / len(pairs),
        reference_ratio=math.fsum(right.executed_ratio for _, right in pairs.values()) / len(pairs),
    )


def against(summaries: Sequence[Summary], metric: Metric, reference: str) -> list[Difference]:
    """What every other model gains over `reference`, at every format and point they share, in their order."""
    base = base_model(summaries)
    others = [summary for summary in summaries if summary.model == reference]
    found = [
        difference(summary, other, metric, base)
        for summary in summaries
        if summary.model != reference
        for other in others
    ]
    return [each for each in found if each is not None]


def all_differences(summaries: Sequence[Summary]) -> list[Difference]:
    """Every pair of models once, the later one against the earlier, for every measure, format and point."""
    base = base_model(summaries)
    models: dict[str, list[Summary]] = {}
    for summary in summaries:
        models.setdefault(summary.model, []).append(summary)
    found = [
        difference(mine, other, metric, base)
        for metric in metrics(summaries)
        for earlier, later in combinations(models.values(), 2)
        for mine in later
        for other in earlier
    ]
    return [each for each in found if each is not None]


def _record(found: Difference, adjusted_p: float | None) -> dict[str, Any]:
    return {
        "metric": found.metric,
        "model": found.model,
        "reference": found.reference,
        "quantizer": found.format.quantizer,
        "bits": found.format.bits,
        "group_size": found.format.group_size,
        "point": found.point,
        "executed_ratio": found.ratio,
        "reference_ratio": found.reference_ratio,
        "equal_ratio": found.equal_ratio,
        "seeds": found.seeds,
        "differences": found.values,
        "mean": found.mean,
        "standard_error": found.error,
        "low": found.low,
        "high": found.high,
        "p_value": found.p,
        "p_adjusted": adjusted_p,
    }


def write_differences(path: Path, differences: Sequence[Difference]) -> None:
    """Writes `paired.json`: a list of differences, one per line; `low` and `high` are the 95 % interval.

    `p_adjusted` is `p_value` adjusted for the number of tests of the same metric against the same reference.
    """
    families: dict[tuple[str, str], list[Difference]] = {}
    for each in differences:
        families.setdefault((each.metric, each.reference), []).append(each)
    ps = {id(each): p for family in families.values() for each, p in zip(family, adjusted(family), strict=True)}
    records = [_record(each, ps[id(each)]) for each in differences]
    lines = ",\n".join("  " + json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    write_text(path, f"[\n{lines}\n]\n")
