"""The plots of a report, each drawn once, whoever shows it: the page, the card, and files of their own."""

from collections.abc import Sequence
from functools import cached_property

from qtale_jax.reporting import plots
from qtale_jax.reporting.aggregate import Summary
from qtale_jax.reporting.labels import metrics
from qtale_jax.reporting.logs import TrainingRun
from qtale_jax.reporting.panels import Plot


class Drawings:
    """Plots of summaries and training runs, drawn when first asked for; None where there is nothing to draw."""

    def __init__(self, summaries: Sequence[Summary], runs: Sequence[TrainingRun]):
        self._summaries, self._runs = summaries, runs

    @cached_property
    def quality(self) -> list[Plot]:
        """Quality against executed ratio, one plot for each of `metrics`."""
        return [plots.quality_by_ratio(self._summaries, metric) for metric in metrics(self._summaries)]

    @cached_property
    def reach(self) -> Plot | None:
        """How far θ moves the executed ratio."""
        return plots.threshold_reach(self._summaries)

    @cached_property
    def sweep(self) -> Plot | None:
        """One hyper-parameter, several values."""
        return plots.sweep(self._summaries)

    @cached_property
    def gaps(self) -> Plot | None:
        """Histograms of logit gaps."""
        return plots.gap_histograms(self._summaries)

    @cached_property
    def layers(self) -> Plot | None:
        """Share of tokens that run each layer."""
        return plots.layer_shares(self._summaries)

    @cached_property
    def training(self) -> Plot | None:
        """Curves of the training logs."""
        return plots.training_curves(self._runs, self._summaries)
