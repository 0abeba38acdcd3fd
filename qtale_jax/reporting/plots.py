"""Plots: panels that share their axes, one look per model everywhere."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from qtale_jax.reporting.aggregate import (
    Estimate,
    Summary,
    at_reference,
    families,
    reference_point,
    runs_all_layers,
    swept,
    theta_series,
)
from qtale_jax.reporting.labels import OTHERS, PAPER, Look, Metric, byte_unit, looks, metrics, point_label
from qtale_jax.reporting.logs import TrainingRun
from qtale_jax.reporting.panels import (
    SMALL,
    WIDE,
    Plot,
    draw_panel,
    ends,
    limits,
    per_format,
    spread,
    stroke,
    whiskers,
)

MOST_TICKS = 6
MOST_FILLED = 4  # more histograms than that on top of each other are drawn as outlines


def crowded(summaries: Sequence[Summary]) -> bool:
    """Whether there are more models than colours, so that panels must be larger and leave nothing unused."""
    return any(look.index == OTHERS for look in looks(summaries).values())


def quality_by_ratio(summaries: Sequence[Summary], metric: Metric) -> Plot:
    """Quality against measured executed ratio, one panel per format; points of one model are joined.

    Many models get large panels with a quality axis each, and of those that run all layers only the level.
    """
    rows = [summary for summary in summaries if metric.value(summary)]
    styles, many = looks(rows), crowded(rows)
    placed = [row for row in rows if not (many and runs_all_layers(row))] or rows
    reached = ends([row.executed_ratio for row in placed])
    ratios = limits(min(reached), max(reached))
    quality = spread(rows, metric)

    def panel(number: int, title: str, members: Sequence[Summary]) -> str:
        def draw(axes: Axes) -> None:
            for model, look in styles.items():
                mine = sorted((row for row in members if row.model == model), key=lambda row: row.executed_ratio.mean)
                found = [metric.of(row) for row in mine]
                if mine and runs_all_layers(mine[0]):
                    axes.axhline(metric.scale * found[0].mean, color=look.colour, linewidth=0.9, linestyle=(0, (2, 3)))
                axes.errorbar(
                    [row.executed_ratio.mean for row in mine],
                    [metric.scale * each.mean for each in found],
                    xerr=whiskers([row.executed_ratio for row in mine]),
                    yerr=whiskers(found, metric.scale),
                    marker=look.marker,
                    elinewidth=1.1,
                    **stroke(look),
                )
            heights = spread(members, metric) if many else quality
            axes.set(xlim=ratios, ylim=heights, xlabel="executed ratio", ylabel=metric.axis)

        return draw_panel(f"{metric.name.split()[0]}-ratio-{number}", title, draw, *(WIDE if many else SMALL))

    return Plot(per_format(rows, panel), tuple(styles.values()), wide=many)


def quality_by_bytes(summaries: Sequence[Summary], metric: Metric) -> Plot:
    """Quality against the bytes of the weights, at the reference point; markers carry their bits."""
    rows = [summary for summary in at_reference(summaries) if metric.value(summary)]
    styles = looks(summaries)
    styles = {model: look for model, look in styles.items() if any(row.model == model for row in rows)}
    size, unit = byte_unit(max(row.weight_bytes for row in rows))

    def draw(axes: Axes) -> None:
        marks: list[tuple[float, float, str]] = []
        for model, look in styles.items():
            mine = sorted((row for row in rows if row.model == model), key=lambda row: row.weight_bytes)
            sizes = [row.weight_bytes / size for row in mine]
            found = [metric.of(row) for row in mine]
            means = [metric.scale * each.mean for each in found]
            style = stroke(look, 1.1)
            axes.errorbar(sizes, means, yerr=whiskers(found, metric.scale), elinewidth=1.1, **style)
            if look.index == OTHERS:
                axes.plot(sizes, means, look.marker, **style)
                continue
            axes.plot(sizes, means, "o", **style | {"markersize": 11, "markeredgewidth": 1.0})
            marks += zip(
                sizes,
                means,
                ("fp" if row.format.quantizer == "none" else str(row.format.bits) for row in mine),
                strict=True,
            )
        axes.set(xlim=(0.0, 1.06 * max(row.weight_bytes for row in rows) / size), ylim=spread(rows, metric))
        axes.set(xlabel=f"weights, {unit}", ylabel=metric.axis)
        _write_bits(axes, marks)

    title = point_label(reference_point(summaries))
    return Plot((draw_panel("bytes", title, draw, *WIDE),), tuple(styles.values()), wide=True)


def _write_bits(axes: Axes, marks: Sequence[tuple[float, float, str]]) -> None:
    """Writes the bits into the round markers (x, y, bits), except into those that a later one covers."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    width, height = 340.0, 185.0  # of the axes in points, near enough to see whether two digits would touch
    for number, (x, y, bits) in enumerate(marks):
        near = [
            math.hypot((x - u) / (right - left) * width, (y - v) / (top - bottom) * height)
            for u, v, _ in marks[number + 1 :]
        ]
        if min(near, default=math.inf) >= 8.0:
            axes.text(x, y, bits, ha="center", va="center_baseline", fontsize=6.5, color=PAPER, fontweight="bold")


def threshold_reach(summaries: Sequence[Summary]) -> Plot | None:
    """Executed ratio against theta at full precision; none where no routed model was run at several thetas."""
    found = theta_series(summaries)
    if not found:
        return None
    styles = {model: look for model, look in looks(summaries).items() if model in found}
    reached = ends([summary.executed_ratio for series in found.values() for summary in series.values()])

    def draw(axes: Axes) -> None:
        for model, look in styles.items():
            ratios = [summary.executed_ratio for summary in found[model].values()]
            axes.errorbar(
                list(found[model]),
                [each.mean for each in ratios],
                yerr=whiskers(ratios),
                marker=look.marker,
                elinewidth=1.1,
                **stroke(look),
            )
        axes.set(xlabel="θ, the same in all layers", ylabel="executed ratio", ylim=limits(min(reached), max(reached)))

    return Plot((draw_panel("reach", "fp", draw, *WIDE),), tuple(styles.values()), wide=True)


def sweep(summaries: Sequence[Summary]) -> Plot | None:
    """Quality, logit gap and flip rate against the value of models NAME@VALUE, at the reference point.

    One row of panels per measure, one panel per format; none where no name has several values.
    """
    members = {model for values in families(summaries).values() for model in values}
    rows = [summary for summary in at_reference(summaries) if summary.model in members]
    if not rows:
        return None
    metric = metrics(rows)[0]
    measures: list[tuple[str, float, Callable[[Summary], Estimate | None]]] = [
        (metric.axis, metric.scale, metric.value),
        ("mean |logit gap|", 1.0, lambda summary: summary.logit_gap),
        ("flip rate", 1.0, lambda summary: summary.flip_rate),
    ]
    panels: list[str] = []
    for number, (label, scale, measure) in enumerate(measures):
        panels += _sweep_panels(f"sweep-{number}", rows, label, scale, measure)
    return Plot(tuple(panels), tuple(_family_looks(rows).values()))


def _family_looks(rows: Sequence[Summary]) -> dict[str, Look]:
    """A family takes the look of the model it is named after."""
    return looks(replace(row, model=family) for family, _, row in _swept_rows(rows))


def _swept_rows(rows: Sequence[Summary]) -> list[tuple[str, float, Summary]]:
    """Family, value and row, the value rising."""
    found = [(*member, row) for row in rows if (member := swept(row.model))]
    return sorted(found, key=lambda each: each[:2])


def _sweep_panels(
    name: str, rows: Sequence[Summary], label: str, scale: float, measure: Callable[[Summary], Estimate | None]
) -> tuple[str, ...]:
    """One measure of a sweep, one panel per format; no panels where it was not measured."""
    reached = ends([found for row in rows if (found := measure(row))], scale)
    if not reached:
        return ()
    values = sorted({value for _, value, _ in _swept_rows(rows)})

    def panel(number: int, title: str, members: Sequence[Summary]) -> str:
        def draw(axes: Axes) -> None:
            for model, look in _family_looks(rows).items():
                mine = [(value, measure(row)) for family, value, row in _swept_rows(members) if family == model]
                points = [(value, found) for value, found in mine if found]
                axes.errorbar(
                    [value for value, _ in points],
                    [scale * found.mean for _, found in points],
                    yerr=whiskers([found for _, found in points], scale),
                    marker=look.marker,
                    elinewidth=1.1,
                    **stroke(look),
                )
            axes.set(ylim=limits(min(reached), max(reached)), xlabel="value, log scale", ylabel=label)
            _value_axis(axes, values)

        return draw_panel(f"{name}-{number}", title, draw)

    return per_format(rows, panel)


def _value_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log axis with a tick at every value, if they are few; zero stands at its left end."""
    positive = [value for value in values if value > 0]
    if len(positive) < len(values):
        axes.set_xscale("symlog", linthresh=min(positive))
    else:
        axes.set_xscale("log")
    if len(values) <= MOST_TICKS:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())


def gap_histograms(summaries: Sequence[Summary]) -> Plot | None:
    """Distribution of the routers' logit gaps at the reference point, one panel per format; none without histograms."""
    rows = [row for row in at_reference(summaries) if row.histogram and sum(row.histogram.counts)]
    shown = {(row.model, row.format): row.histogram for row in rows if row.histogram}
    if not shown:
        return None
    styles = {row.model: looks(summaries)[row.model] for row in rows}
    signed = min(histogram.edges[0] for histogram in shown.values()) < 0
    used = [edge for histogram in shown.values() for edge in histogram.occupied()]
    top = 1.06 * max(max(histogram.density()) for histogram in shown.values())

    def panel(number: int, title: str, members: Sequence[Summary]) -> str:
        def draw(axes: Axes) -> None:
            for row in members:
                look, histogram = styles[row.model], shown[row.model, row.format]
                if len(styles) <= MOST_FILLED:
                    axes.stairs(histogram.density(), histogram.edges, fill=True, color=look.colour, alpha=0.22)
                line = {key: value for key, value in stroke(look).items() if not key.startswith("marker")}
                axes.stairs(histogram.density(), histogram.edges, **line)
            label = "logit gap, execute − skip" if signed else "|logit gap|"
            axes.set(xlim=(min(used), max(used)), ylim=(0, top), xlabel=label, ylabel="share of decisions per unit")

        return draw_panel(f"gaps-{number}", title, draw)

    return Plot(per_format(rows, panel), tuple(styles.values()))


def layer_shares(summaries: Sequence[Summary]) -> Plot | None:
    """Share of tokens that execute each layer, at the reference point, one panel per format."""
    rows = [row for row in at_reference(summaries) if row.routing != "dense" and row.executed_per_layer]
    if not rows:
        return None
    styles = {row.model: looks(summaries)[row.model] for row in rows}
    depth = max(len(row.executed_per_layer) for row in rows)

    def panel(number: int, title: str, members: Sequence[Summary]) -> str:
        def draw(axes: Axes) -> None:
            for row in members:
                look = styles[row.model]
                axes.plot(
                    range(len(row.executed_per_layer)),
                    row.executed_per_layer,
                    marker=look.marker,
                    **stroke(look),
                )
            axes.set(xlim=(-0.5, depth - 0.5), ylim=(-0.03, 1.05), xlabel="layer", ylabel="share of tokens that run it")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))

        return draw_panel(f"layers-{number}", title, draw)

    return Plot(per_format(rows, panel), tuple(styles.values()))


def training_curves(runs: Sequence[TrainingRun], summaries: Sequence[Summary]) -> Plot | None:
    """Cross-entropy, executed ratio, flip rate and logit gap over the steps of the routed runs; the others apart."""
    styles = looks(summaries)
    dense = next((look for model, look in styles.items() if model == "dense"), Look("Dense", 0, "D"))
    fallback = {"base": dense, "dense": dense, "dllm": Look("D-LLM", 1, "s"), "qtale": Look("QTALE", 2, "o")}
    used: dict[str, Look] = {}

    def look_of(run: TrainingRun) -> Look:
        look = styles.get(run.model or "") or fallback.get(run.model or "") or Look(run.name, OTHERS, "P")
        return used.setdefault(look.label, look)

    def panel(key: str, title: str, unit: str, members: Sequence[TrainingRun], name: str) -> str | None:
        drawn = [run for run in members if len(run.series.get(key, ())) > 1]
        if not drawn:
            return None

        def draw(axes: Axes) -> None:
            for run in drawn:
                steps, values = zip(*run.series[key], strict=True)
                axes.plot(steps, values, alpha=0.85, **stroke(look_of(run), 1.3))
            axes.set(xlabel="step", ylabel=unit)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))

        return draw_panel(f"training-{name}", title, draw)

    routed = [run for run in runs if run.routed]
    others = [run for run in runs if not run.routed]
    panels = [
        panel("cross_entropy", "Cross-entropy, dense", "nats per token", others, "base"),
        panel("cross_entropy", "Cross-entropy", "nats per token", routed, "entropy"),
        panel("executed_ratio", "Executed ratio", "share of layers", routed, "ratio"),
        panel("flip_rate", "Flip rate", "share of decisions", routed, "flips"),
        panel("logit_gap_q50", "Median logit gap", "|logit gap|", routed, "gap"),
    ]
    found = tuple(panel for panel in panels if panel)
    return Plot(found, tuple(used.values())) if found else None
