"""Tables of the report, built from summaries."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qtale_jax.reporting.aggregate import (
    Estimate,
    Format,
    Summary,
    estimate,
    point_order,
    runs_all_layers,
    theta_series,
)
from qtale_jax.reporting.cells import ABSENT, Cell, Table, assemble
from qtale_jax.reporting.labels import (
    Metric,
    byte_unit,
    count_text,
    format_labels,
    metrics,
    model_label,
    place_label,
    point_label,
)
from qtale_jax.reporting.paired import (
    CONFIDENCE,
    EQUAL_RATIO,
    Difference,
    adjusted,
    against,
    base_model,
    references,
    several_seeds,
)
from qtale_jax.reporting.verdict import verdict_table


def _sections(summaries: Sequence[Summary]) -> dict[str, dict[str, dict[Format, Summary]]]:
    """Point, then model, then format; in the order of the summaries."""
    found: dict[str, dict[str, dict[Format, Summary]]] = {}
    for summary in summaries:
        found.setdefault(summary.point, {}).setdefault(summary.model, {})[summary.format] = summary
    return found


def _place(row: Mapping[Format, Summary]) -> str:
    """The label of the place of one model at one point, in all its formats."""
    return place_label(next(iter(row.values())))


def error_note(summaries: Sequence[Summary], mark: str = "±") -> str:
    """What stands behind `mark`."""
    counts = sorted({len(summary.seeds) for summary in summaries})
    several = f"{mark} is the standard error of the mean over {counts[-1]} seeds"
    if counts[-1] == 1:
        return f"One seed: {mark[0].lower()}{mark[1:]} is the standard error of the test set."
    if counts[0] > 1:
        return f"{several if len(counts) == 1 else several.replace('over', 'over up to')}."
    single = dict.fromkeys(model_label(summary.model) for summary in summaries if len(summary.seeds) == 1)
    return f"{several}; where there is one seed ({', '.join(single)}) it is that of the test set."


def _quality_cell(summary: Summary | None, metric: Metric) -> Cell:
    if summary is None:
        return ABSENT
    found = metric.value(summary)
    if found is None:
        metric = metrics([summary])[0]  # a row has at least one of the two
        shown = f"{metric.text(metric.of(summary))} {metric.name}"
    else:
        shown = metric.text(found)
    return Cell(shown, f"@ {summary.executed_ratio.mean:.2f}")


def quality_table(summaries: Sequence[Summary], metric: Metric) -> Table:
    """Method and operating point against number format: `quality ± error @ measured executed ratio`."""
    names = format_labels(summaries)
    sections = [
        [
            (
                Cell(model_label(model)),
                Cell(_place(row)),
                *(_quality_cell(row.get(each), metric) for each in names),
            )
            for model, row in models.items()
        ]
        for models in _sections(summaries).values()
    ]
    unit = metric.axis[:1].upper() + metric.axis[1:]
    return assemble(
        f"{unit} @ executed ratio",
        ("method", "θ set for", *names.values()),
        sections,
        2,
        f"{unit}, at the share of layers that was run, as measured. {error_note(summaries)}",
    )


def _quantizer_label(found: Format) -> str:
    grouped = found.group_size is not None and found.group_size > 0
    return f"{found.quantizer}, {f'groups of {found.group_size}' if grouped else 'per channel'}"


def quantizer_table(summaries: Sequence[Summary], metric: Metric) -> Table:
    """Quantizers against bit widths, for comparisons of quantizers; full precision stands in every row."""
    widths = sorted({summary.format.bits for summary in summaries if summary.format.quantizer != "none"}, reverse=True)
    sections = []
    for models in _sections(summaries).values():
        for model, found in models.items():
            full = next((summary for each, summary in found.items() if each.quantizer == "none"), None)
            rows: dict[str, dict[int, Summary]] = {}
            for each, summary in found.items():
                if each.quantizer != "none":
                    rows.setdefault(_quantizer_label(each), {})[each.bits] = summary
            sections.append(
                [
                    (
                        Cell(model_label(model)),
                        Cell(_place(found)),
                        Cell(label),
                        _quality_cell(full, metric),
                        *(_quality_cell(row.get(bits), metric) for bits in widths),
                    )
                    for label, row in rows.items()
                ]
            )
    unit = metric.axis[:1].upper() + metric.axis[1:]
    return assemble(
        f"{unit} @ executed ratio, by quantizer",
        ("method", "θ set for", "quantizer", "fp", *(f"{bits}-bit" for bits in widths)),
        sections,
        3,
        f"{unit}, at the share of layers that was run, as measured. {error_note(summaries)}",
    )


def _number(found: Estimate | None, decimals: int) -> Cell:
    if found is None:
        return ABSENT
    text = f"{found.mean:.{decimals}f}"
    return Cell(f"{text} ± {found.error:.{decimals}f}" if found.error else text)


def routing_table(summaries: Sequence[Summary]) -> Table:
    """Threshold, executed ratio, mean logit gap and flip rate of every routed model, per format."""
    names = format_labels(summaries)
    sections = [
        [
            (
                Cell(name),
                Cell(model_label(summary.model)),
                Cell(place_label(summary)),
                _number(summary.theta, 3),
                _number(summary.executed_ratio, 3),
                _number(summary.executed_ratio_scored, 3),
                _number(summary.logit_gap, 2),
                _number(summary.flip_rate, 3),
            )
            for summary in summaries
            if summary.format == each and summary.routing != "dense"
        ]
        for each, name in names.items()
    ]
    return assemble(
        "Routing",
        ("format", "method", "θ set for", "θ", "executed ratio", "where scored", "mean |logit gap|", "flip rate"),
        sections,
        3,
        "θ: mean over layers. Executed ratio: share of layers run; where scored: by the tokens whose predictions are "
        "scored. Logit gap: distance between a router's two logits. "
        "Flip rate: share of decisions that Gumbel noise turns over.",
    )


def task_table(summaries: Sequence[Summary]) -> Table | None:
    """Accuracy of every task in percent; none where no accuracy was measured."""
    rows = [summary for summary in summaries if summary.accuracy]
    tasks = list(dict.fromkeys(task for row in rows for task in row.accuracy if task != "mean"))
    if not tasks:
        return None
    sections = [
        [
            (
                Cell(name),
                Cell(model_label(row.model)),
                Cell(place_label(row)),
                *(
                    Cell(f"{100 * row.accuracy[task].mean:.1f}") if task in row.accuracy else ABSENT
                    for task in (*tasks, "mean")
                ),
            )
            for row in rows
            if row.format == each
        ]
        for each, name in format_labels(rows).items()
    ]
    note = "Accuracy in percent, mean over seeds; the last column is the mean over tasks."
    return assemble("Accuracy per task", ("format", "method", "θ set for", *tasks, "mean"), sections, 3, note)


def bytes_table(summaries: Sequence[Summary]) -> Table:
    """Bytes of the arrays held, by part; they do not depend on the operating point."""
    names = format_labels(summaries)
    first: dict[tuple[Format, str], Summary] = {}
    for summary in summaries:
        first.setdefault((summary.format, summary.model), summary)
    parts = [
        part
        for part in dict.fromkeys(part for summary in first.values() for part in summary.parts)
        if part != "total" and any(summary.parts.get(part) for summary in first.values())
    ]
    size, unit = byte_unit(max(summary.weight_bytes for summary in first.values()))
    sections = [
        [
            (
                Cell(name),
                Cell(model_label(summary.model)),
                *(Cell(f"{summary.parts[part] / size:.3f}") if summary.parts.get(part) else ABSENT for part in parts),
                Cell(f"{summary.weight_bytes / size:.3f}"),
            )
            for (found, _), summary in first.items()
            if found == each
        ]
        for each, name in names.items()
    ]
    headers = ("format", "method", *(part.replace("_", " ") for part in parts), "total")
    return assemble(
        f"Weights, {unit}",
        headers,
        sections,
        2,
        f"Counted from the arrays held, in {unit} (powers of ten), routers included.",
    )


def flops_table(summaries: Sequence[Summary]) -> Table:
    """FLOPs per token, routers included, and their share of the dense model's in full precision."""
    names = format_labels(summaries)
    dense = [summary.flops_per_token for summary in summaries if summary.routing == "dense"]
    whole = max(dense, default=0.0)

    def cell(summary: Summary | None) -> Cell:
        if summary is None:
            return ABSENT
        return Cell(count_text(summary.flops_per_token), f"× {summary.flops_per_token / whole:.2f}" if whole else "")

    sections = [
        [
            (Cell(model_label(model)), Cell(_place(row)), *(cell(row.get(each)) for each in names))
            for model, row in models.items()
        ]
        for models in _sections(summaries).values()
    ]
    note = "Floating-point operations per token, routers included" + (
        "; × is the share of the dense model." if whole else "."
    )
    return assemble("FLOPs per token", ("method", "θ set for", *names.values()), sections, 2, note)


def quality_tables(summaries: Sequence[Summary]) -> list[Table]:
    """One quality table per measure that occurs, the main one first; by quantizer where several share a width."""
    found = [summary.format for summary in summaries if summary.format.quantizer != "none"]
    several = len({(each.quantizer, each.bits, each.group_size) for each in found}) > len({each.bits for each in found})
    build = quantizer_table if several else quality_table
    return [build(summaries, metric) for metric in metrics(summaries)]


def _signed(value: float, decimals: int, plus: bool) -> str:
    text = f"{round(value, decimals) + 0.0:{'+' if plus else ''}.{decimals}f}"
    return text.replace("-", "−")


def _gain_cell(found: Difference | None, decimals: int) -> Cell:
    if found is None:
        return ABSENT
    text = _signed(found.mean, decimals, True)
    if found.low is None or found.high is None:
        return Cell(text)
    return Cell(text, f"[{_signed(found.low, decimals, False)}, {_signed(found.high, decimals, False)}]")


def _gain_note(found: Sequence[Difference], whole: bool, base: str | None) -> str:
    counts = sorted({len(each.seeds) for each in found})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    parts = [f"Positive is better. Brackets: 95 % confidence interval (Student's t) over {seeds} seeds, paired."]
    tests = [p for p in adjusted(found) if p is not None]
    if tests:
        sure = sum(p < 1 - CONFIDENCE for p in tests)
        parts.append(f"{sure} of {len(tests)} have p < .05 after adjustment for their number (false discovery rate).")
    if base:
        parts.append(f"{model_label(base)} is one model, the same for every seed.")
    if not whole:
        parts.append(f"Only where the executed ratios differ by no more than {EQUAL_RATIO:.2f}.")
    return " ".join(parts)


def paired_table(summaries: Sequence[Summary], metric: Metric, reference: str) -> Table | None:
    """What every model gains over `reference` at the same asked ratio: `+1.3 [0.4, 2.2]`, one column per format.

    Differences between models that run different shares of their layers say little and are left out, unless the
    reference runs all layers. None where nothing is left, or no model has two seeds.
    """
    mine = [summary for summary in summaries if summary.model == reference]
    whole = all(map(runs_all_layers, mine))
    rated = any(summary.point.startswith("ratio") for summary in summaries)
    found = [
        each
        for each in against(summaries, metric, reference)
        if (whole or each.equal_ratio) and (each.point.startswith("ratio") or not each.point or not rated)
    ]
    if not any(len(each.seeds) > 1 for each in found):
        return None
    names = format_labels(summaries)
    rows: dict[str, dict[str, dict[Format, Difference]]] = {}
    for each in sorted(found, key=lambda each: point_order(each.point)):
        rows.setdefault(each.point, {}).setdefault(each.model, {})[each.format] = each
    places = {summary.model: place_label(summary) for summary in summaries if summary.routing == "dense"}
    sections = [
        [
            (
                Cell(model_label(model)),
                Cell(point_label(point) if point else places[model]),
                *(_gain_cell(row.get(each), metric.decimals) for each in names),
            )
            for model, row in models.items()
        ]
        for point, models in rows.items()
    ]
    unit = f"{metric.name}, points" if metric.scale == 100 else metric.name
    alone = reference == base_model(summaries) and all(len(summary.seeds) == 1 for summary in mine)
    return assemble(
        f"Gain over {model_label(reference)}: {unit}",
        ("method", "at", *names.values()),
        sections,
        2,
        _gain_note(found, whole, reference if alone else None),
    )


def paired_tables(summaries: Sequence[Summary]) -> list[Table]:
    """The paired tables of every measure against every reference; none without several seeds."""
    if not several_seeds(summaries):
        return []
    found = [
        paired_table(summaries, metric, reference)
        for metric in metrics(summaries)
        for reference in references(summaries)
    ]
    return [table for table in found if table is not None]


def reach_table(summaries: Sequence[Summary]) -> Table | None:
    """How far theta moves the executed ratio at full precision; none where no model has several thetas."""
    rows = []
    for model, series in theta_series(summaries).items():
        low, high = min(series), max(series)
        shares = [
            {each.row.seed: each.row.executed_ratio for each in series[theta].evaluations} for theta in (low, high)
        ]
        seeds = shares[0].keys() & shares[1].keys()
        moved = [shares[0][seed] - shares[1][seed] for seed in sorted(seeds)]
        ends = [(Cell(f"{theta:g}"), _number(series[theta].executed_ratio, 3)) for theta in (low, high)]
        rows.append((Cell(model_label(model)), *ends[0], *ends[1], _number(estimate(moved) if moved else None, 3)))
    if not rows:
        return None
    note = (
        "Executed ratio at full precision at the smallest and the largest θ evaluated, the same θ in all layers; "
        "± is the standard error over seeds."
    )
    headers = ("method", "smallest θ", "ratio", "largest θ", "ratio", "difference")
    return assemble("Reach of θ", headers, [rows], 1, note)


def all_tables(summaries: Sequence[Summary]) -> list[Table]:
    """Every table of the report that has rows, in the order of the report."""
    found = [
        *quality_tables(summaries),
        verdict_table(summaries),
        *paired_tables(summaries),
        task_table(summaries),
        routing_table(summaries),
        reach_table(summaries),
        bytes_table(summaries),
        flops_table(summaries),
    ]
    return [table for table in found if table is not None and table.rows]


def held_out_tables(summaries: Sequence[Summary]) -> list[Table]:
    """Quality and paired differences on tasks that nothing was chosen by, titled so."""
    found = [*quality_tables(summaries), *paired_tables(summaries)]
    return [replace(table, title=f"Held-out tasks: {table.title[:1].lower()}{table.title[1:]}") for table in found]
