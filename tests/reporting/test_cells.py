"""How tables are written in Markdown and for the terminal."""

import dataclasses

import pytest
from rich.console import Console

from qtale_jax.reporting.aggregate import summarize
from qtale_jax.reporting.cells import Cell, assemble, to_markdown, to_rich
from qtale_jax.reporting.labels import ACCURACY
from qtale_jax.reporting.results import read_evaluations
from qtale_jax.reporting.tables import quality_table


@pytest.fixture(scope="module")
def summaries(experiment):
    return summarize(read_evaluations(experiment / "evaluation"))


def test_sections_are_set_apart():
    table = assemble("t", ("a",), [[[Cell("1")], [Cell("2")]], [[Cell("3")]]], 1, "")
    assert [row[0].text for row in table.rows] == ["1", "2", "3"] and table.breaks == {2}


def test_markdown_has_every_cell_and_no_stray_bars(summaries):
    table = quality_table(summaries, ACCURACY)
    text = to_markdown(table)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(table.rows) + 2
    assert {line.count(" | ") for line in lines} == {len(table.headers) - 1}
    assert all(str(cell) in text for row in table.rows for cell in row)
    hostile = dataclasses.replace(table, rows=((Cell("a|b<c>\n*"), *table.rows[0][1:]),))
    assert "a\\|b\\<c\\> \\*" in to_markdown(hostile)


def test_the_terminal_table_fits_eighty_columns(summaries):
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(to_rich(quality_table(summaries, ACCURACY)))
    text = capture.get()
    summary = next(s for s in summaries if (s.model, s.format.bits, s.point) == ("dllm", 2, "ratio 0.70"))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    accuracy = summary.accuracy["mean"]
    assert f"{100 * accuracy.mean:.1f}±{100 * accuracy.error:.1f} @.70" in text
