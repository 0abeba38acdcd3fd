"""The sections of an experiment."""

from collections.abc import Iterable

from pydantic import Field, model_validator

from qtale_jax.config.quantization import QuantizeConfig
from qtale_jax.config.section import Fraction, Many, Section, Seed


class PointsConfig(Section):
    """Where one method is evaluated, besides its trained threshold."""

    ratios: Many[Fraction] = Field(default=(), description="executed shares")
    thresholds: Many[Fraction] = Field(default=(), description="thetas")

    @model_validator(mode="after")
    def _check(self):
        check_labels(self.ratios, self.thresholds)
        return self


def shown(value: float) -> str:
    """A ratio or theta as results say it."""
    return f"{value:.2f}"


def check_labels(ratios: Iterable[float], thresholds: Iterable[float]) -> None:
    """Results say at what ratio or theta they are, to two digits.

    Raises:
        ValueError: two of either would stand under one label.
    """
    for name, values in (("ratios", ratios), ("thresholds", thresholds)):
        seen: dict[str, float] = {}
        for value in values:
            label = shown(value)
            if label in seen:
                raise ValueError(
                    f"{name} {seen[label]:g} and {value:g} are both shown as {label}; allowed: one of them"
                )
            seen[label] = value


class ExperimentConfig(Section):
    """A grid of stages: base, fine-tunes, quantizers, seeds."""

    seeds: Many[Seed] = Field(default=(0,), description="one fine-tune per seed")
    workers: int = Field(
        default=1,
        ge=0,
        description="processes side by side, each with an equal share of the cores; 0: all stages in this process",
    )
    base: dict | None = Field(
        default=None, description="overrides for training the base from nothing; none: model.path is the base"
    )
    methods: dict[str, dict] = Field(
        default={"dense": {}, "dllm": {}, "qtale": {}},
        description="name -> overrides; a routing method's name sets it; 'dense' without overrides is the base",
    )
    quantizers: Many[QuantizeConfig] = Field(
        default=(QuantizeConfig(method="none", bits=16),), description="grid of quantizers"
    )
    ratios: Many[Fraction] = Field(
        default=(), description="executed shares at which every routed model is also evaluated"
    )
    thresholds: Many[Fraction] = Field(
        default=(), description="thetas, other than the trained one, at which every routed model is also evaluated"
    )
    points: dict[str, PointsConfig] = Field(
        default={}, description="method -> ratios and thresholds that it is evaluated at instead of the grid's"
    )
    held_out_tasks: Many[str] = Field(
        default=(), description="tasks that every model is asked once more, after everything else has been measured"
    )
    title: str = Field(default="QTALE-JAX", description="heading of the report")

    @model_validator(mode="after")
    def _check(self):
        for name, values in (("seeds", self.seeds), ("methods", self.methods), ("quantizers", self.quantizers)):
            if not values:
                raise ValueError(f"{name} is empty; allowed: one entry or more")
        for name, values in (("seeds", self.seeds), ("quantizers", self.quantizers)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has an entry twice; allowed: different entries")
        if unknown := sorted(self.points.keys() - self.methods.keys()):
            raise ValueError(f"points names {unknown[0]!r}, which is not one of methods: {', '.join(self.methods)}")
        if any(quantizer.model or quantizer.output for quantizer in self.quantizers):
            raise ValueError("quantizers name model or output, which the experiment sets; allowed: the other keys")
        check_labels(self.ratios, self.thresholds)
        self._check_quantizers()
        return self

    def _check_quantizers(self) -> None:
        """Results name a quantizer by its method, bits, group size and what activations have."""
        seen: dict[tuple, int] = {}
        for index, quantizer in enumerate(self.quantizers):
            label = (quantizer.method, quantizer.bits, quantizer.group_size, quantizer.activation_bits)
            if label in seen:
                raise ValueError(
                    f"quantizers.{seen[label]} and quantizers.{index} are both shown as {quantizer.method} at "
                    f"{quantizer.bits} bits, group size {quantizer.group_size}; "
                    "allowed: another method, width or group size, or experiments with outputs of their own"
                )
            seen[label] = index
