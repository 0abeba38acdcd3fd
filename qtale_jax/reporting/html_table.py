"""A table as HTML, on the page and in notebooks."""

from html import escape

from qtale_jax.reporting.cells import Table

_NUMBER, _SAME, _BREAK = ' class="n"', ' class="same"', ' class="break"'


def table_html(table: Table) -> str:
    """A table with its note. A name that repeats the one above is kept for screen readers but not shown."""
    heads = "".join(
        f'<th scope="col"{"" if column < table.labels else _NUMBER}>{escape(header)}</th>'
        for column, header in enumerate(table.headers)
    )
    body = []
    for number, row in enumerate(table.rows):
        cells = []
        same = number > 0 and number not in table.breaks
        for column, cell in enumerate(row):
            text = escape(cell.text) + (f" <small>{escape(cell.detail)}</small>" if cell.detail else "")
            if column == 0:
                repeated = same and str(cell) == str(table.rows[number - 1][0])
                cells.append(f'<th scope="row"{_SAME if repeated else ""}>{text}</th>')
            else:
                cells.append(f"<td{'' if column < table.labels else _NUMBER}>{text}</td>")
        body.append(f"<tr{_BREAK if number in table.breaks else ''}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="note">{escape(table.note)}</p>'
    )
