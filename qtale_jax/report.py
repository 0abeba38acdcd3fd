"""Entry point: `python -m qtale_jax.report CONFIG` makes tables, plots and a page of OUTPUT's evaluations and logs."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml
from rich.console import Console

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config
from qtale_jax.paths import HELD_OUT
from qtale_jax.reporting.aggregate import Summary, summarize
from qtale_jax.reporting.card import build_card, read_models
from qtale_jax.reporting.cells import to_markdown, to_rich
from qtale_jax.reporting.drawings import Drawings
from qtale_jax.reporting.dry_run import print_dry_run
from qtale_jax.reporting.environment import command_line, environment
from qtale_jax.reporting.figures import all_figures
from qtale_jax.reporting.logs import read_training
from qtale_jax.reporting.page import Making, build_page
from qtale_jax.reporting.paired import all_differences, several_seeds, write_differences
from qtale_jax.reporting.results import evaluation_files, read_evaluations, write_results, write_text
from qtale_jax.reporting.tables import all_tables, held_out_tables, quality_tables

FILES = ("results.json", "report.md", "report.html", "README.md")
FIGURES = "figures"
"""Folder, beside them, with every plot as an SVG."""


def _markdown(title: str, summaries: list[Summary], making: Making, held_out: list[Summary]) -> str:
    about = [f"- {key}: {value}" for key, value in making.environment.items()]
    parts = [
        f"# {title}\n",
        *map(to_markdown, all_tables(summaries)),
        *map(to_markdown, held_out_tables(held_out) if held_out else ()),
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


def run_stage(
    config: Config,
    *,
    command: str | None = None,
    console: Console | None = None,
    measured: Collection[Path] | None = None,
) -> Path:
    """Writes OUTPUT/results.json, report.md, report.html, the model card README.md and figures/*.svg.

    The main table and the paths are printed.

    With several seeds, paired.json holds the paired differences of all models.

    Args:
        config: `output` is the folder whose `evaluation/` and training logs are read, `experiment.title` the heading.
        command: shown as what made the report; default: the command that runs this process.
        console: where to print; default: standard output.
        measured: evaluation files to report; others, of methods, seeds or settings that are asked no more, are left
            out, and their number is said. Default: all.

    Returns:
        The path of the HTML page.

    Raises:
        InputError: there is no evaluation, or a file is malformed; nothing is written then.
    """
    # A log file has room for the table in one line per row; a terminal knows its own width.
    console = console or Console(width=None if sys.stdout.isatty() else 110)
    output = Path(config.output)
    evaluations = read_evaluations(output / "evaluation", measured)
    summaries = summarize(evaluations)
    if left := len(evaluation_files(output / "evaluation")) - len(evaluations):
        console.print(f"{output / 'evaluation'}: {left} files of other methods, seeds or settings are left out")
    runs = read_training(output, {evaluation.row.model for evaluation in evaluations})
    asked = [file for file in evaluation_files(output / HELD_OUT) if measured is None or file in measured]
    held_out = summarize(read_evaluations(output / HELD_OUT, asked)) if asked else []
    title, making = config.experiment.title, _making(config, command)
    results, markdown, page, card = (output / name for name in FILES)
    drawings = Drawings(summaries, runs)
    documents = {
        markdown: _markdown(title, summaries, making, held_out),
        page: build_page(title, summaries, runs, making, held_out, drawings),
        card: build_card(config, summaries, read_models(output), making.command),
    }
    documents |= {output / FIGURES / name: svg for name, svg in all_figures(summaries, drawings).items()}
    write_results(results, [evaluation.row for summary in summaries for evaluation in summary.evaluations])
    paired = output / "paired.json"
    if several_seeds(summaries):
        write_differences(paired, all_differences(summaries))
    else:
        paired.unlink(missing_ok=True)  # one of an earlier report, with other evaluations
    for path, text in documents.items():
        write_text(path, text)
    console.print(to_rich(quality_tables(summaries)[0]))
    for path in filter(Path.exists, (results, paired, markdown, card, output / FIGURES, page)):
        # Paths go out whole on one line, so that they can be copied.
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return page


def dry_run(config: Config) -> None:
    """Prints what the report would be made of, and its files."""
    output = Path(config.output)
    summaries = summarize(read_evaluations(output / "evaluation"))
    evaluations = [evaluation for summary in summaries for evaluation in summary.evaluations]
    runs = read_training(output, {evaluation.row.model for evaluation in evaluations})
    facts = {
        "models": ", ".join(dict.fromkeys(summary.model for summary in summaries)),
        "evaluations": f"{len(evaluations):,} of {len(summaries):,} models at a format and a threshold",
        "training logs": f"{len(runs):,}",
    }
    names = [*FILES, FIGURES, *(["paired.json"] if several_seeds(summaries) else [])]
    print_dry_run("report", facts, [output / name for name in names])


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the report of the experiment that the command line names."""
    run_stage(parse("report", STAGES["report"], argv, dry_run))


if __name__ == "__main__":
    run(main)
