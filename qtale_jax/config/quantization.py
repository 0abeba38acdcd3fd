"""The sections of quantization."""

from typing import Literal

from pydantic import Field, model_validator

from qtale_jax.config.section import Bits, GroupSize, Many, Positive, Section


class QuantizationRuleConfig(Section):
    """Another format for some of the linears; where several rules match, the last one counts."""

    match: str = Field(description="pattern over LAYER/LINEAR: 0/*, */down, [0-3]/query")
    bits: Bits | None = Field(default=None, description="bits per weight; 16: left in floating point")
    group_size: GroupSize | None = Field(default=None, description="inputs per scale")
    symmetric: bool | None = Field(default=None, description="no zero point")


class StatisticsConfig(Section):
    """What a quantizer that needs activations sees: rows of the calibration split, run through the quantized prefix."""

    examples: Positive = Field(default=128, description="calibration examples")
    batch_size: Positive = Field(default=8, description="rows that are run at once")
    executed_only: bool = Field(default=True, description="only tokens that execute a layer count in its statistics")
    min_rows: int = Field(
        default=1024, ge=0, description="tokens that every layer sees at least: filled up with tokens that skip it"
    )


class AWQConfig(Section):
    """AWQ: scales from activations, folded into the neighbouring norms and linears, and clipped ranges."""

    grid: Positive = Field(default=20, description="exponents, and clip factors, that are tried")
    clip: bool = Field(default=True, description="search for a smaller range per group")


class GPTQConfig(Section):
    """GPTQ: column by column, the error of a column is made up for by the columns after it."""

    damping: float = Field(default=0.01, gt=0, description="added to the Hessian's diagonal, times its mean")
    attempts: Positive = Field(default=4, description="factorizations tried, each with ten times the damping")
    activation_order: bool = Field(default=True, description="most active inputs first; groups stay where they are")
    clip: bool = Field(default=True, description="search for a smaller range per group first, as AWQ does")


class MagRConfig(Section):
    """MagR: weights are moved to smaller maxima where the calibration data does not see it."""

    strength: float | None = Field(
        default=None, gt=0, description="alpha over the RMS of the weights; default: 0.02 per channel, 0.005 in groups"
    )
    iterations: Positive = Field(default=200, description="proximal gradient steps")
    last_sample_only: bool = Field(
        default=False, description="activations of the last calibration row only, as the reference does"
    )

    def strength_for(self, group_size: int) -> float:
        """Alpha over the RMS of the weights, for one maximum per channel or per group."""
        return self.strength or (0.02 if group_size == -1 else 0.005)


CALIBRATED = ("awq", "gptq", "magr", "magr+gptq")
"""Quantizers that look at activations."""


class QuantizeConfig(Section):
    """Post-training quantization of the seven linears of each layer."""

    model: str | None = Field(default=None, description="model directory to read; default: OUTPUT/trained")
    output: str | None = Field(default=None, description="model directory to write; default: OUTPUT/<method>-<bits>bit")
    method: Literal["none", "rtn", "awq", "gptq", "magr", "magr+gptq"] = Field(
        default="rtn", description="rtn: round to nearest; magr: MagR, then rtn; none: bits must be 16"
    )
    bits: Bits = Field(default=4, description="bits per weight")
    group_size: GroupSize = Field(default=-1, description="inputs per scale; -1: one scale per output channel")
    symmetric: bool = Field(default=False, description="no zero point")
    scale_dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="type of the scales")
    activation_bits: Literal[8, 16] = Field(
        default=16, description="8: activations rounded per token, integer dots (weights of 4 or 8 bits)"
    )
    rules: Many[QuantizationRuleConfig] = Field(default=(), description="other formats for some linears")
    embedding_bits: Literal[8, 16] = Field(default=16, description="bits of the embedding, which may be the head too")
    head_bits: Literal[8, 16] = Field(default=16, description="bits of a head that is not the embedding")
    router_bits: Literal[8, 16] = Field(default=16, description="bits of the routers' wide matrices")
    statistics: StatisticsConfig = Field(default=StatisticsConfig(), description="what the quantizer sees")
    awq: AWQConfig = Field(default=AWQConfig(), description="settings of awq")
    gptq: GPTQConfig = Field(default=GPTQConfig(), description="settings of gptq and magr+gptq")
    magr: MagRConfig = Field(default=MagRConfig(), description="settings of magr and magr+gptq")

    @model_validator(mode="after")
    def _check(self):
        if (self.bits == 16) != (self.method == "none"):
            raise ValueError(
                f"bits={self.bits} does not go with method={self.method!r}: 16 bits if and only if method is 'none'"
            )
        if self.bits == 16:
            others = ("rules", "activation_bits", "embedding_bits", "head_bits", "router_bits")
            if idle := [name for name in others if getattr(self, name) not in ((), 16)]:
                raise ValueError(
                    f"bits=16 leaves the model as it is, {idle[0]} would do nothing; "
                    "allowed: other bits, with rules of 16 for what stays in floating point"
                )
        widths = {self.bits, *(rule.bits for rule in self.rules if rule.bits)} - {16}
        if self.activation_bits == 8 and (narrow := sorted(widths - {4, 8})):
            raise ValueError(
                f"activation_bits=8 does not go with {narrow[0]}-bit weights, which have no integer dot; "
                "allowed: 4 or 8"
            )
        return self

    @property
    def sees_activations(self) -> bool:
        """Whether calibration data is needed."""
        return self.method in CALIBRATED
