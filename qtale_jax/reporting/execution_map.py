"""Layer-by-token maps of real examples, as SVG: which layers ran for which word, and how sure the router was."""

from html import escape

from qtale_jax.reporting.labels import INK, MUTED, RULE, SERIES
from qtale_jax.reporting.results import ExecutionMap

CELL, GAP, FONT = 20, 2, 11
LONGEST_WORD = 12
SHORT_WORD = 2
MOST_TOKENS = 48


def _word(token: str) -> str:
    """A token as it can be read: white space made visible, long words cut."""
    shown = "".join({"\n": "⏎", "\t": "⇥", " ": "␣"}.get(character, character) for character in token)
    shown = "".join(character if character.isprintable() else "�" for character in shown) or "∅"
    return shown if len(shown) <= LONGEST_WORD else shown[: LONGEST_WORD - 1] + "…"


def _cell(example: ExecutionMap, token: int, layer: int, name: str, series: int) -> str:
    """One square: hatched without a router, shaded by p(execute) where it ran, an outline where it was skipped."""
    layers = len(example.execute[0])
    x, y = token * CELL, (layers - 1 - layer) * CELL
    place = f'x="{x}" y="{y}" width="{CELL - GAP}" height="{CELL - GAP}" rx="2"'
    where = f"layer {layer}, “{example.tokens[token]}”"
    if layer < example.always_on_layers:
        return f'<rect {place} fill="url(#{name}-hatch)"><title>{escape(where)}: always on, no router</title></rect>'
    probability = example.probability[token][layer - example.always_on_layers]
    ran = example.execute[token][layer]
    title = f"<title>{escape(where)}: {'executed' if ran else 'skipped'}, p(execute) = {probability:.3f}</title>"
    if not ran:
        return f'<rect {place} style="fill: transparent; stroke: var(--rule, {RULE})">{title}</rect>'
    colour = f"var(--series-{series}, {SERIES[series][0]})"
    return f'<rect {place} style="fill: {colour}; fill-opacity: {0.2 + 0.8 * probability:.2f}">{title}</rect>'


def execution_map(example: ExecutionMap, name: str, series: int) -> str:
    """The map of one example as one SVG: x words, y layers with layer 0 at the bottom, hover titles with p(execute).

    Args:
        example: at most its first `MOST_TOKENS` tokens are drawn.
        name: prefix of the ids inside, unique on a page.
        series: index of the model's colour in `SERIES`.
    """
    tokens, layers = min(len(example.tokens), MOST_TOKENS), len(example.execute[0])
    words = [_word(token) for token in example.tokens[:tokens]]
    longest = max(map(len, words))
    below = FONT * 0.62 * longest + 10 if longest > SHORT_WORD else FONT + 8
    left, top = 34, 4
    width, height = tokens * CELL, layers * CELL
    colour, muted = f"var(--series-{series}, {SERIES[series][0]})", f"fill: var(--muted, {MUTED})"
    cells = "".join(_cell(example, token, layer, name, series) for token in range(tokens) for layer in range(layers))
    labels = []
    for token, word in enumerate(words):
        upright = len(word) <= SHORT_WORD
        x, y = token * CELL + (CELL - GAP) / 2, height + (FONT + 1 if upright else 4)
        # Longer words stand on their end below the column, so that they never run into the next one.
        turn = (
            ' text-anchor="middle"'
            if upright
            else f' transform="rotate(-90 {x} {y})" text-anchor="end" dominant-baseline="central"'
        )
        labels.append(f'<text x="{x}" y="{y}"{turn} style="fill: var(--ink, {INK})">{escape(word)}</text>')
    step = 1 if layers <= 16 else 4
    for layer in range(0, layers, step):
        y = (layers - 1 - layer) * CELL + (CELL - GAP) / 2
        labels.append(
            f'<text x="-6" y="{y}" text-anchor="end" dominant-baseline="central" style="{muted}">{layer}</text>'
        )
    middle = height / 2
    turn = f'text-anchor="middle" transform="rotate(-90 -25 {middle})"'
    labels.append(f'<text x="-25" y="{middle}" {turn} style="{muted}">layer</text>')
    box = f"{-left} {-top} {left + width + 2} {top + height + below:.0f}"
    spoken = f"{tokens} tokens by {layers} layers, {100 * example.executed_ratio:.0f} percent executed"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{left + width + 2}" '
        f'height="{top + height + below:.0f}" role="img" aria-label="{escape(spoken)}" font-size="{FONT}">'
        f'<defs><pattern id="{name}-hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)">'
        f'<rect width="5" height="5" style="fill: {colour}; fill-opacity: 0.12"/>'
        f'<rect width="1.6" height="5" style="fill: {colour}; fill-opacity: 0.75"/></pattern></defs>'
        f"{cells}{''.join(labels)}</svg>"
    )
