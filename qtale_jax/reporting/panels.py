"""One panel of a plot: a small SVG, so that a page can set panels side by side or, on a phone, one below the other.

Colours that depend on light or dark paper are CSS variables with the light colour as fallback, so a panel also stands
alone. Legends are not in the panels; see `Plot.legend`.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from qtale_jax.reporting.aggregate import Estimate, Summary
from qtale_jax.reporting.labels import INK, MUTED, OTHERS, PAPER, RULE, SERIES, Look, Metric, format_labels

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
    """Panels as SVG texts, and the models of the legend that stands above them. `wide`: few, large panels."""

    panels: tuple[str, ...]
    legend: tuple[Look, ...]
    wide: bool = False


def draw_panel(
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


def whiskers(found: Sequence[Estimate], scale: float = 1.0) -> list[float]:
    """The lengths of the error bars; zero where no error is known."""
    return [scale * (each.error or 0.0) for each in found]


def limits(low: float, high: float, margin: float = 0.06) -> tuple[float, float]:
    """An axis from `low` to `high` with some room at both ends."""
    extent = (high - low) or abs(high) * 0.1 or 1.0
    return low - margin * extent, high + margin * extent


def ends(found: Sequence[Estimate], scale: float = 1.0) -> list[float]:
    """Both ends of every error bar."""
    return [scale * (each.mean + sign * (each.error or 0.0)) for each in found for sign in (-1, 1)]


def spread(summaries: Sequence[Summary], metric: Metric) -> tuple[float, float]:
    """Limits of the quality axis, whiskers included."""
    found = [metric.of(summary) for summary in summaries]
    low, high = limits(min(ends(found, metric.scale)), max(ends(found, metric.scale)))
    return low, min(high, 101.5) if metric.scale == 100.0 else high


def per_format(rows: Sequence[Summary], panel: Callable[[int, str, Sequence[Summary]], str]) -> tuple[str, ...]:
    """One panel per format: its number, its title, the summaries in it."""
    names = format_labels(rows)
    return tuple(
        panel(number, name, [row for row in rows if row.format == each])
        for number, (each, name) in enumerate(names.items())
    )


def stroke(look: Look, width: float = 1.6) -> dict[str, Any]:
    """How a line in a model's look is drawn: those beyond the colours thin, with small markers, behind the others."""
    thin = look.index == OTHERS
    return {
        "color": look.colour,
        "linewidth": 0.55 * width if thin else width,
        "markersize": 4.5 if thin else 6.0,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.5 if thin else 0.8,
        "zorder": 2.0 if thin else 3.0,
    }
