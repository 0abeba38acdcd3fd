"""What a quantizer needs to know of the inputs of a linear: sums over the tokens that count."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Statistics:
    """Sums over rows x: the Hessian x x^T, |x|, and how many rows there were; float32.

    All rows weigh the same, however they were batched: sums are accumulated, never averaged batch by batch.
    """

    hessian: Float[Array, "i i"]
    magnitude: Float[Array, " i"]
    rows: Float[Array, ""]

    @property
    def mean_magnitude(self) -> Float[Array, " i"]:
        """Mean |x| of every input; 0 without rows."""
        return self.magnitude / jnp.maximum(self.rows, 1.0)

    def scaled(self, scales: Float[Array, " i"]) -> "Statistics":
        """The statistics of x / scales."""
        return Statistics(self.hessian / (scales[:, None] * scales[None, :]), self.magnitude / scales, self.rows)


def no_rows(inputs: int) -> Statistics:
    """The statistics of nothing."""
    return Statistics(
        jnp.zeros((inputs, inputs), jnp.float32), jnp.zeros((inputs,), jnp.float32), jnp.zeros((), jnp.float32)
    )


def accumulate(found: Statistics, x: Float[Array, "b t i"], counted: Bool[Array, "b t"]) -> Statistics:
    """Adds the rows of `x` that count."""
    rows = jnp.where(counted[:, :, None], x.astype(jnp.float32), 0.0).reshape(-1, x.shape[-1])
    return Statistics(
        found.hessian + jnp.matmul(rows.T, rows, precision="highest"),
        found.magnitude + jnp.sum(jnp.abs(rows), axis=0),
        found.rows + jnp.sum(counted.astype(jnp.float32)),
    )
