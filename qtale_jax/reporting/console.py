"""Small tables that single stages print, and their progress bars."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    out = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        out.add_row(*row)
    return out


def harness_table(result: Mapping[str, Any]) -> Table:
    """The harness's metrics of every task, the executed share of layers, and FLOPs per token."""
    groups = {name: {"metrics": metrics} for name, metrics in result["groups"].items()}
    rows = []
    for name, task in (result["tasks"] | groups).items():
        metrics = task["metrics"]
        cut = f" ({task['truncated']} cut)" if task.get("truncated") else ""
        first = (name, f"{task.get('documents', '')}{cut}")
        ratio, flops = task.get("executed_ratio"), task.get("flops_per_token")
        last = ("" if ratio is None else f"{ratio:.4f}", "" if flops is None else f"{flops:.3g}")
        for metric in [metric for metric in metrics if "_stderr" not in metric]:
            head, comma, tail = metric.partition(",")
            value, error = metrics[metric], metrics.get(f"{head}_stderr{comma}{tail}")
            shown = "–" if value is None else f"{value:.4f}"
            shown += "" if error is None else f" ±{error:.3f}"
            rows.append((*map(str, first), metric, shown, *last))
            first, last = ("", ""), ("", "")
    row = result["row"]
    point = "" if row["theta"] is None else f", {result['point']}"
    columns = ("task", "rows", "metric", "value", "run", "FLOPs")
    out = table(f"{row['model']}, {row['bits']} bits{point}", columns, rows)
    for column in out.columns:
        column.no_wrap = True
    return out


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def plan_table(plan: Any) -> Table:
    """Memory by what needs it, and time (`quantization.plan.Plan`)."""
    rows = [(name, _bytes(size)) for name, size in plan.memory.items()]
    minutes, seconds = divmod(round(plan.seconds), 60)
    rows += [("peak memory", _bytes(plan.peak)), ("time", f"about {minutes} min {seconds} s")]
    return table("plan", ("what", "expected"), rows)


@contextmanager
def layer_progress(console: Console, layers: int, quiet: bool) -> Iterator[Callable[[Any, bool], None]]:
    """Yields what is called with every finished `LayerReport`; a bar on a terminal, otherwise a line per layer."""
    columns = (TextColumn("quantizing"), BarColumn(), MofNCompleteColumn(), TextColumn("layers"), TimeElapsedColumn())
    bar = console.is_terminal and not quiet
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not bar) as progress:
        task = progress.add_task("quantizing", total=layers)

        def say(report: Any, before: bool) -> None:
            progress.advance(task)
            if not quiet and not bar:
                done = "done before" if before else f"output error {_worst(report)}"
                console.print(f"layer {report.layer + 1}/{layers}: {done}", highlight=False, soft_wrap=True)
            for name, linear in report.linears.items():
                if linear.fallback and not before and not quiet:
                    text = f"layer {report.layer}, {name}: rounded to nearest, {linear.fallback}"
                    console.print(text, highlight=False, soft_wrap=True)

        yield say


def _worst(report: Any) -> str:
    errors = [linear.output_error for linear in report.linears.values() if linear.output_error is not None]
    return f"up to {max(errors):.4f}" if errors else "not measured"


def quantization_tables(reports: Sequence[Any], before: Mapping[str, int], after: Mapping[str, int]) -> list[Table]:
    """What quantization did per layer (`quantization.report.LayerReport`), and the bytes of each part of the model."""

    def mean(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.4f}" if known else "–"

    def row(report: Any) -> tuple[str, ...]:
        linears = list(report.linears.values())
        return (
            str(report.layer),
            mean([linear.weight_error for linear in linears]),
            mean([linear.output_error for linear in linears]),
            mean([linear.rounding_error for linear in linears]),
            f"{min(linear.rows for linear in linears):,}",
            f"{report.filled:,}",
            str(sum(linear.retries for linear in linears)),
            str(sum(linear.fallback is not None for linear in linears)),
            f"{report.bytes_before:,}",
            f"{report.bytes_after:,}",
        )

    columns = ("layer", "weight error", "output error", "if rounded", "rows", "filled up", "retries", "fallbacks")
    parts = [(part, f"{before[part]:,}", f"{after[part]:,}") for part in after if before.get(part) or after[part]]
    return [
        table("quantization, means over a layer", (*columns, "bytes before", "bytes after"), list(map(row, reports))),
        table("bytes", ("part", "before", "after"), parts),
    ]
