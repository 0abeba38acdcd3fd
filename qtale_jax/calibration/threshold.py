"""Search for one global theta: to an executed ratio, to the smallest ratio near the best quality, or to a speed.

QTALE lowers theta after quantization with a small grid search. Bisection on the executed ratio of calibration data
lands nearer to the asked ratio with as few passes. Everything is measured on the model as it will run.
"""

from collections.abc import Callable
from dataclasses import dataclass

BISECTIONS = 20
"""Most bisections of the ratio search."""

GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
"""Thetas that the quality search measures; QTALE only ever lowers theta from 0.5."""


@dataclass(frozen=True)
class Found:
    """A threshold, the executed ratio it gives on calibration data, and every (theta, ratio) that was measured.

    A search for a speed also has the predicted seconds of a decode step at each point of the path.
    """

    theta: float
    ratio: float
    path: tuple[tuple[float, float], ...]
    seconds: tuple[float, ...] = ()

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a decode step at `theta`, of a search for a speed."""
        return self.seconds[self.path.index((self.theta, self.ratio))]


class OutOfReach(Exception):
    """No theta that is allowed is fast enough: seconds of a step at the lowest and at the highest one."""

    def __init__(self, slowest: float, fastest: float):
        super().__init__(f"a step takes {slowest:g} to {fastest:g} seconds")
        self.slowest, self.fastest = slowest, fastest


def search_ratio(
    measure: Callable[[float], float], target: float, tolerance: float, highest: float, steps: int = BISECTIONS
) -> Found:
    """Bisects theta in [0, highest] until the executed ratio is within `tolerance` of `target`.

    The ratio falls as theta rises, up to small effects of earlier layers on later ones; the closest theta seen is
    returned, so a ratio out of reach (saturated routers) gives the nearest one that can be had.

    Args:
        measure: executed ratio at a theta.
        target: executed ratio asked for.
        tolerance: accepted distance.
        highest: upper end of the search.
        steps: most bisections.
    """
    path: list[tuple[float, float]] = []

    def at(theta: float) -> float:
        path.append((theta, measure(theta)))
        return path[-1][1]

    low, high = 0.0, highest
    if at(low) > target and at(high) < target:
        for _ in range(steps):
            middle = (low + high) / 2
            ratio = at(middle)
            if abs(ratio - target) <= tolerance:
                break
            low, high = (middle, high) if ratio > target else (low, middle)
    theta, ratio = min(path, key=lambda point: (abs(point[1] - target), point[0]))
    return Found(theta, ratio, tuple(path))


def search_quality(measure: Callable[[float], tuple[float, float]], within: float) -> Found:
    """The smallest executed ratio whose quality is within `within` of the best over `GRID`.

    Args:
        measure: (quality, executed ratio) at a theta; more quality is better.
        within: quality that may be lost.
    """
    points = [(theta, *measure(theta)) for theta in GRID]
    best = max(quality for _, quality, _ in points)
    theta, _, ratio = min((p for p in points if p[1] >= best - within), key=lambda point: (point[2], point[0]))
    return Found(theta, ratio, tuple((t, r) for t, _, r in points))


def search_budget(
    predict: Callable[[float], tuple[float, float]],
    seconds: float,
    tolerance: float,
    highest: float,
    steps: int = BISECTIONS,
) -> Found:
    """The smallest theta in [0, highest] at which a decode step takes at most `seconds`, by bisection.

    What is returned meets the budget; the lower end of the last bracket, which is in the path, misses it.

    Args:
        predict: (seconds of a step, executed ratio) at a theta.
        seconds: longest step that is allowed.
        tolerance: executed ratio that may be lost against the end that misses.
        highest: upper end of the search.
        steps: most bisections.

    Raises:
        OutOfReach: it takes longer at `highest`.
    """
    points: list[tuple[float, float, float]] = []

    def at(theta: float) -> tuple[float, float, float]:
        predicted, ratio = predict(theta)
        points.append((theta, ratio, predicted))
        return points[-1]

    low = found = at(0.0)
    if low[2] > seconds:
        found = at(highest)
        if found[2] > seconds:
            raise OutOfReach(low[2], found[2])
        for _ in range(steps):
            if low[1] - found[1] <= tolerance:
                break
            middle = at((low[0] + found[0]) / 2)
            low, found = (low, middle) if middle[2] <= seconds else (middle, found)
    return Found(found[0], found[1], tuple((t, r) for t, r, _ in points), tuple(s for _, _, s in points))
