import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.calibration.threshold import GRID, search_quality, search_ratio


@given(st.floats(0.33, 0.99), st.floats(0.5, 5.0))
def test_a_falling_ratio_is_hit(target, power):
    found = search_ratio(lambda theta: 0.3 + 0.7 * (1 - theta) ** power, target, 0.005, 0.999)
    assert abs(found.ratio - target) <= 0.005
    assert 0 <= found.theta <= 0.999 and (found.theta, found.ratio) in found.path


def test_no_more_is_measured_than_needed():
    found = search_ratio(lambda theta: 1 - theta, 0.5, 0.01, 1.0)
    assert found.path == ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5)) and found.theta == 0.5


@pytest.mark.parametrize(("target", "theta", "ratio"), [(0.9, 0.0, 0.8), (0.1, 0.999, 0.3)])
def test_out_of_reach_gives_the_nearest(target, theta, ratio):
    found = search_ratio(lambda t: 0.8 if t < 0.6 else 0.3, target, 0.005, 0.999)
    assert (found.theta, found.ratio) == (theta, ratio)


def test_a_step_gives_the_nearer_side():
    found = search_ratio(lambda t: 0.8 if t < 0.6 else 0.3, 0.5, 0.005, 0.999)
    assert found.ratio == 0.3 and found.theta == pytest.approx(0.6, abs=1e-4)
    assert search_ratio(lambda t: 0.8 if t < 0.6 else 0.3, 0.7, 0.005, 0.999).ratio == 0.8


def test_the_smallest_ratio_near_the_best_quality():
    qualities = dict(zip(GRID, (70, 71, 72, 72, 71.8, 71.6, 71.4, 70, 60, 50, 40), strict=True))

    def measure(theta: float) -> tuple[float, float]:
        return qualities[theta], 1 - theta

    assert search_quality(measure, 0.0).theta == 0.15
    assert search_quality(measure, 0.5).theta == 0.25
    assert search_quality(measure, 100.0).theta == GRID[-1] == 0.5
    found = search_quality(measure, 0.5)
    assert found.ratio == 0.75 and found.path == tuple((theta, 1 - theta) for theta in GRID)


def test_equal_ratios_give_the_lower_theta():
    assert search_quality(lambda theta: (1.0, 0.5), 0.0).theta == 0.0
