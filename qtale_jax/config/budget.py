"""The section of the speed that theta is calibrated for."""

from pydantic import Field, model_validator

from qtale_jax.config.section import Positive, Section


class BudgetConfig(Section):
    """The decoding speed that `calibrate.objective=budget` finds theta for: one of the first two keys."""

    tokens_per_second: float | None = Field(
        default=None, gt=0, description="new tokens per second at least, of all rows together"
    )
    milliseconds_per_token: float | None = Field(
        default=None, gt=0, description="time from one new token of a row to its next at most"
    )
    batch_size: Positive = Field(default=1, description="rows that decode together")
    prompt_length: Positive = Field(default=128, description="tokens that every layer of a row keeps when it is timed")
    repeats: Positive = Field(default=7, description="times that each part is measured; the medians count")
    remeasure: bool = Field(default=False, description="measure even if there is a table of this device and model")

    @model_validator(mode="after")
    def _check(self):
        if self.tokens_per_second is not None and self.milliseconds_per_token is not None:
            raise ValueError("tokens_per_second and milliseconds_per_token are both given; allowed: one of them")
        return self

    @property
    def asked(self) -> tuple[str, float] | None:
        """The key that is given and its value; None: neither."""
        for name in ("tokens_per_second", "milliseconds_per_token"):
            value = getattr(self, name)
            if value is not None:
                return name, value
        return None

    @property
    def seconds(self) -> float:
        """Longest decode step that meets the budget, seconds."""
        assert self.asked is not None, "checked with the objective"
        name, value = self.asked
        return self.batch_size / value if name == "tokens_per_second" else value / 1000
