"""Tables: built from summaries, written as Markdown, or for the terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import rich.box
import rich.table
from rich.text import Text

from qtale_jax.reporting.aggregate import Estimate, Format, Summary
from qtale_jax.reporting.labels import (
    Metric,
    byte_unit,
    count_text,
    format_labels,
    metrics,
    model_label,
    point_label,
)


@dataclass(frozen=True)
class Cell:
    """What a cell says, and a detail set smaller behind it."""

    text: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".strip()


ABSENT = Cell("–")


@dataclass(frozen=True)
class Table:
    """Headers and rows of cells. The first `labels` columns are names, the others numbers; `breaks` start a section."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    labels: int
    breaks: frozenset[int]
    note: str


def _table(
    title: str, headers: Iterable[str], sections: Iterable[Iterable[Sequence[Cell]]], labels: int, note: str
) -> Table:
    rows: list[tuple[Cell, ...]] = []
    breaks = set()
    for section in sections:
        if rows:
            breaks.add(len(rows))
        rows.extend(tuple(row) for row in section)
    return Table(title, tuple(headers), tuple(rows), labels, frozenset(breaks), note)


def _sections(summaries: Sequence[Summary]) -> dict[str, dict[str, dict[Format, Summary]]]:
    """Point, then model, then format; in the order of the summaries."""
    found: dict[str, dict[str, dict[Format, Summary]]] = {}
    for summary in summaries:
        found.setdefault(summary.point, {}).setdefault(summary.model, {})[summary.format] = summary
    return found


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
                Cell(point_label(point)),
                *(_quality_cell(row.get(each), metric) for each in names),
            )
            for model, row in models.items()
        ]
        for point, models in _sections(summaries).items()
    ]
    unit = metric.axis[:1].upper() + metric.axis[1:]
    return _table(
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
    for point, models in _sections(summaries).items():
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
                        Cell(point_label(point)),
                        Cell(label),
                        _quality_cell(full, metric),
                        *(_quality_cell(row.get(bits), metric) for bits in widths),
                    )
                    for label, row in rows.items()
                ]
            )
    unit = metric.axis[:1].upper() + metric.axis[1:]
    return _table(
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
                Cell(point_label(summary.point)),
                _number(summary.theta, 3),
                _number(summary.executed_ratio, 3),
                _number(summary.logit_gap, 2),
                _number(summary.flip_rate, 3),
            )
            for summary in summaries
            if summary.format == each and summary.routing != "dense"
        ]
        for each, name in names.items()
    ]
    return _table(
        "Routing",
        ("format", "method", "θ set for", "θ", "executed ratio", "mean |logit gap|", "flip rate"),
        sections,
        3,
        "θ: mean over layers. Executed ratio: share of layers run. Logit gap: distance between a router's two logits. "
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
                Cell(point_label(row.point)),
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
    return _table("Accuracy per task", ("format", "method", "θ set for", *tasks, "mean"), sections, 3, note)


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
    return _table(
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
            (Cell(model_label(model)), Cell(point_label(point)), *(cell(row.get(each)) for each in names))
            for model, row in models.items()
        ]
        for point, models in _sections(summaries).items()
    ]
    note = "Floating-point operations per token, routers included" + (
        "; × is the share of the dense model." if whole else "."
    )
    return _table("FLOPs per token", ("method", "θ set for", *names.values()), sections, 2, note)


def quality_tables(summaries: Sequence[Summary]) -> list[Table]:
    """One quality table per measure that occurs, the main one first; by quantizer where several share a width."""
    found = [summary.format for summary in summaries if summary.format.quantizer != "none"]
    several = len({(each.quantizer, each.bits, each.group_size) for each in found}) > len({each.bits for each in found})
    build = quantizer_table if several else quality_table
    return [build(summaries, metric) for metric in metrics(summaries)]


def all_tables(summaries: Sequence[Summary]) -> list[Table]:
    """Every table of the report that has rows, in the order of the report."""
    found = [
        *quality_tables(summaries),
        task_table(summaries),
        routing_table(summaries),
        bytes_table(summaries),
        flops_table(summaries),
    ]
    return [table for table in found if table is not None and table.rows]


def _escape(text: str) -> str:
    for character in "\\|*_<>`[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")


def to_markdown(table: Table) -> str:
    """The table in Markdown, under a heading, with its note."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(_escape(str(cell)) for cell in cells) + " |"

    rule = "| " + " | ".join("---" if column < table.labels else "---:" for column in range(len(table.headers))) + " |"
    rows = [line(table.headers), rule, *(line(row) for row in table.rows)]
    return f"## {_escape(table.title)}\n\n" + "\n".join(rows) + f"\n\n{_escape(table.note)}\n"


def _terminal(cell: Cell) -> Text:
    detail = cell.detail.replace("@ 0.", "@.").replace("@ 1.00", "@1")
    return Text.assemble(cell.text.replace(" ± ", "±"), (f" {detail}" if detail else "", "dim"))


def to_rich(table: Table) -> rich.table.Table:
    """The table for the terminal: `98.4±0.3 @.50`, so that four formats fit 80 columns; more break at the ratio."""
    shown = rich.table.Table(
        title=table.title,
        title_justify="left",
        title_style="bold",
        caption=table.note,
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for column, header in enumerate(table.headers):
        shown.add_column(
            header, justify="left" if column < table.labels else "right", no_wrap=column < table.labels, overflow="fold"
        )
    for number, row in enumerate(table.rows):
        if number in table.breaks:
            shown.add_section()
        shown.add_row(*map(_terminal, row))
    return shown
