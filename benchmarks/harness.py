"""What all benchmarks share: timing in turns, the JSON that they write, the table that they print.

A benchmark compares things within one run, in one process unless it says otherwise: every round measures each of them
once, so that a slow spell of the machine hits all alike, and medians over the rounds are reported, with the ratio to a
named baseline.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from qtale_jax.allocator import keep_freed_memory
from qtale_jax.artifact import versions
from qtale_jax.reporting.console import table
from qtale_jax.reporting.environment import environment


@dataclass(frozen=True)
class Row:
    """One figure: `ratio` is value / baseline's value, or the inverse where less is better, so that more is better."""

    name: str
    value: float
    unit: str
    baseline: str | None = None
    ratio: float | None = None


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, results awaited."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


@contextmanager
def elsewhere(make: Callable[[], Callable[[], Any]], keeps_memory: bool) -> Iterator[Callable[[], Any]]:
    """What `make` gives, in a process of its own: a function that calls it there and waits for its results.

    With `keeps_memory` the process treats freed memory as `python -m qtale_jax.train` does, otherwise as it comes.
    `make` has to be a function of a module, or a partial one.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, keeps_memory), daemon=True)
    process.start()
    there.close()

    def call() -> None:
        here.send(True)
        here.recv()

    try:
        yield call
    finally:
        here.close()
        process.join()


def _serve(connection: Any, make: Callable[[], Callable[[], Any]], keeps_memory: bool) -> None:
    if keeps_memory and not keep_freed_memory():
        print("freed memory is not kept here", flush=True)
    run = make()
    try:
        while connection.recv():
            jax.block_until_ready(run())
            connection.send(None)
    except EOFError:
        return


def in_turns(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` rounds, after one call each to warm up."""
    return {name: float(np.median(seconds)) for name, seconds in each_round(candidates, rounds).items()}


def each_round(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each candidate in each of `rounds` rounds, after one call each to warm up."""
    for run in candidates.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in track(range(rounds), description="rounds", console=Console(stderr=True), transient=True):
        for name, run in candidates.items():
            times[name].append(seconds(run))
    return {name: np.asarray(values) for name, values in times.items()}


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark has."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--output", type=Path, help="JSON file to write")
    found.add_argument("--rounds", type=int, default=7, help="times that each candidate is measured (default 7)")
    return found


def report(benchmark: str, rows: list[Row], output: Path | None) -> None:
    """Prints the rows and writes `{benchmark, hardware, versions, rows}`."""
    shown = [
        (row.name, f"{row.value:,.4g}", row.unit, row.baseline or "", "" if row.ratio is None else f"{row.ratio:.2f}")
        for row in rows
    ]
    Console().print(table(benchmark, ("name", "value", "unit", "baseline", "ratio"), shown))
    document = {
        "benchmark": benchmark,
        "hardware": environment(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
