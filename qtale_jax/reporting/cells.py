"""A table as data: names, numbers and a note, and how it is written in Markdown and for the terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import rich.box
import rich.table
from rich.text import Text


@dataclass(frozen=True)
class Cell:
    """What a cell says, and a detail set smaller behind it."""

    text: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".strip()


ABSENT = Cell("–")


@dataclass(frozen=True)
class Table:
    """Headers and rows of cells. The first `labels` columns are names, the others numbers; `breaks` start a section."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    labels: int
    breaks: frozenset[int]
    note: str


def assemble(
    title: str, headers: Iterable[str], sections: Iterable[Iterable[Sequence[Cell]]], labels: int, note: str
) -> Table:
    """A table of sections, each of them rows, set apart where there are several."""
    rows: list[tuple[Cell, ...]] = []
    breaks = set()
    for section in sections:
        if rows:
            breaks.add(len(rows))
        rows.extend(tuple(row) for row in section)
    return Table(title, tuple(headers), tuple(rows), labels, frozenset(breaks), note)


def _escape(text: str) -> str:
    for character in "\\|*_<>`[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")


def to_markdown(table: Table) -> str:
    """The table in Markdown, under a heading, with its note."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(_escape(str(cell)) for cell in cells) + " |"

    rule = "| " + " | ".join("---" if column < table.labels else "---:" for column in range(len(table.headers))) + " |"
    rows = [line(table.headers), rule, *(line(row) for row in table.rows)]
    return f"## {_escape(table.title)}\n\n" + "\n".join(rows) + f"\n\n{_escape(table.note)}\n"


def _terminal(cell: Cell) -> Text:
    detail = cell.detail.replace("@ 0.", "@.").replace("@ 1.00", "@1")
    return Text.assemble(cell.text.replace(" ± ", "±"), (f" {detail}" if detail else "", "dim"))


def to_rich(table: Table) -> rich.table.Table:
    """The table for the terminal: `98.4±0.3 @.50`, so that four formats fit 80 columns; more break at the ratio."""
    shown = rich.table.Table(
        title=table.title,
        title_justify="left",
        title_style="bold",
        caption=table.note,
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for column, header in enumerate(table.headers):
        shown.add_column(
            header, justify="left" if column < table.labels else "right", no_wrap=column < table.labels, overflow="fold"
        )
    for number, row in enumerate(table.rows):
        if number in table.breaks:
            shown.add_section()
        shown.add_row(*map(_terminal, row))
    return shown
