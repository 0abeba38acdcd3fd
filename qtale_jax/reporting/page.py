"""The report as one HTML file: tables, plots and maps inline, nothing loaded from anywhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qtale_jax.reporting import plots, tables
from qtale_jax.reporting.aggregate import Summary, at_reference, families, reference_point
from qtale_jax.reporting.cells import Table
from qtale_jax.reporting.drawings import Drawings
from qtale_jax.reporting.execution_map import MOST_TOKENS, execution_map
from qtale_jax.reporting.figures import columns, swatch
from qtale_jax.reporting.html_table import table_html
from qtale_jax.reporting.labels import Look, format_labels, looks, metrics, model_label, point_label
from qtale_jax.reporting.logs import TrainingRun
from qtale_jax.reporting.panels import Plot
from qtale_jax.reporting.stylesheet import STYLESHEET
from qtale_jax.reporting.verdict import verdict_table

MOST_EXAMPLES = 4


@dataclass(frozen=True)
class Making:
    """How the report came to be: the command, the configuration (changed keys, all keys; YAML), the environment."""

    command: str
    changed: str
    configuration: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class _Section:
    anchor: str
    heading: str
    body: str


def _swatch(look: Look) -> str:
    style = f"fill:var(--series-{look.index})"
    return f'<svg width="14" height="14" viewBox="0 0 14 14" aria-hidden="true" style="{style}">{swatch(look)}</svg>'


def _figure(plot: Plot, caption: str) -> str:
    legend = "".join(f"<li>{_swatch(look)}{escape(look.label)}</li>" for look in plot.legend)
    grid = f'class="panels{" wide" if plot.wide else ""}" style="--columns:{columns(plot)}"'
    return (
        f'<figure><ul class="legend">{legend}</ul>'
        f"<div {grid}>{''.join(plot.panels)}</div>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _capital(text: str) -> str:
    return escape(text[:1].upper() + text[1:])


def _titled(found: Sequence[Table]) -> str:
    return "".join(f"<h3>{escape(table.title)}</h3>{table_html(table)}" for table in found)


def _at_reference(summaries: Sequence[Summary], build: Callable[[Sequence[Summary]], Table | None]) -> str:
    """A table of the reference point, and behind a fold that of all points, where there are more."""
    shown = at_reference(summaries)
    table, whole = build(shown), build(summaries)
    folded = (
        f"<details><summary>All operating points</summary>{table_html(whole)}</details>"
        if whole and len(shown) < len(summaries)
        else ""
    )
    return (table_html(table) if table else "") + folded


def _tradeoff(summaries: Sequence[Summary], drawn: Sequence[Plot]) -> str:
    note = escape(tables.error_note(summaries, "A whisker"))
    axes = "Every panel has its own quality axis. " if plots.crowded(summaries) else ""
    figures = []
    for metric, plot in zip(metrics(summaries), drawn, strict=True):
        better = "Higher" if metric.higher_is_better else "Lower"
        caption = (
            f"<b>{_capital(metric.name)} against executed ratio, one panel per format.</b> {better} is better; further "
            "left is cheaper. Points of one method differ only in θ. A dotted line is a model that runs all layers, in "
            f"that format. Methods compare along a vertical line, at equal ratio. {axes}{note}"
        )
        figures.append(_figure(plot, caption))
    return "".join(figures)


def _reach(plot: Plot, table: Table) -> str:
    caption = (
        "<b>How far θ moves the share of layers that run, at full precision.</b> A flat line means that the routers "
        "are decided: few of their probabilities lie between the thresholds."
    )
    return _figure(plot, caption) + table_html(table)


def _sweep(plot: Plot, summaries: Sequence[Summary]) -> str:
    point, named = escape(point_label(reference_point(summaries))), families(summaries)
    rows = [summary for summary in summaries if any(summary.model in members for members in named.values())]
    models = ", ".join(
        f"{escape(model_label(name))} at {', '.join(f'{value:g}' for value in sorted(set(members.values())))}"
        for name, members in named.items()
    )
    caption = (
        f"<b>One hyper-parameter, several values</b> (at {point}): {models}. One row of panels per measure, one panel "
        f"per format. {escape(tables.error_note(rows, 'A whisker'))}"
    )
    return _figure(plot, caption)


def _sizes(summaries: Sequence[Summary]) -> str:
    metric = metrics(at_reference(summaries))[0]
    figure = _figure(
        plots.quality_by_bytes(summaries, metric),
        f"<b>{_capital(metric.name)} against the bytes of the weights.</b> The number in a marker is the bits per "
        "weight of the linears; fp is full precision, as stored. Routers count.",
    )
    return figure + _titled((tables.bytes_table(summaries), tables.flops_table(summaries)))


def _routing(summaries: Sequence[Summary], gaps: Plot | None, layers: Plot | None) -> str:
    point = escape(point_label(reference_point(summaries)))
    body = []
    if gaps:
        body.append(
            _figure(
                gaps,
                f"<b>How far apart a router's two logits are</b> (at {point}). A small gap leaves the choice open, so "
                "that noise in training tries many paths; a large one fixes it.",
            )
        )
    if layers:
        body.append(
            _figure(
                layers, f"<b>Share of tokens that run each layer</b> (at {point}). Layers without a router run for all."
            )
        )
    return "".join(body) + _at_reference(summaries, tables.routing_table)


def _maps(summaries: Sequence[Summary]) -> str:
    """Examples side by side: one row per example, one map per routed model, first and last format."""
    styles, names = looks(summaries), format_labels(summaries)
    rows = [row for row in at_reference(summaries) if row.routing != "dense" and row.evaluations[0].maps]
    used = [each for each in names if any(row.format == each for row in rows)]
    body = []
    for each in dict.fromkeys((used[0], used[-1])):
        body.append(f'<h3>{escape(names[each])}</h3><div class="examples">')
        members = [row for row in rows if row.format == each]
        count = min(MOST_EXAMPLES, max(len(row.evaluations[0].maps) for row in members))
        for number in range(count):
            drawn = []
            for row in members:
                if number >= len(row.evaluations[0].maps):
                    continue
                example, look = row.evaluations[0].maps[number], styles[row.model]
                name = f"map-{used.index(each)}-{number}-{len(drawn)}"
                about = ", ".join(filter(None, (example.task, f"{100 * example.executed_ratio:.0f} % executed")))
                drawn.append(
                    f'<div class="map"><h4><b>{escape(look.label)}</b> · {escape(about)}</h4>'
                    f'<div class="scroll" tabindex="0">{execution_map(example, name, look.index)}</div></div>'
                )
            body.append(f'<figure class="maps">{"".join(drawn)}</figure>')
        body.append("</div>")
    return "".join(body)


def _maps_section(summaries: Sequence[Summary]) -> str:
    longest = max(len(example.tokens) for row in summaries for example in row.evaluations[0].maps)
    cut = f" The first {MOST_TOKENS} tokens are drawn." if longest > MOST_TOKENS else ""
    return (
        "<p>Each column is a token, each row a layer, the first at the bottom. A filled square ran: the stronger its "
        "colour, the surer the router. An empty one was skipped. Hatched layers have no router and always run; so do "
        "all layers for the first tokens of a sequence. Point at a square for its probability. "
        f"Taken at {escape(point_label(reference_point(summaries)))}.{cut}</p>{_maps(summaries)}"
    )


def _making(making: Making) -> str:
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in making.environment.items())
    changed = f"<h3>Configuration</h3><pre>{escape(making.changed)}</pre>" if making.changed.strip() else ""
    return (
        f"<pre>{escape(making.command)}</pre>{changed}<details><summary>Every key, defaults included</summary>"
        f"<pre>{escape(making.configuration)}</pre></details><h3>Environment</h3><dl>{rows}</dl>"
    )


def _sections(
    summaries: Sequence[Summary], making: Making, held_out: Sequence[Summary], drawings: Drawings
) -> list[_Section]:
    routed = [summary for summary in summaries if summary.routing != "dense"]
    task_table = tables.task_table(summaries)
    found = [_Section("results", "Results", _titled(tables.quality_tables(summaries)))]
    if verdicts := verdict_table(summaries):
        found.append(_Section("claims", verdicts.title, table_html(verdicts)))
    if gains := tables.paired_tables(summaries):
        found.append(_Section("paired", "Paired differences", _titled(gains)))
    found.append(_Section("ratio", "Quality against executed ratio", _tradeoff(summaries, drawings.quality)))
    reach, reached = drawings.reach, tables.reach_table(summaries)
    if reach and reached:
        found.append(_Section("reach", "Reach of θ", _reach(reach, reached)))
    if drawings.sweep:
        found.append(_Section("sweep", "Sweeps", _sweep(drawings.sweep, summaries)))
    if task_table:
        found.append(_Section("tasks", task_table.title, _at_reference(summaries, tables.task_table)))
    if routed:
        found.append(_Section("routing", "Routing", _routing(summaries, drawings.gaps, drawings.layers)))
    if any(row.evaluations[0].maps for row in at_reference(summaries) if row.routing != "dense"):
        found.append(_Section("maps", "Which layers run for which token", _maps_section(summaries)))
    if held_out:
        found.append(_Section("held-out", "Held-out tasks", _titled(tables.held_out_tables(held_out))))
    found.append(_Section("cost", "Bytes and FLOPs", _sizes(summaries)))
    if drawings.training:
        caption = (
            "<b>Training, as logged.</b> One line per run. Executed ratio and flip rate are of the decisions sampled "
            "in training."
        )
        found.append(_Section("training", "Training", _figure(drawings.training, caption)))
    return [*found, _Section("making", "How this was made", _making(making))]


def _lead(summaries: Sequence[Summary]) -> str:
    methods = list(dict.fromkeys(model_label(summary.model) for summary in summaries))
    names = list(format_labels(summaries).values())
    seeds = sorted({seed for summary in summaries for seed in summary.seeds})
    count = sum(len(summary.seeds) for summary in summaries)
    return (
        f"{', '.join(methods)} at {', '.join(names)}: {count} evaluation{'s' if count != 1 else ''}, "
        f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}."
    )


def build_page(
    title: str,
    summaries: Sequence[Summary],
    runs: Sequence[TrainingRun],
    making: Making,
    held_out: Sequence[Summary] = (),
    drawings: Drawings | None = None,
) -> str:
    """The whole report as one HTML document without references to anything outside it.

    Args:
        title: the heading.
        summaries: what was measured.
        runs: logs of training.
        making: how all of it was made.
        held_out: what was measured on tasks that nothing was chosen by.
        drawings: plots of the summaries and runs, if there are some already.
    """
    sections = _sections(summaries, making, held_out, drawings or Drawings(summaries, runs))
    links = "".join(f'<a href="#{section.anchor}">{escape(section.heading)}</a>' for section in sections)
    body = "".join(
        f'<section id="{section.anchor}"><h2>{escape(section.heading)}</h2>{section.body}</section>\n'
        for section in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLESHEET}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="lead">{escape(_lead(summaries))}</p>'
        f'<nav aria-label="Contents">{links}</nav>\n{body}</main></body></html>\n'
    )
