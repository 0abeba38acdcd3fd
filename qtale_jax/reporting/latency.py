"""What calibration for a speed prints: the parts of a decode step, and the thetas that were tried."""

from collections.abc import Sequence

from rich.table import Table

from qtale_jax.calibration.latency import LatencyTable
from qtale_jax.calibration.threshold import Found
from qtale_jax.reporting.console import table


def step_table(latency: LatencyTable) -> Table:
    """Milliseconds of the parts of a decode step, as measured."""

    def row(name: str, seconds: float) -> tuple[str, str]:
        return name, f"{1000 * seconds:.4f}"

    rows = [
        row("a step in which no routed layer runs", latency.idle),
        row("  of which embedding and head", latency.ends),
    ]
    rows += [row("  of which each router", latency.router)] if latency.router else []
    for make in latency.layers:
        name = _name(make.layers)
        for size, seconds in zip(latency.sizes[1:], make.seconds[1:], strict=True):
            rows.append(row(f"{name}, for {_rows(size)}", seconds))
    title = f"decode step on {latency.hardware}"
    return table(title, (f"{_rows(latency.rows)}, {latency.context} tokens kept", "ms"), rows)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


def _name(layers: Sequence[int]) -> str:
    first, last = layers[0], layers[-1]
    if first == last:
        return f"layer {first}"
    whole = len(layers) == last - first + 1
    return f"one of layers {first} to {last}" if whole else f"one of {len(layers)} layers, the first is {first}"


def path_table(latency: LatencyTable, found: Found) -> Table:
    """The thetas that were tried, ascending, with what is predicted for each; the one that was chosen is marked."""
    points = sorted({(*point, seconds) for point, seconds in zip(found.path, found.seconds, strict=True)})
    rows = [
        (
            f"{theta:.4f}{' *' if theta == found.theta else ''}",
            f"{ratio:.4f}",
            f"{1000 * seconds:.4f}",
            f"{latency.tokens_per_second(seconds):.4g}",
        )
        for theta, ratio, seconds in points
    ]
    return table("predicted speed", ("theta", "ratio", "ms per token", "tokens/s"), rows)
