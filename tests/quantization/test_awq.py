import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix.contrib import awq_core

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization import awq
from qtale_jax.quantization.awq import search_clip, search_scales
from qtale_jax.quantization.output_error import output_error
from qtale_jax.quantization.rounding import dequantize, fit_grid, grouped, quantize, quantize_to_grid

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
CASES = [
    *[
        ((96, 40), TensorFormat(bits=bits, group_size=group, symmetric=symmetric))
        for bits, group, symmetric in itertools.product((4, 3, 2), (-1, 32), (False, True))
    ],
    ((172, 64), TensorFormat(bits=4)),
    ((172, 64), TensorFormat(bits=3, group_size=86, symmetric=True)),
    ((172, 64), TensorFormat(bits=2)),
]


def case_name(case) -> str:
    (inputs, outputs), format = case
    return f"{inputs}x{outputs}-{format.bits}bit-g{format.group_size}{'-sym' if format.symmetric else ''}"


REPEATED = (1, 2, 4, 7, 9, 10)
"""Of the first twelve, those whose bits, groups and signs others have as well."""


@pytest.fixture(
    params=[
        pytest.param(case, marks=pytest.mark.exhaustive if index in REPEATED else ())
        for index, case in enumerate(CASES)
    ],
    ids=case_name,
)
def case(request):
    return request.param


def correlated(seed: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose spectrum decays, with three channels that fire strongly, and heavy-tailed weights."""
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.normal(size=(inputs, inputs)))
    x = rng.normal(size=(512, inputs)) * np.arange(1, inputs + 1) ** -0.7 @ directions
    x[:, rng.choice(inputs, 3, replace=False)] *= 8
    return x.astype(np.float32), (0.02 * rng.standard_t(4, size=(inputs, outputs))).astype(np.float32)


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.T @ x, np.mean(np.abs(x), axis=0)


def rounded(kernel: np.ndarray, format: TensorFormat, shrink=None) -> np.ndarray:
    """Rounded to nearest in float64, with shrunk ranges (groups, outputs); shares nothing with the library."""
    size = kernel.shape[0] if format.group_size == -1 else format.group_size
    parts = kernel.astype(np.float64).reshape(-1, size, kernel.shape[1])
    shrink = (np.ones((parts.shape[0], parts.shape[2])) if shrink is None else shrink)[:, None]
    if format.symmetric:
        high = 2 ** (format.bits - 1) - 1
        step = shrink * np.abs(parts).max(axis=1, keepdims=True) / high
        return (np.clip(np.rint(parts / step), -high, high) * step).reshape(kernel.shape)
    bottom = shrink * np.minimum(parts.min(axis=1, keepdims=True), 0)
    top = shrink * np.maximum(parts.max(axis=1, keepdims=True), 0)
    step = (top - bottom) / (2**format.bits - 1)
    zero = np.rint(-bottom / step)
    return ((np.clip(np.rint(parts / step) + zero, 0, 2**format.bits - 1) - zero) * step).reshape(kernel.shape)


def scaled_error(x, kernels, formats, scales) -> float:
    """The relative error of all outputs, from the rows themselves."""
    scales, x = np.asarray(scales, np.float64)[:, None], x.astype(np.float64)
    pairs = [
        (kernel, rounded(kernel * scales, format) / scales) for kernel, format in zip(kernels, formats, strict=True)
    ]
    lost = sum(np.sum(np.square(x @ (kernel - restored))) for kernel, restored in pairs)
    return float(np.sqrt(lost / sum(np.sum(np.square(x @ kernel)) for kernel in kernels)))


def scales_at(x: np.ndarray, ratio: float) -> np.ndarray:
    scales = np.mean(np.abs(x.astype(np.float64)), axis=0) ** ratio
    return scales / np.sqrt(scales.max() * scales.min())


def test_scales_agree_with_a_search_over_the_rows(case):
    shape, format = case
    for seed in SEEDS:
        x, kernel = correlated(seed, *shape)
        found = search_scales([kernel], [format], *statistics(x))
        errors = [scaled_error(x, [kernel], [format], scales_at(x, index / 20)) for index in range(20)]
        assert round(20 * float(found.ratio)) == np.argmin(errors)
        np.testing.assert_allclose(found.error, min(errors), rtol=2e-3)
        np.testing.assert_allclose(found.rtn_error, errors[0], rtol=2e-3)
        np.testing.assert_allclose(found.scales, scales_at(x, float(found.ratio)), rtol=1e-4)


def test_scales_never_lose_and_do_something(case):
    shape, format = case
    for seed in SEEDS:
        x, kernel = correlated(seed, *shape)
        hessian, magnitude = statistics(x)
        found = search_scales([kernel], [format], hessian, magnitude)
        scales = np.asarray(found.scales)[:, None]
        restored = dequantize(quantize(kernel * scales, format)) / scales
        plain = output_error(kernel, dequantize(quantize(kernel, format)), hessian)
        np.testing.assert_allclose(output_error(kernel, restored, hessian), found.error, rtol=1e-4)
        np.testing.assert_allclose(plain, found.rtn_error, rtol=1e-4)
        assert float(found.error) < 0.9 * float(plain)
        assert 0 < float(found.ratio) < 1 and scales.max() > 1.15
        assert np.all(np.diff(scales[np.argsort(magnitude), 0]) >= 0)
        np.testing.assert_allclose(scales.max() * scales.min(), 1, rtol=1e-5)


def test_matrices_that_share_an_input_share_the_scales():
    x, wide = correlated(3, 96, 40)
    kernels = [wide[:, :24], 3 * wide[:, 24:36], wide[:, 36:]]
    formats = [TensorFormat(bits=3), TensorFormat(bits=2, group_size=32), TensorFormat(bits=4, symmetric=True)]
    found = search_scales(kernels, formats, *statistics(x), grid=10)
    errors = [scaled_error(x, kernels, formats, scales_at(x, index / 10)) for index in range(10)]
    assert round(10 * float(found.ratio)) == np.argmin(errors)
    np.testing.assert_allclose(found.error, min(errors), rtol=2e-3)
    np.testing.assert_allclose(found.rtn_error, errors[0], rtol=2e-3)


def test_a_grid_of_one_is_plain_rounding():
    x, kernel = correlated(3, 96, 40)
    found = search_scales([kernel], [TensorFormat(bits=4)], *statistics(x), grid=1)
    assert np.all(np.asarray(found.scales) == 1) and float(found.error) == float(found.rtn_error) > 0


@pytest.mark.parametrize("magnitude", [0.0, 1e-42, 1e-30, 1.0, 1e30])
def test_equal_magnitudes_give_no_scales(magnitude):
    x, kernel = correlated(4, 96, 40)
    found = search_scales([kernel], [TensorFormat(bits=4)], x.T @ x, np.full(96, magnitude, np.float32))
    assert np.all(np.asarray(found.scales) == 1) and float(found.ratio) == 0


@pytest.mark.parametrize("small", [0.0, 1e-44, 1e-38, 1e-20])
def test_inputs_that_hardly_fire_keep_finite_scales(small):
    x, kernel = correlated(5, 96, 40)
    x[:, [0, 7, 95]] = small
    format = TensorFormat(bits=3, group_size=32)
    found = search_scales([kernel], [format], *statistics(x))
    scales = np.asarray(found.scales)
    assert np.all(np.isfinite(scales)) and np.all(scales > 0) and float(found.ratio) > 0
    assert np.isfinite(found.error) and float(found.error) < float(found.rtn_error)
    assert set(np.argsort(scales)[:3]) == {0, 7, 95}


@pytest.mark.parametrize("what", ["hessian", "magnitude"])
def test_what_is_not_finite_gives_no_scales(what):
    x, kernel = correlated(6, 96, 40)
    hessian, magnitude = statistics(x)
    (hessian if what == "hessian" else magnitude)[5] = np.nan
    found = search_scales([kernel], [TensorFormat(bits=4)], hessian, magnitude)
    assert np.all(np.asarray(found.scales) == 1) and float(found.ratio) == 0


@pytest.mark.parametrize("qtype", [jnp.int4, jnp.int8])
@pytest.mark.parametrize("group", [-1, 32])
def test_scales_agree_with_qwix_where_inputs_are_uncorrelated(qtype, group):
    # qwix's loss weighs the error of a weight with the magnitude of its input: that is the Hessian magnitude^2.
    tiles = {} if group == -1 else {1: group}
    how = awq_core.qarray.HowToQuantize(
        qtype=qtype, channelwise_axes=(0,), tiled_axes=tiles, calibration_method="minmax"
    )
    format = TensorFormat(bits=4 if qtype == jnp.int4 else 8, group_size=group)
    for seed in SEEDS:
        x, kernel = correlated(seed, 96, 40)
        magnitude = np.mean(np.abs(x), axis=0)
        found = search_scales([kernel], [format], np.diag(np.square(magnitude)), magnitude, grid=20)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            theirs = awq_core.search_optimal_scales(jnp.asarray(kernel.T), jnp.asarray(magnitude), how, n_grid=21)
        assert 0 < float(found.ratio) < 1  # their grid has the ratio 1 too
        np.testing.assert_allclose(found.scales, theirs[0], rtol=1e-5)


def clip_reference(x, kernel, format, factors) -> tuple[np.ndarray, np.ndarray]:
    """Factors with the least error per group and channel, before and after the check of whole channels."""
    x = x.astype(np.float64)
    size = kernel.shape[0] if format.group_size == -1 else format.group_size
    groups = kernel.shape[0] // size
    rows = x.reshape(len(x), groups, size)

    def errors(factor) -> np.ndarray:
        parts = (rounded(kernel, format, np.full((groups, kernel.shape[1]), factor)) - kernel).reshape(groups, size, -1)
        return np.stack([np.sum(np.square(rows[:, group] @ parts[group]), axis=0) for group in range(groups)])

    best = np.asarray(factors)[np.argmin([errors(factor) for factor in factors], axis=0)]
    whole = [np.sum(np.square(x @ (rounded(kernel, format, shrink) - kernel)), axis=0) for shrink in (best, None)]
    return best, np.where(whole[0] <= whole[1], best, 1.0)


def clip_errors(x, kernel, format, shrink) -> np.ndarray:
    return np.sum(np.square(x.astype(np.float64) @ (rounded(kernel, format, shrink) - kernel)), axis=0)


def test_clip_agrees_with_a_search_over_the_rows(case):
    shape, format = case
    rejected = 0
    for seed in SEEDS:
        x, kernel = correlated(seed, *shape)
        shrink = np.asarray(search_clip(kernel, x.T @ x, format))
        unchecked, expected = clip_reference(x, kernel, format, np.linspace(1, 0.5, 20))
        assert shrink.shape == expected.shape
        assert np.mean(np.abs(shrink - expected) < 1e-6) >= 0.99
        rejected += np.sum(np.any(unchecked != expected, axis=0))
    assert rejected > 0 if format.group_size != -1 else rejected == 0


def test_clip_never_makes_a_channel_worse_and_helps_heavy_tails(case):
    shape, format = case
    for seed in SEEDS:
        x, kernel = correlated(seed, *shape)
        shrink = np.asarray(search_clip(kernel, x.T @ x, format))
        assert np.all(shrink >= 0.5) and np.all(shrink <= 1) and 0.5 < np.mean(shrink) < 0.95
        plain, clipped = (clip_errors(x, kernel, format, factors) for factors in (None, shrink))
        assert np.all(clipped <= (1 + 1e-4) * plain)
        assert np.sum(clipped) < 0.9 * np.sum(plain)


def test_clip_leaves_what_cannot_be_better():
    format = TensorFormat(bits=4, group_size=32)
    grid = np.random.default_rng(0).integers(-8, 8, (96, 40)).astype(np.float32)
    grid[::32], grid[1::32] = -8, 7  # the weights stand on their grid
    x, kernel = correlated(7, 96, 40)
    for weight, hessian in ((grid, x.T @ x), (kernel, np.zeros((96, 96), np.float32)), (0 * kernel, x.T @ x)):
        assert np.all(np.asarray(search_clip(weight, hessian, format)) == 1)
    assert np.all(np.asarray(search_clip(kernel, np.full((96, 96), np.nan, np.float32), format)) == 1)


@pytest.mark.parametrize("grid, smallest", [(1, 0.5), (5, 1.0)])
def test_clip_without_candidates_is_no_clip(grid, smallest):
    x, kernel = correlated(7, 96, 40)
    assert np.all(np.asarray(search_clip(kernel, x.T @ x, TensorFormat(bits=3), grid=grid, smallest=smallest)) == 1)


@pytest.mark.parametrize("bits", [3, 2])
def test_scales_and_clip_together(bits):
    format = TensorFormat(bits=bits, group_size=32)
    for seed in SEEDS:
        x, kernel = correlated(seed, 96, 40)
        hessian, magnitude = statistics(x)
        found = search_scales([kernel], [format], hessian, magnitude)
        scales = np.asarray(found.scales)
        weight = kernel * scales[:, None]
        shrink = search_clip(weight, hessian / np.outer(scales, scales), format)
        grid = fit_grid(grouped(jnp.asarray(weight), format), format, shrink)
        restored = dequantize(quantize_to_grid(jnp.asarray(weight), grid, format)) / scales[:, None]
        assert float(output_error(kernel, restored, hessian)) < 0.95 * float(found.error) < float(found.rtn_error)


@pytest.mark.slow
def test_compute_in_float32_and_compile_once():
    format = TensorFormat(bits=3)
    before = awq._search_scales._cache_size(), search_clip._cache_size()

    def both(seed: int, dtype: jnp.dtype) -> tuple[awq.Scales, jax.Array]:
        x, kernel = correlated(seed, 72, 9)
        hessian, magnitude = (jnp.asarray(one) for one in statistics(x))
        kernel = jnp.asarray(kernel, jnp.bfloat16).astype(dtype)
        shrink = search_clip(kernel, hessian, format, smallest=0.5 + 0.1 * seed)
        return search_scales([kernel], [format], hessian, magnitude), shrink

    narrow = [both(seed, jnp.bfloat16) for seed in SEEDS]
    assert (awq._search_scales._cache_size(), search_clip._cache_size()) == (before[0] + 1, before[1] + 1)
    jax.tree.map(np.testing.assert_array_equal, narrow[1], both(1, jnp.float32))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow))
