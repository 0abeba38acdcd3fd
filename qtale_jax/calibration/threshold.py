"""Search for one global theta: to an executed ratio by bisection, or to the smallest ratio near the best quality.

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
    """A threshold, the executed ratio it gives on calibration data, and every (theta, ratio) that was measured."""

    theta: float
    ratio: float
    path: tuple[tuple[float, float], ...]


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
