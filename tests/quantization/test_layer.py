"""All methods on a routed model with correlated hidden states: what they gain, what they saw, when they give up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.config.schema import MagRConfig, QuantizeConfig, StatisticsConfig
from qtale_jax.models.specification import LINEARS, TensorFormat
from qtale_jax.quantization.layer import restore_layer
from qtale_jax.quantization.matrix import Problem, quantize_matrix
from qtale_jax.quantization.pipeline import quantize_parameters
from qtale_jax.quantization.prefix import Prefix
from qtale_jax.quantization.scaling import PART, READERS
from qtale_jax.quantization.statistics import Statistics
from qtale_jax.quantization.storage import recover

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(make_routed):
    """Two layers, the second routed."""
    return make_routed(num_layers=2, num_kv_heads=4)


@pytest.fixture(scope="module")
def quantize(model, calibration):
    """Quantizes the model by a method at 3 bits; each once."""
    kept = {}

    def run(method: str, batch_size: int = 10, **settings):
        key = (method, batch_size, *settings.items())
        if key not in kept:
            config = config_for(method, batch_size, **settings)
            prefix = prefix_for(model[0], calibration, config) if config.sees_activations else None
            kept[key] = quantize_parameters(*model, config, prefix=prefix)
        return kept[key]

    return run


def config_for(method: str, batch_size: int = 10, min_rows: int = 0, **settings) -> QuantizeConfig:
    statistics = StatisticsConfig(batch_size=batch_size, min_rows=min_rows)
    # AWQ with zero points, the others without: MagR leaves many weights at exactly +-t, which lie on a grid without
    # zero points and on ties of one with them, where the last bit of the statistics decides.
    return QuantizeConfig(
        method=method, bits=3, group_size=16, symmetric=method != "awq", statistics=statistics, **settings
    )


def prefix_for(spec, calibration, config) -> Prefix:
    return Prefix(spec, *calibration, config.statistics, jnp.dtype(jnp.float32))


def integers(spec, params) -> dict[str, np.ndarray]:
    """The integers of every linear."""
    return {
        name: np.asarray(
            recover(
                params["layers"][int(name.split("/")[0])][PART[name.split("/")[1]]][name.split("/")[1]]["quantized"],
                spec.architecture.linear_shape(name.split("/")[1]),
                form,
            ).values
        )
        for name, form in spec.quantization.formats.items()
    }


def ratios(reports) -> list[float]:
    return [one.output_error / one.rounding_error for report in reports for one in report.linears.values()]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mean"), [("awq", 0.8), ("gptq", 0.5), ("magr", 0.97), ("magr+gptq", 0.5)])
def test_outputs_are_closer_than_with_plain_rounding(quantize, calibration, method, mean):
    _, _, reports = quantize(method)
    found = ratios(reports)
    assert max(found) <= 1 + 1e-6 and np.mean(found) < mean
    assert [report.executed for report in reports][0] == (calibration[1] > 0).sum() > reports[1].executed > 30
    for report in reports:
        assert set(report.linears) == set(LINEARS) and report.filled == 0
        for one in report.linears.values():
            assert one.rows == report.executed and one.bits == 3 and one.retries == 0
            assert (one.fallback is None) == (one.output_error < one.rounding_error)
    if method != "magr":  # which alone may lose to plain rounding here and there
        assert not any(one.fallback for report in reports for one in report.linears.values())


@pytest.mark.slow
def test_gptq_is_not_rounding(model, quantize):
    """Larger errors in the weights, smaller ones in the output (GPTQ, arXiv 2210.17323)."""
    spec, params, reports = quantize("gptq")
    rounded_spec, rounded_params, rounded = quantize("rtn")
    mine, theirs = integers(spec, params), integers(rounded_spec, rounded_params)
    assert mine.keys() == theirs.keys() == {f"{layer}/{name}" for layer in range(2) for name in LINEARS}
    for name in mine:
        assert (mine[name] != theirs[name]).mean() > 0.05
    for report, plain in zip(reports, rounded, strict=True):
        for name, one in report.linears.items():
            assert one.weight_error > plain.weight_error[name] and one.output_error < one.rounding_error
            assert plain.linears[name].output_error is None and plain.linears[name].rows == 0


@pytest.mark.slow
def test_linears_see_what_the_quantized_ones_before_them_give(model, quantize, calibration):
    """The reported error is that on the inputs of a layer whose earlier linears are quantized, in float64."""
    (spec, params), (new_spec, new_params, reports) = model, quantize("gptq")
    formats = new_spec.quantization.formats
    done = [restore_layer(spec, index, layer, formats) for index, layer in new_params["layers"].items()]
    partial = {part: dict(tree) for part, tree in params["layers"][1].items()}
    for reader, names in READERS.items():
        prefix = prefix_for(spec, calibration, config_for("gptq"))
        prefix.start(params["embedding"])
        prefix.decide(0, done[0])
        prefix.advance(0, done[0])
        prefix.decide(1, partial)
        hessian = np.asarray(prefix.statistics(1, partial, reader).hessian, np.float64)
        for name in names:
            kernel = np.asarray(params["layers"][1][PART[name]][name]["kernel"], np.float64)
            error = kernel - np.asarray(done[1][PART[name]][name]["kernel"], np.float64)
            size = [np.einsum("io,ij,jo->", d, hessian, d) for d in (error, kernel)]
            assert reports[1].linears[name].output_error == pytest.approx((size[0] / size[1]) ** 0.5, rel=1e-3)
        for name in names:
            partial[PART[name]][name] = done[1][PART[name]][name]


@pytest.mark.slow
def test_magr_may_be_told_to_look_at_the_last_row_only(quantize):
    """As its reference code does; by default it sees all rows."""
    _, everything, _ = quantize("magr")
    spec, last, _ = quantize("magr", magr=MagRConfig(last_sample_only=True))
    mine, theirs = integers(spec, last), integers(spec, everything)
    assert np.mean([(mine[name] != theirs[name]).mean() for name in mine]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", "gptq", "magr+gptq"])
def test_batches_do_not_matter(quantize, method):
    spec, params, _ = quantize(method)
    _, others, _ = quantize(method, batch_size=3)
    mine, theirs = integers(spec, params), integers(spec, others)
    same = sum(int((mine[name] == theirs[name]).sum()) for name in mine)
    assert same >= 0.999 * sum(values.size for values in mine.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_layer_that_no_token_executes_is_rounded_and_says_so(make_routed, calibration, method):
    spec, params = make_routed(num_layers=2, routing={"always_on_tokens": 0, "thresholds": {"16": (1.0,)}})
    found, rounded = (
        quantize_parameters(spec, params, config, prefix=prefix)
        for config in (config_for(method), QuantizeConfig(bits=3, group_size=16, symmetric=method != "awq"))
        for prefix in [prefix_for(spec, calibration, config) if config.sees_activations else None]
    )
    report = found[2][1]
    assert (report.executed, report.filled) == (0, 0)
    for one in report.linears.values():
        assert one.fallback == "no calibration token executes the layer" and one.output_error is None
    jax.tree.map(np.testing.assert_array_equal, found[1]["layers"][1], rounded[1]["layers"][1])
    # With a floor the first tokens stand in, and the method is used.
    config = config_for(method, min_rows=40)
    _, _, filled = quantize_parameters(spec, params, config, prefix=prefix_for(spec, calibration, config))
    assert (filled[1].executed, filled[1].filled) == (0, 40)
    assert all(one.fallback is None and one.rows == 40 for one in filled[1].linears.values())


def test_what_does_worse_than_rounding_is_rounded(rng):
    format = TensorFormat(bits=3)
    kernel = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    rows = rng.normal(size=(50, 16)).astype(np.float32)
    statistics = Statistics(jnp.asarray(rows.T @ rows), jnp.asarray(np.abs(rows).sum(0)), jnp.float32(50))
    problem = Problem("a matrix", kernel, format, statistics)
    plain, _ = quantize_matrix(Problem("a matrix", kernel, format), QuantizeConfig(bits=3))
    # Everything is moved to 0, as far as the data lets it.
    config = QuantizeConfig(method="magr", bits=3, magr=MagRConfig(strength=100.0))
    found, report = quantize_matrix(problem, config)
    assert report.fallback.startswith("its output error would be") and report.output_error == report.rounding_error
    np.testing.assert_array_equal(found.values, plain.values)
    broken = Statistics(statistics.hessian.at[3, 3].set(jnp.inf), statistics.magnitude, statistics.rows)
    found, report = quantize_matrix(Problem("a matrix", kernel, format, broken), config)
    assert report.fallback == "its inputs are not finite" and report.output_error is None and report.rows == 50
    np.testing.assert_array_equal(found.values, plain.values)


def test_methods_that_need_rows_are_not_run_without(model):
    with pytest.raises(ValueError, match="method='awq' needs calibration rows"):
        quantize_parameters(*model, config_for("awq"))
