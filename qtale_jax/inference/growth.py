"""How large the pool of pages is: as large as what is kept, in steps, because every size is a program of its own."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from qtale_jax.inference.pages import PAGE, page_bytes
from qtale_jax.models.specification import Architecture

STEPS = 16
"""Sizes between nothing and what a cache would have that keeps every token: at most 1/16 of that is spare."""

LEAST_STEP = 2**20
"""Bytes of a step at least: below that a program costs more than the memory it saves."""


@dataclass(frozen=True)
class Growth:
    """Sizes of the pool for a batch of a given shape.

    Attributes:
        layers: of the model.
        rows: of the batch.
        slots: most tokens of a row.
        bytes_per_page: memory of a page.
        page: slots of a page.
        least_step: bytes that a size has more than the one before it, at least.
        steps: how many sizes there are at most.
    """

    layers: int
    rows: int
    slots: int
    bytes_per_page: int
    page: int = PAGE
    least_step: int = LEAST_STEP
    steps: int = STEPS

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        rows: int,
        slots: int,
        dtype: jnp.dtype,
        page: int = PAGE,
        least_step: int = LEAST_STEP,
    ) -> "Growth":
        """The sizes for a model whose cache has a type."""
        return cls(architecture.num_layers, rows, slots, page_bytes(architecture, dtype, page), page, least_step)

    @property
    def most(self) -> int:
        """Pages with which every layer and row can keep every token."""
        return self.layers * self.rows * -(-self.slots // self.page)

    def size(self, pages: int, steps: int | None = None) -> int:
        """The smallest size that holds `pages`; with fewer `steps` a coarser one."""
        step = max(-(-self.most // (steps or self.steps)), -(-self.least_step // self.bytes_per_page))
        return min(self.most, max(1, -(-pages // step)) * step)

    def missing(self, counts: Int32[np.ndarray, "l b"], new: Int32[np.ndarray, " b"]) -> int:
        """Pages to add at most to `counts` kept tokens when every layer keeps `new` more of each row."""
        return int(np.sum(-(-(counts + new) // self.page) - -(-counts // self.page)))


def alive(done: Bool[np.ndarray, " b"]) -> Int32[np.ndarray, " b"]:
    """One more token for each row that is not done."""
    return (~done).astype(np.int32)
