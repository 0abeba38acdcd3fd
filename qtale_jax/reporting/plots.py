"""Plots: every panel is one small SVG, so that a page can set them side by side or, on a phone, one below the other.

Panels of one plot share their axes. Colours that depend on light or dark paper are CSS variables with the light colour
as fallback, so a panel also stands alone. Legends are not in the panels; see `Plot.legend`.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qtale_jax.reporting.aggregate import Estimate, Summary, at_reference, reference_point
from qtale_jax.reporting.labels import (
    INK,
    MUTED,
    PAPER,
    RULE,
    SERIES,
    Look,
    Metric,
    byte_unit,
    format_labels,
    looks,
    point_label,
)
from qtale_jax.reporting.logs import TrainingRun

SMALL, WIDE = (2.95, 2.7), (5.4, 3.4)  # inches

_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"}
_VARIABLES |= {light: f"series-{index}" for index, (light, _) in enumerate(SERIES)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "text.parse_math": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.0,
    "figure.facecolor": "none",
}


@dataclass(frozen=True)
class Plot:
    """Panels as SVG texts, and the models of the legend that stands above them. `wide`: one large panel."""

    panels: tuple[str, ...]
    legend: tuple[Look, ...]
    wide: bool = False


def _panel(
    name: str, title: str, draw: Callable[[Axes], None], width: float = SMALL[0], height: float = SMALL[1]
) -> str:
    """Draws one panel of `width` × `height` inches. `name` makes its ids unique on a page."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_title(title)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = f'<svg role="img" aria-label="{escape(title)}"' + svg[svg.index("<svg") + 4 :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg).strip()


def _whiskers(found: Sequence[Estimate], scale: float = 1.0) -> list[float]:
    return [scale * (each.error or 0.0) for each in found]


def _limits(low: float, high: float, margin: float = 0.06) -> tuple[float, float]:
    extent = (high - low) or abs(high) * 0.1 or 1.0
    return low - margin * extent, high + margin * extent


def _spread(summaries: Sequence[Summary], metric: Metric) -> tuple[float, float]:
    """Limits of the quality axis, whiskers included."""
    found = [metric.of(summary) for summary in summaries]
    ends = [metric.scale * (each.mean + sign * (each.error or 0.0)) for each in found for sign in (-1, 1)]
    low, high = _limits(min(ends), max(ends))
    return low, min(high, 101.5) if metric.scale == 100.0 else high


def _per_format(rows: Sequence[Summary], panel: Callable[[int, str, Sequence[Summary]], str]) -> tuple[str, ...]:
    """One panel per format: its number, its title, the summaries in it."""
    names = format_labels(rows)
    return tuple(
        panel(number, name, [row for row in rows if row.format == each])
        for number, (each, name) in enumerate(names.items())
    )


def quality_by_ratio(summaries: Sequence[Summary], metric: Metric) -> Plot:
    """Quality against measured executed ratio, one panel per format; points of one model are joined."""
    rows = [summary for summary in summaries if metric.value(summary)]
    styles = looks(rows)
    ratios = _limits(min(row.executed_ratio.mean for row in rows), max(row.executed_ratio.mean for row in rows))
    quality = _spread(rows, metric)

    def panel(number: int, title: str, members: Sequence[Summary]) -> str:
        def draw(axes: Axes) -> None:
            for model, look in styles.items():
                mine = sorted((row for row in members if row.model == model), key=lambda row: row.executed_ratio.mean)
                found = [metric.of(row) for row in mine]
                if mine and mine[0].routing == "dense":
                    axes.axhline(metric.scale * found[0].mean, color=look.colour, linewidth=0.9, linestyle=(0, (2, 3)))
                axes.errorbar(
                    [row.executed_ratio.mean for row in mine],
                    [metric.scale * each.mean for each in found],
                    xerr=_whiskers([row.executed_ratio for row in mine]),
                    yerr=_whiskers(found, metric.scale),
                    color=look.colour,
                    marker=look.marker,
                    markeredgecolor=PAPER,
                    markeredgewidth=0.8,
                    elinewidth=1.1,
                )
            axes.set(xlim=ratios, ylim=quality, xlabel="executed ratio", ylabel=metric.axis)

        return _panel(f"{metric.name.split()[0]}-ratio-{number}", title, draw)

    return Plot(_per_format(rows, panel), tuple(styles.values()))


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
            whiskers = _whiskers(found, metric.scale)
            axes.errorbar(sizes, means, yerr=whiskers, color=look.colour, linewidth=1.1, elinewidth=1.1)
            axes.plot(sizes, means, "o", markersize=11, color=look.colour, markeredgecolor=PAPER)
            marks += zip(
                sizes,
                means,
                ("fp" if row.format.quantizer == "none" else str(row.format.bits) for row in mine),
                strict=True,
            )
        axes.set(xlim=(0.0, 1.06 * max(x for x, _, _ in marks)), ylim=_spread(rows, metric))
        axes.set(xlabel=f"weights, {unit}", ylabel=metric.axis)
        _write_bits(axes, marks)

    title = point_label(reference_point(summaries))
    return Plot((_panel("bytes", title, draw, *WIDE),), tuple(styles.values()), wide=True)


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
                colour, histogram = styles[row.model].colour, shown[row.model, row.format]
                axes.stairs(histogram.density(), histogram.edges, fill=True, color=colour, alpha=0.22)
                axes.stairs(histogram.density(), histogram.edges, color=colour, linewidth=1.6)
            label = "logit gap, execute − skip" if signed else "|logit gap|"
            axes.set(xlim=(min(used), max(used)), ylim=(0, top), xlabel=label, ylabel="share of decisions per unit")

        return _panel(f"gaps-{number}", title, draw)

    return Plot(_per_format(rows, panel), tuple(styles.values()))


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
                    color=look.colour,
                    marker=look.marker,
                    markeredgecolor=PAPER,
                    markeredgewidth=0.8,
                )
            axes.set(xlim=(-0.5, depth - 0.5), ylim=(-0.03, 1.05), xlabel="layer", ylabel="share of tokens that run it")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))

        return _panel(f"layers-{number}", title, draw)

    return Plot(_per_format(rows, panel), tuple(styles.values()))


def training_curves(runs: Sequence[TrainingRun], summaries: Sequence[Summary]) -> Plot | None:
    """Cross-entropy, executed ratio, flip rate and logit gap over the steps of the routed runs; the others apart."""
    styles = looks(summaries)
    dense = next((look for model, look in styles.items() if model == "dense"), Look("Dense", 0, "D"))
    fallback = {"base": dense, "dense": dense, "dllm": Look("D-LLM", 1, "s"), "qtale": Look("QTALE", 2, "o")}
    used: dict[str, Look] = {}

    def look_of(run: TrainingRun) -> Look:
        look = styles.get(run.model or "") or fallback.get(run.model or "") or Look(run.name, 5, "P")
        return used.setdefault(look.label, look)

    def panel(key: str, title: str, unit: str, members: Sequence[TrainingRun], name: str) -> str | None:
        drawn = [run for run in members if len(run.series.get(key, ())) > 1]
        if not drawn:
            return None

        def draw(axes: Axes) -> None:
            for run in drawn:
                steps, values = zip(*run.series[key], strict=True)
                axes.plot(steps, values, color=look_of(run).colour, linewidth=1.3, alpha=0.85)
            axes.set(xlabel="step", ylabel=unit)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))

        return _panel(f"training-{name}", title, draw)

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
