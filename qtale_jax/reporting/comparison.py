"""Evaluations of one experiment, or of several side by side, as a notebook compares them."""

from dataclasses import dataclass
from pathlib import Path

from qtale_jax.reporting.aggregate import Summary, summarize
from qtale_jax.reporting.cells import Table, to_markdown
from qtale_jax.reporting.results import Evaluation, ResultRow, read_evaluations
from qtale_jax.reporting.tables import quality_tables


@dataclass(frozen=True, repr=False)
class Results:
    """What was measured; shown as the quality table of the report."""

    evaluations: tuple[Evaluation, ...]

    @property
    def rows(self) -> list[ResultRow]:
        """One row per model, quantizer, threshold and seed, as in `results.json`."""
        return [evaluation.row for evaluation in self.evaluations]

    @property
    def summaries(self) -> list[Summary]:
        """Means and standard errors over seeds."""
        return summarize(self.evaluations)

    @property
    def tables(self) -> list[Table]:
        """Quality at executed ratio, for every measure."""
        return quality_tables(self.summaries)

    def __repr__(self) -> str:
        return "\n".join(map(to_markdown, self.tables))

    def _repr_html_(self) -> str:
        from qtale_jax.reporting.notebook import tables_html

        return tables_html(self.tables)


def results(*outputs: str | Path) -> Results:
    """Reads the evaluations of experiments, which `experiment` and `evaluate` leave in `OUTPUT/evaluation`.

    Args:
        outputs: folders of experiments; with more than one, models are called `FOLDER/MODEL`.

    Raises:
        InputError: no evaluation there, or a malformed one.
    """
    found: list[Evaluation] = []
    for output in map(Path, outputs):
        for evaluation in read_evaluations(output / "evaluation"):
            if len(outputs) > 1:
                row = evaluation.row.model_copy(update={"model": f"{output.name}/{evaluation.row.model}"})
                evaluation = evaluation.model_copy(update={"row": row})
            found.append(evaluation)
    return Results(tuple(found))
