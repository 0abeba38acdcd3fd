"""What things are called and how they look, the same in every table and plot."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qtale_jax.reporting.aggregate import (
    ROUTINGS,
    Estimate,
    Format,
    Summary,
    formats,
    runs_all_layers,
    swept,
    threshold_of,
)
from qtale_jax.reporting.results import ResultRow

# Okabe and Ito's palette, which keeps apart under the common colour deficiencies, darkened for white paper; the second
# value is the same hue lightened for dark paper. The last is for all models beyond those that eyes can tell apart.
SERIES = (
    ("#59636f", "#aab4c0"),
    ("#c8500a", "#f58f4f"),
    ("#0a6eb4", "#5ab4f0"),
    ("#00805c", "#3ccba0"),
    ("#a84a86", "#e39bc8"),
    ("#8a6d00", "#e6c04a"),
    ("#2f9dc0", "#93dcf2"),
    ("#6d3526", "#d2a38e"),
    ("#b4bbc4", "#56606c"),
)
OTHERS = len(SERIES) - 1
MARKERS = ("D", "s", "o", "^", "v", "P", "X", "<")
INK, MUTED, RULE, PAPER = "#20262e", "#5f6873", "#dfe3e8", "#fdfdfc"
DARK = {"ink": "#e6e9ed", "muted": "#9aa4b0", "rule": "#343b44", "paper": "#14171b"}

_NAMES = {"base": "Dense", "dense": "Dense", "dllm": "D-LLM", "qtale": "QTALE", "mod": "MoD", "random": "Random"}


@dataclass(frozen=True)
class Look:
    """Colour (index into `SERIES`) and marker of one model. Models with the colour `OTHERS` are drawn thin."""

    label: str
    index: int
    marker: str

    @property
    def colour(self) -> str:
        """The colour on light paper."""
        return SERIES[self.index][0]


@dataclass(frozen=True)
class Metric:
    """A measure of quality, of all seeds (`value`) or of one (`measure`), and how its numbers are written."""

    name: str
    axis: str
    scale: float
    decimals: int
    higher_is_better: bool
    value: Callable[[Summary], Estimate | None]
    measure: Callable[[ResultRow], float | None]

    def of(self, summary: Summary) -> Estimate:
        """The value of a summary that has one.

        Raises:
            KeyError: it has none.
        """
        found = self.value(summary)
        if found is None:
            raise KeyError(self.name)
        return found

    def text(self, found: Estimate) -> str:
        """`mean ± error`, in the unit of `axis`."""
        number = f"{self.scale * found.mean:.{self.decimals}f}"
        return number if found.error is None else f"{number} ± {self.scale * found.error:.{self.decimals}f}"


ACCURACY = Metric(
    "accuracy",
    "accuracy, %",
    100.0,
    1,
    True,
    lambda summary: summary.accuracy.get("mean"),
    lambda row: row.accuracy["mean"] if row.accuracy else None,
)
NATS = Metric(
    "nats per token",
    "nats per token",
    1.0,
    4,
    False,
    lambda summary: summary.nats_per_token,
    lambda row: row.nats_per_token,
)


def metrics(summaries: Sequence[Summary]) -> list[Metric]:
    """The measures that occur, the main one first."""
    return [metric for metric in (ACCURACY, NATS) if any(metric.value(summary) for summary in summaries)]


def model_label(model: str) -> str:
    """`D-LLM` for `dllm` and so on; other names as they are."""
    return _NAMES.get(model, model)


def _by_importance(summaries: Iterable[Summary]) -> list[tuple[int, str]]:
    """Routing and model: the first model of every routing, then the second of every routing, and so on; sweeps last.

    So the colours do not run out on the variants of one routing.
    """
    names: dict[int, set[str]] = {}
    for summary in summaries:
        names.setdefault(ROUTINGS.index(summary.routing), set()).add(summary.model)
    ranked = []
    for routing, models in names.items():
        first = sorted(models, key=lambda model: (model != ROUTINGS[routing], swept(model) is not None, model))
        ranked += [(rank > 0 and swept(model) is not None, rank, routing, model) for rank, model in enumerate(first)]
    return [(routing, model) for _, _, routing, model in sorted(ranked)]


def looks(summaries: Iterable[Summary]) -> dict[str, Look]:
    """A look for every model: the first of each routing gets that routing's colour, further ones the free colours.

    Beyond eight models the colour is that of `OTHERS`, and only the marker tells them apart.
    """
    models = _by_importance(summaries)
    used = {routing for routing, _ in models}
    own = {routing: model for routing, model in reversed(models)}
    free = iter([*range(len(ROUTINGS), OTHERS), *sorted(set(range(len(ROUTINGS))) - used)])
    found: dict[str, Look] = {}
    for number, (routing, model) in enumerate(models):
        index = routing if own[routing] == model else next(free, OTHERS)
        marker = MARKERS[index if index != OTHERS else number % len(MARKERS)]
        found[model] = Look(model_label(model), index, marker)
    order = sorted(models, key=lambda each: (each[0], each[1] != ROUTINGS[each[0]], each[1]))
    return {model: found[model] for _, model in order}


def format_label(found: Format, all_formats: Sequence[Format] | None = None) -> str:
    """`fp`, `4-bit`; with quantizer and group where two formats of `all_formats` share their bits."""
    if found.quantizer == "none":
        return "fp"
    label = f"{found.bits}-bit"
    same = [other for other in all_formats or () if other.bits == found.bits and other.quantizer != "none"]
    if len({other.quantizer for other in same}) > 1:
        label += f" {found.quantizer}"
    if len({other.group_size for other in same}) > 1:
        grouped = found.group_size is not None and found.group_size > 0
        label += f" g{found.group_size}" if grouped else " per channel"
    return label


def format_labels(summaries: Sequence[Summary]) -> dict[Format, str]:
    """Labels of all formats that occur, full precision first."""
    found = formats(summaries)
    return {each: format_label(each, found) for each in found}


def point_label(point: str) -> str:
    """`θ = 0.5` for `threshold .5`, `ratio 0.50` as it is, `all layers` for none."""
    if not point:
        return "all layers"
    threshold = threshold_of(point)
    return point if threshold is None else f"θ = {threshold:g}"


def place_label(summary: Summary) -> str:
    """The label of its point; `fixed layers` for a model that lost layers and routes nothing."""
    dropped = summary.routing == "dense" and not runs_all_layers(summary)
    return "fixed layers" if dropped else point_label(summary.point)


def byte_unit(largest: float) -> tuple[float, str]:
    """The decimal unit that suits `largest` bytes: (bytes per unit, name)."""
    for size, name in ((1e9, "GB"), (1e6, "MB")):
        if largest >= size:
            return size, name
    return 1e3, "kB"


def count_text(value: float) -> str:
    """Three significant digits with k, M, G or T."""
    for size, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"
