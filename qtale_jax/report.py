"""Entry point: `python -m qtale_jax.report CONFIG` makes tables, plots and a page of OUTPUT's evaluations and logs."""

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config
from qtale_jax.reporting.aggregate import Summary, summarize
from qtale_jax.reporting.environment import command_line, environment
from qtale_jax.reporting.logs import read_training
from qtale_jax.reporting.page import Making, build_page
from qtale_jax.reporting.results import read_evaluations, write_results, write_text
from qtale_jax.reporting.tables import all_tables, quality_tables, to_markdown, to_rich


def _markdown(title: str, summaries: list[Summary], making: Making) -> str:
    about = [f"- {key}: {value}" for key, value in making.environment.items()]
    parts = [
        f"# {title}\n",
        *map(to_markdown, all_tables(summaries)),
        "## How this was made\n",
        f"```\n{making.command}\n```\n",
    ]
    if making.changed.strip():
        parts.append(f"```yaml\n{making.changed.rstrip()}\n```\n")
    return "\n".join([*parts, "\n".join(about), ""])


def _making(config: Config, command: str | None) -> Making:
    changed = config.model_dump(mode="json", exclude_defaults=True)
    return Making(
        command=command or command_line(),
        changed=yaml.safe_dump(changed, sort_keys=False, allow_unicode=True) if changed else "",
        configuration=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        environment=environment(),
    )


def run_stage(config: Config, *, command: str | None = None, console: Console | None = None) -> Path:
    """Writes OUTPUT/results.json, report.md and report.html, prints the main quality table and the paths.

    Args:
        config: `output` is the folder whose `evaluation/` and training logs are read, `experiment.title` the heading.
        command: shown as what made the report; default: the command that runs this process.
        console: where to print; default: standard output.

    Returns:
        The path of the HTML page.

    Raises:
        InputError: there is no evaluation, or a file is malformed; nothing is written then.
    """
    # A log file has room for the table in one line per row; a terminal knows its own width.
    console = console or Console(width=None if sys.stdout.isatty() else 110)
    output = Path(config.output)
    evaluations = read_evaluations(output / "evaluation")
    summaries = summarize(evaluations)
    runs = read_training(output, {evaluation.row.model for evaluation in evaluations})
    title, making = config.experiment.title, _making(config, command)
    results, markdown, page = output / "results.json", output / "report.md", output / "report.html"
    documents = {markdown: _markdown(title, summaries, making), page: build_page(title, summaries, runs, making)}
    write_results(results, [evaluation.row for summary in summaries for evaluation in summary.evaluations])
    for path, text in documents.items():
        write_text(path, text)
    console.print(to_rich(quality_tables(summaries)[0]))
    for path in (results, markdown, page):
        # Paths go out whole on one line, so that they can be copied.
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the report of the experiment that the command line names."""
    run_stage(parse("report", STAGES["report"], argv))


if __name__ == "__main__":
    run(main)
