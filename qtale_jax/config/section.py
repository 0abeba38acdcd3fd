"""What all sections of the configuration are made of: their base class, and types with limits."""

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _group_size(value: int) -> int:
    if value != -1 and value <= 0:
        raise ValueError(f"found {value}; allowed: a positive number of inputs, or -1 for all of them")
    return value


Item = TypeVar("Item")
Many = Annotated[tuple[Item, ...], Field(strict=False)]  # strict mode would refuse the lists that YAML has
Bits = Literal[2, 3, 4, 8, 16]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
GroupSize = Annotated[int, AfterValidator(_group_size)]


class Section(BaseModel):
    """Base of all sections: immutable; unknown keys, infinities and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)
