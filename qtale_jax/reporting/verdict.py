"""The paper's claims against what was measured here: reproduced, not reproduced, or not testable.

A claim about accuracy is reproduced where the whole 95 % interval of the paired difference is on its side; everything
else that was measured counts as not reproduced. One seed has no interval, and models that execute unlike shares are not
compared: neither tests such a claim. Claims are those of QTALE (arXiv 2602.10431).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qtale_jax.reporting.aggregate import Format, Summary, at_reference, formats
from qtale_jax.reporting.cells import Cell, Table, assemble
from qtale_jax.reporting.labels import format_label, metrics
from qtale_jax.reporting.paired import CONFIDENCE, Difference, base_model, difference

Verdict = Literal["reproduced", "not reproduced", "not testable here"]

CLOSE, CLOSE_RATIO, HALF = 0.5, 0.02, 0.6
"""Points that count as a small gap, ratios that count as equal, and the share of FLOPs that counts as about half."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, what became of it here, and the numbers that say so."""

    text: str
    verdict: Verdict
    numbers: str


def _verdict(holds: bool) -> Verdict:
    return "reproduced" if holds else "not reproduced"


@dataclass(frozen=True)
class _Measured:
    """Summaries by model and format at full precision and below, at the trained threshold and at the shared ratio."""

    summaries: Sequence[Summary]

    def trained(self, model: str, format: Format) -> Summary | None:
        return self._find(model, format, lambda summary: summary.point == "threshold 0.50")

    def shared(self, model: str, format: Format) -> Summary | None:
        points = {summary.point for summary in at_reference(self.summaries)}
        return self._find(model, format, lambda summary: summary.point in points)

    def _find(self, model: str, format: Format, wanted: Callable[[Summary], bool]) -> Summary | None:
        found = (s for s in self.summaries if s.model == model and s.format == format)
        return next((s for s in found if s.routing == "dense" or wanted(s)), None)


def claims(summaries: Sequence[Summary]) -> list[Claim]:
    """The claims that the measurements speak to, in the order of the paper; none without `dllm` and `qtale`."""
    if not {"dllm", "qtale"} <= {summary.model for summary in summaries}:
        return []
    full, *low = formats(summaries)
    measured = _Measured(summaries)
    return [
        *_diversity(measured, full),
        *_reach(summaries, full),
        *_fragility(measured, full, low),
        *_accuracy(measured, low),
        *_cost(measured, full),
        Claim("Latency 1.28 times better; 13.5 GB become less than 4.5 GB", "not testable here", "needs a 7B model"),
        Claim("LLaMA2-7B on seven tasks at 3 bits: 72.79, D-LLM 70.57", "not testable here", "needs a 7B model"),
    ]


def _diversity(measured: _Measured, full: Format) -> Iterator[Claim]:
    ours, theirs = measured.trained("qtale", full), measured.trained("dllm", full)
    if not (ours and theirs):
        return
    if ours.logit_gap and theirs.logit_gap and ours.flip_rate and theirs.flip_rate:
        holds = ours.logit_gap.mean < theirs.logit_gap.mean / 2 and ours.flip_rate.mean > 2 * theirs.flip_rate.mean
        yield Claim(
            "D-LLM's routers saturate; the entropy term keeps paths diverse",
            _verdict(holds),
            f"mean logit gap {ours.logit_gap.mean:.2f} against {theirs.logit_gap.mean:.2f}, "
            f"flip rate {ours.flip_rate.mean:.3f} against {theirs.flip_rate.mean:.3f}",
        )
    ratios = ours.executed_ratio.mean, theirs.executed_ratio.mean
    yield Claim(
        "The entropy term leaves the executed ratio as it is",
        _verdict(abs(ratios[0] - ratios[1]) <= CLOSE_RATIO),
        f"{ratios[0]:.3f} against {ratios[1]:.3f} at θ = 0.5",
    )


def threshold_range(summaries: Sequence[Summary], model: str, full: Format) -> tuple[Summary, Summary] | None:
    """A model at the highest and at the lowest fixed theta it was measured at, at full precision."""
    found = [s for s in summaries if s.model == model and s.format == full and s.point.startswith("threshold")]
    ordered = sorted((s for s in found if s.theta), key=lambda s: s.theta.mean if s.theta else 0.0)
    return (ordered[-1], ordered[0]) if len(ordered) > 1 else None


def _reach(summaries: Sequence[Summary], full: Format) -> Iterator[Claim]:
    ours, theirs = (threshold_range(summaries, model, full) for model in ("qtale", "dllm"))
    if ours is None or theirs is None:
        return

    def gained(ends: tuple[Summary, Summary]) -> float:
        return ends[1].executed_ratio.mean - ends[0].executed_ratio.mean

    def text(ends: tuple[Summary, Summary]) -> str:
        return f"{ends[0].executed_ratio.mean:.2f} → {ends[1].executed_ratio.mean:.2f}"

    low = ours[1].theta.mean if ours[1].theta else 0.0
    yield Claim(
        "θ raises the executed ratio after training, where D-LLM's is stuck",
        _verdict(gained(ours) >= 2 * gained(theirs)),
        f"θ 0.5 → {low:g}: QTALE {text(ours)}, D-LLM {text(theirs)}",
    )


def _fragility(measured: _Measured, full: Format, low: Sequence[Format]) -> Iterator[Claim]:
    """Whether rounding costs D-LLM more than the dense model: points lost by each."""
    base, metric = base_model(measured.summaries), metrics(measured.summaries)[0]
    if base is None:
        return
    for format in low:
        pairs = [(measured.trained(model, full), measured.trained(model, format)) for model in ("dllm", base)]
        lost = [
            (metric.of(before).mean - metric.of(after).mean) * (metric.scale if metric.higher_is_better else -1)
            for before, after in pairs
            if before and after
        ]
        if len(lost) == 2:
            yield Claim(
                f"Quantization hurts D-LLM more than the dense model, {format_label(format)}",
                _verdict(lost[0] > lost[1]),
                f"lost: D-LLM {lost[0]:.{metric.decimals}f}, dense {lost[1]:.{metric.decimals}f}",
            )


def _interval(found: Difference, decimals: int) -> str:
    shown = f"{found.mean:+.{decimals}f}"
    if found.low is not None and found.high is not None:
        shown += f" [{found.low:+.{decimals}f}, {found.high:+.{decimals}f}]"
    return f"{shown} at ratio {found.ratio:.2f}"


def _accuracy(measured: _Measured, low: Sequence[Format]) -> Iterator[Claim]:
    base, metric = base_model(measured.summaries), metrics(measured.summaries)[0]
    for format in low:
        ours = measured.shared("qtale", format)
        for other, text, floor in (
            (base, f"Gap to the dense model with the same quantizer under 0.5 points, {format_label(format)}", -CLOSE),
            ("dllm", f"Ahead of D-LLM at equal executed ratio, {format_label(format)}", 0.0),
        ):
            theirs = measured.shared(other, format) if other else None
            found = difference(ours, theirs, metric, base) if ours and theirs else None
            if found is None or ours is None or theirs is None:
                continue
            shown = _interval(found, metric.decimals)
            if other == "dllm" and not found.equal_ratio:
                ratios = f"QTALE at {ours.executed_ratio.mean:.2f}, D-LLM at {theirs.executed_ratio.mean:.2f}"
                yield Claim(text, "not testable here", f"ratios are unlike: {ratios}")
            elif found.low is None:
                yield Claim(text, "not testable here", f"{shown}, one seed")
            else:
                yield Claim(text, _verdict(found.low > floor), shown)


def _cost(measured: _Measured, full: Format) -> Iterator[Claim]:
    base = base_model(measured.summaries)
    ours, dense = measured.trained("qtale", full), measured.trained(base, full) if base else None
    if ours and dense and dense.flops_per_token:
        share = ours.flops_per_token / dense.flops_per_token
        text = f"{share:.2f} of the dense model's, routers and head included, at θ = 0.5"
        yield Claim("About half of the FLOPs", _verdict(share <= HALF), text)


def verdict_table(summaries: Sequence[Summary]) -> Table | None:
    """The claims as a table; None where there is nothing to say."""
    found = claims(summaries)
    if not found:
        return None
    note = (
        f"Brackets: {CONFIDENCE:.0%} interval of the difference per seed. A claim about accuracy is reproduced where "
        "the whole interval is on its side."
    )
    rows = [(Cell(claim.text), Cell(claim.verdict), Cell(claim.numbers)) for claim in found]
    return assemble("The paper's claims", ("claim", "verdict", "measured here"), [rows], 3, note)
