"""The section of profiles."""

from pydantic import Field, model_validator

from qtale_jax.config.section import Positive, Section


class ProfileConfig(Section):
    """A trace of some training steps, for XProf (TensorBoard) or Perfetto."""

    steps: tuple[Positive, Positive] | None = Field(
        default=None,
        strict=False,
        description="first and last step that is traced, into OUTPUT/profile; none: no trace",
    )

    @model_validator(mode="after")
    def _check(self):
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps has to rise, found [{self.steps[0]}, {self.steps[1]}]")
        return self
