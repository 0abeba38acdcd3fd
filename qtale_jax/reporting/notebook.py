"""What notebooks show of models, routes and results: HTML that takes its text colour from the notebook's theme."""

import zlib
from collections.abc import Mapping, Sequence
from html import escape

from qtale_jax.reporting.cells import Table
from qtale_jax.reporting.execution_map import MOST_TOKENS, execution_map
from qtale_jax.reporting.html_table import table_html
from qtale_jax.reporting.results import ExecutionMap

# `currentColor` is the theme's own ink; the one hue is half-way between those of the report's light and dark paper, and
# stands out from both.
_THEME = (
    "--ink:currentColor;--muted:color-mix(in srgb,currentColor 68%,transparent);"
    "--rule:color-mix(in srgb,currentColor 28%,transparent);--series-2:#328fd2"
)

_STYLE = f"""<style>
.qtale-jax{{{_THEME};line-height:1.4;font-size:.93em;max-width:100%}}
.qtale-jax .title{{font-weight:600;margin:.2em 0 .5em}}
.qtale-jax .note{{color:var(--muted);font-size:.9em;max-width:80ch;margin:.5em 0 1.2em}}
.qtale-jax .scroll{{overflow-x:auto}}
.qtale-jax svg{{display:block}}
.qtale-jax svg rect:hover{{stroke:currentColor;stroke-width:1.5}}
.qtale-jax table{{border-collapse:collapse;border:0;margin:0;font-variant-numeric:tabular-nums;color:inherit}}
.qtale-jax th,.qtale-jax td{{text-align:left;vertical-align:baseline;padding:.2em 1.2em .2em 0;border:0;
  background:none;white-space:nowrap;max-width:none;color:inherit}}
.qtale-jax td.wide{{white-space:normal}}
.qtale-jax th.n,.qtale-jax td.n{{text-align:right;padding:.2em 0 .2em 1.4em}}
.qtale-jax thead th{{font-weight:500;color:var(--muted);border-bottom:1px solid var(--muted)}}
.qtale-jax tbody th{{font-weight:600}}
.qtale-jax .facts th{{font-weight:400;color:var(--muted)}}
.qtale-jax tbody tr.break>*{{border-top:1px solid var(--rule)}}
.qtale-jax td small{{color:var(--muted);font-size:.88em}}
.qtale-jax .same{{color:transparent}}
</style>"""

_SERIES = 2


def _framed(body: str) -> str:
    return f'<div class="qtale-jax">{_STYLE}{body}</div>'


def facts_html(title: str, facts: Mapping[str, str]) -> str:
    """A title and one line per fact."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="wide">{escape(text)}</td></tr>'
        for name, text in facts.items()
    )
    return _framed(f'<div class="title">{escape(title)}</div><table class="facts"><tbody>{rows}</tbody></table>')


def routing_html(example: ExecutionMap) -> str:
    """The layer-by-token map of one text; a square tells on hover what the layer did and p(execute)."""
    tokens, layers = len(example.tokens), len(example.execute[0])
    # Ids have to differ between the outputs of one notebook, and a repeated output may repeat them.
    name = f"routing-{zlib.crc32(example.model_dump_json().encode()):08x}"
    cut = f" The first {MOST_TOKENS} tokens are drawn." if tokens > MOST_TOKENS else ""
    note = (
        f"A column is a token, a row a layer, layer 0 at the bottom. Filled: executed, the stronger the surer the "
        f"router; empty: skipped; hatched: always on, no router. Point at a square for its probability.{cut}"
    )
    title = f"{100 * example.executed_ratio:.1f} % of {tokens} tokens × {layers} layers executed"
    return _framed(
        f'<div class="title">{title}</div><div class="scroll">{execution_map(example, name, _SERIES)}</div>'
        f'<div class="note">{note}</div>'
    )


def tables_html(tables: Sequence[Table]) -> str:
    """Tables of results, each under its title."""
    return _framed("".join(f'<div class="title">{escape(table.title)}</div>{table_html(table)}' for table in tables))
