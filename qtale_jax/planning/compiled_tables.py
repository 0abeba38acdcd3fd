"""What the compiler says, to print."""

from typing import Any

from rich.table import Table

from qtale_jax.planning.devices import Topology
from qtale_jax.reporting.console import table
from qtale_jax.reporting.dry_run import bytes_text


def compiled_table(compiled: dict[str, Any], topology: Topology) -> Table:
    """Memory and collectives of each program."""
    rows = []
    for name, told in compiled.items():
        if "error" in told:
            rows.append((name, "", "", "", told["error"], ""))
            continue
        sizes = told["bytes"]
        sums = [f"{each['count']} {kind}, {bytes_text(each['bytes'])}" for kind, each in told["collectives"].items()]
        parts = (bytes_text(sizes[part]) for part in ("argument", "temp", "generated_code"))
        fits = "fits" if told["fits"] else "does not fit"
        share = f"{bytes_text(sizes['total'])}, {sizes['total'] / topology.device.memory:.1%}, {fits}"
        rows.append((name, *parts, share, "\n".join(sums)))
    columns = ("program", "arguments", "temporary", "code", "all", "collectives")
    return table(f"compiled for {topology.name}, bytes of one device", columns, rows)


def compared_table(compiled: dict[str, Any]) -> Table:
    """What was planned beside what the compiler counts."""
    rows = []
    for name, told in compiled.items():
        if "error" in told:
            continue
        for part in ("arguments", "temporary", "peak"):
            each = told[part]
            difference = "" if each["difference"] is None else f"{each['difference']:+.1%}"
            rows.append((name, part, bytes_text(each["planned"]), bytes_text(each["compiled"]), difference))
    return table("planned and compiled", ("program", "what", "planned", "compiled", "planned is off by"), rows)
