"""What quantization did to each matrix and layer, as it is printed and recorded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearReport:
    """What quantization did to one matrix.

    Attributes:
        bits: width of its integers.
        weight_error: ||W - W'|| / ||W||, Frobenius norms.
        output_error: ||X W - X W'|| / ||X W|| over the rows seen; None without statistics.
        rounding_error: the same for plain rounding to nearest, to compare with.
        rows: tokens that its statistics are made of.
        retries: how often GPTQ's damping was raised.
        fallback: why it was rounded to nearest although another quantizer was asked for; None: it was not.
    """

    bits: int
    weight_error: float
    output_error: float | None = None
    rounding_error: float | None = None
    rows: int = 0
    retries: int = 0
    fallback: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one layer.

    Attributes:
        layer: its index.
        linears: per matrix, by name.
        bytes_before: of its arrays, before.
        bytes_after: of its arrays, after.
        executed: tokens that executed it, of the calibration rows; 0 without statistics.
        filled: tokens that skip it and were counted all the same, to reach the least number of rows.
    """

    layer: int
    linears: dict[str, LinearReport]
    bytes_before: int
    bytes_after: int
    executed: int = 0
    filled: int = 0

    @property
    def weight_error(self) -> dict[str, float]:
        """Relative weight error of every matrix."""
        return {name: linear.weight_error for name, linear in self.linears.items()}
