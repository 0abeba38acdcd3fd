"""Small tables that single stages print."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    out = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        out.add_row(*row)
    return out


def quantization_table(report: Sequence[Any], before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    """Relative weight error and bytes per layer (`quantization.pipeline.LayerReport`), then totals."""
    rows = [
        (
            f"layer {layer.layer}",
            f"{sum(layer.weight_error.values()) / len(layer.weight_error):.4f}",
            f"{max(layer.weight_error.values()):.4f}",
            f"{layer.bytes_before:,}",
            f"{layer.bytes_after:,}",
        )
        for layer in report
    ]
    rows.append(("whole model", "", "", f"{before['total']:,}", f"{after['total']:,}"))
    return table("quantization", ("part", "mean error", "worst error", "bytes before", "bytes after"), rows)
