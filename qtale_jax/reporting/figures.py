"""Plots as files of their own: one SVG each, for a README, a paper or a talk."""

import re
from collections.abc import Sequence
from html import escape

from qtale_jax.reporting.aggregate import Summary
from qtale_jax.reporting.drawings import Drawings
from qtale_jax.reporting.labels import INK, PAPER, Look, metrics
from qtale_jax.reporting.panels import Plot

_SHAPES = {
    "o": '<circle cx="7" cy="7" r="5"/>',
    "s": '<rect x="2.5" y="2.5" width="9" height="9"/>',
    "D": '<path d="M7 1 13 7 7 13 1 7z"/>',
    "^": '<path d="M7 1.5 12.5 12h-11z"/>',
    "v": '<path d="M7 12.5 1.5 2h11z"/>',
    "X": '<path d="M4 1 7 4l3-3 3 3-3 3 3 3-3 3-3-3-3 3-3-3 3-3-3-3z"/>',
    "<": '<path d="M1.5 7 12 1.5v11z"/>',
}
_MARGIN, _GAP, _LINE = 12.0, 14.0, 26.0  # points
_LETTER = 6.4  # width of one at the size of the legend, wide enough for every sans-serif that stands in


def swatch(look: Look) -> str:
    """A marker as in the plots, 14 × 14, its colour set from outside by `fill`."""
    return _SHAPES.get(look.marker, '<path d="M5 1h4v4h4v4H9v4H5V9H1V5h4z"/>')


def columns(plot: Plot) -> int:
    """How many panels stand side by side: four small or two wide ones at most, and five stand as three and two."""
    rows = -(-len(plot.panels) // (2 if plot.wide else 4))
    return -(-len(plot.panels) // rows)


def standalone(plot: Plot, title: str) -> str:
    """One SVG document: the legend, and the panels below it, on paper of its own.

    Colours are plain ones, which every program that shows or edits SVG knows.
    """
    sizes = [tuple(map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', panel)[0])) for panel in plot.panels]
    across, (wide, high) = columns(plot), (max(sides) for sides in zip(*sizes, strict=True))
    width = 2 * _MARGIN + across * wide + (across - 1) * _GAP
    legend, top = _legend(plot.legend, width)
    down = -(-len(sizes) // across)
    height = top + down * high + (down - 1) * _GAP + _MARGIN
    panels = [
        f'<svg x="{_MARGIN + index % across * (wide + _GAP):g}" y="{top + index // across * (high + _GAP):g}"'
        + re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', panel.removeprefix("<svg"), count=2)
        for index, panel in enumerate(plot.panels)
    ]
    body = re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", "".join(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}pt" height="{height:g}pt" '
        f'viewBox="0 0 {width:g} {height:g}" role="img"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="{PAPER}"/>{legend}{body}</svg>\n'
    )


def _legend(looks: Sequence[Look], width: float) -> tuple[str, float]:
    """The entries in as many lines as they need, and where the panels begin."""
    x, y, parts = _MARGIN, _MARGIN, []
    for look in looks:
        needed = 20 + _LETTER * len(look.label) + 14
        if x + needed > width and x > _MARGIN:
            x, y = _MARGIN, y + _LINE
        parts.append(
            f'<g transform="translate({x:g} {y:g})"><g fill="{look.colour}">{swatch(look)}</g>'
            f'<text x="20" y="11.5" font-family="DejaVu Sans, sans-serif" font-size="10.5" fill="{INK}">'
            f"{escape(look.label)}</text></g>"
        )
        x += needed
    return "".join(parts), y + _LINE


def quality_figures(summaries: Sequence[Summary]) -> dict[str, str]:
    """File name -> title of the figures of quality against executed ratio, one per metric."""
    return {
        f"{metric.name.split()[0]}_by_ratio.svg": f"{metric.name} against executed ratio"
        for metric in metrics(summaries)
    }


def all_figures(summaries: Sequence[Summary], drawings: Drawings) -> dict[str, str]:
    """File name -> SVG document, of every plot that the report has."""
    found = [(*name, plot) for name, plot in zip(quality_figures(summaries).items(), drawings.quality, strict=True)]
    found += [
        ("threshold_reach.svg", "reach of θ", drawings.reach),
        ("sweep.svg", "sweeps", drawings.sweep),
        ("logit_gaps.svg", "logit gaps", drawings.gaps),
        ("layers.svg", "share of tokens that run each layer", drawings.layers),
        ("training.svg", "training", drawings.training),
    ]
    return {name: standalone(plot, title) for name, title, plot in found if plot}
