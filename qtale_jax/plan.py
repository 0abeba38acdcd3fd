"""`python -m qtale_jax.plan CONFIG [key=value ...]`: what training and inference take on accelerators, from shapes."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config


def run_stage(config: Config, *, quiet: bool = False) -> Path:
    """Estimates, compiles where libtpu is installed, prints tables and writes `plan.output`.

    Returns:
        The JSON file.

    Raises:
        InputError: an unknown topology or model, a mesh that does not fit, counts that do not divide.
    """
    _without_accelerators()
    from rich.console import Console

    from qtale_jax.planning import document
    from qtale_jax.planning.plan import plan, subject_of
    from qtale_jax.reporting.results import write_text

    subject = subject_of(config)
    found = plan(config, subject)
    # A log file has room for a row in one line; a terminal knows its own width.
    console = Console(width=None if sys.stdout.isatty() else 150, quiet=quiet)

    def show(lines) -> None:
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))

    show([*document.tables(config, found), *document.sentences(config, found)])
    compiled = _compile(config, found, show)
    target = output(config)
    write_text(target, json.dumps(document.document(config, found, compiled), indent=1) + "\n")
    return target


def _compile(config: Config, found: Any, show: Callable) -> dict[str, Any] | None:
    """What the compiler says of the steps that were planned, or None and a line about why there is nothing."""
    from qtale_jax.planning.compiled_tables import compared_table, compiled_table

    subject = found.subject
    if reason := _not_compiled(config, subject.topology):
        show([f"these numbers are estimates from shapes; {reason}"])
        return None
    from qtale_jax.planning.comparison import compared
    from qtale_jax.planning.compiled import compile_steps
    from qtale_jax.planning.proposal import usable_bytes

    compiled = compile_steps(config, subject, found.smallest, lambda line: print(line, file=sys.stderr, flush=True))
    compiled = compared(found, compiled, usable_bytes(config, subject.topology))
    show([compiled_table(compiled, subject.topology), compared_table(compiled)])
    return compiled


def _not_compiled(config: Config, topology: Any) -> str | None:
    if not config.plan.compile:
        return "plan.compile names the steps that are also compiled"
    if not topology.device.is_tpu:
        return "programs are compiled for TPU topologies only"
    if importlib.util.find_spec("libtpu") is None:
        return 'with the extra aot (pip install -e ".[aot]") the programs are also compiled, and the compiler counts'
    return None


def _without_accelerators() -> None:
    """Planning runs on the CPU, also where there are accelerators; JAX reads this when it is imported."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def output(config: Config) -> Path:
    """The JSON file that is written."""
    return Path(config.plan.output or Path(config.output) / "plan.json")


def dry_run(config: Config) -> None:
    """Prints what would be planned for."""
    _without_accelerators()
    from qtale_jax.models.describe import describe
    from qtale_jax.parallel.axes import AXES
    from qtale_jax.planning.plan import subject_of
    from qtale_jax.reporting.dry_run import print_dry_run

    subject = subject_of(config)
    facts = {"model": f"{subject.name}, {subject.parameters:,} parameters", **describe(subject.spec)}
    facts["inference"] = describe(subject.deployed)["weights"]
    facts["topology"] = f"{subject.topology.name}, {subject.topology.count} × {subject.topology.device.name}"
    facts["mesh"] = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, subject.sizes, strict=True))
    print_dry_run("plan", facts, [output(config)])


def main(argv: Sequence[str] | None = None) -> None:
    """Plans as configured and prints where the numbers are."""
    print(run_stage(parse("plan", STAGES["plan"], argv, dry_run)))


if __name__ == "__main__":
    run(main)
