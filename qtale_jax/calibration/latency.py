"""Predicting the time of a decode step from a table of measured parts and the shares that layers execute.

A decode step costs what it costs when no token executes a routed layer, and for every routed layer that some rows
execute what the layer takes at the size that these rows are compacted into. How many rows those are is a matter of
chance: each row executes the layer with the layer's share as probability, so their number is binomial. Everything here
is arithmetic; `measuring` fills the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import bdtr


@dataclass(frozen=True)
class LayerSeconds:
    """Routed layers of one make: what one of them adds to a step at each size of `LatencyTable.sizes`, in seconds.

    These are differences of medians as they were measured, so that noise may make one negative.
    """

    layers: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class LatencyTable:
    """What the parts of a decode step take, in seconds.

    Attributes:
        hardware: the device.
        versions: of the packages that were measured.
        model: digest of what the programs depend on: shape, routing, storage formats, type of activations.
        rows: rows that decode together.
        context: tokens that each layer of each row keeps at the start.
        repeats: measurements behind each median.
        sizes: numbers of rows that the engine compacts into, ascending from 0 to `rows`.
        idle: a step in which no row executes a routed layer.
        ends: embedding, head and the choice of the token: part of `idle`.
        router: one router: part of `idle`, once per layer that has one.
        layers: the routed layers.
    """

    hardware: str
    versions: dict[str, str]
    model: str
    rows: int
    context: int
    repeats: int
    sizes: tuple[int, ...]
    idle: float
    ends: float
    router: float
    layers: tuple[LayerSeconds, ...]

    def step_seconds(self, shares: Sequence[float] | Float[np.ndarray, " l"]) -> float:
        """Expected seconds of a decode step; never less when a share is larger.

        Args:
            shares: probability of executing each layer, 0 to 1; those of always-on layers are not looked at.
        """
        probability = size_probabilities(np.asarray(shares, np.float64), self.sizes)
        total = self.idle
        for make in self.layers:
            # A layer for more rows is not faster: what looks so is noise.
            seconds = np.maximum.accumulate(np.maximum(np.asarray(make.seconds), 0.0))
            total += float(np.sum(probability[list(make.layers)] @ seconds))
        return total

    def tokens_per_second(self, seconds: float) -> float:
        """New tokens of all rows per second when a step takes `seconds`."""
        return self.rows / seconds

    def document(self) -> dict[str, Any]:
        """The table as JSON holds it."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "LatencyTable":
        """The table of a `document`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        makes = [
            LayerSeconds(tuple(map(int, make["layers"])), tuple(map(float, make["seconds"])))
            for make in document["layers"]
        ]
        sizes = tuple(map(int, document["sizes"]))
        if any(len(make.seconds) != len(sizes) for make in makes):
            raise ValueError("layers have other sizes than the table")
        return cls(**{**document, "sizes": sizes, "layers": tuple(makes)})


def size_probabilities(shares: Float[np.ndarray, " l"], sizes: Sequence[int]) -> Float[np.ndarray, "l s"]:
    """How often each size is the smallest that holds the rows which execute a layer.

    Args:
        shares: probability that a row executes each layer.
        sizes: ascending from 0; the last one is the number of rows.
    """
    below = bdtr(np.asarray(sizes, np.float64)[None, :], sizes[-1], shares[:, None])
    return np.diff(below, axis=1, prepend=0.0)


def decoding_shares(
    executed: Float[np.ndarray, " l"],
    tokens: float,
    spans: Sequence[tuple[int, int]],
    always_on_tokens: int,
) -> Float[np.ndarray, " l"]:
    """Share of tokens that execute each layer among those that are routed, as new tokens are.

    Args:
        executed: tokens that executed each layer.
        tokens: all of them.
        spans: where they stand in their rows: the position of the first one, and the one after the last.
        always_on_tokens: first tokens of a row, which execute everything.
    """
    initial = sum(max(0, min(end, always_on_tokens) - start) for start, end in spans)
    if tokens <= initial:  # nothing was routed, so nothing is known: the slowest case
        return np.ones(len(executed))
    return np.clip((executed - initial) / (tokens - initial), 0.0, 1.0)
