"""Calibration rows behind quantized layers: the hidden states, decisions and inputs of the quantized model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.config.schema import QuantizeConfig, StatisticsConfig
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.decoder import skeleton
from qtale_jax.models.forward import context_of, forward, merge, unembed
from qtale_jax.quantization.layer import restore_layer
from qtale_jax.quantization.pipeline import quantize_parameters
from qtale_jax.quantization.prefix import Counts, Prefix
from qtale_jax.quantization.scaling import READERS

pytestmark = pytest.mark.slow

FLOAT32 = jnp.dtype(jnp.float32)

TWO_KINDS_OF_LAYERS = {
    "sliding_window": 3,
    "global_layers": (2,),
    "local_rope_theta": 50.0,
    "norm_offset": 1.0,
    "post_norms": True,
    "scaled_embedding": True,
    "activation": "gelu_tanh",
    "query_pre_attn_scalar": 3.0,
    "attention_softcap": 1.5,
    "logit_softcap": 3.0,
}
run = jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="module")
def model(make_routed):
    return make_routed(routing={"thresholds": {"16": (0.9, 0.9), "3": (0.5, 0.55)}})


@pytest.fixture(scope="module")
def quantized(model):
    """The model at 3 bits, rounded: specification, stored parameters, restored layers."""
    return quantize(*model)


def quantize(spec, params, **settings):
    new_spec, new_params, _ = quantize_parameters(spec, params, QuantizeConfig(bits=3, group_size=16, **settings))
    formats = new_spec.quantization.formats
    layers = {index: restore_layer(spec, index, layer, formats) for index, layer in new_params["layers"].items()}
    return new_spec, new_params, layers


def started(model, quantized, calibration, batch_size=4, **settings) -> Prefix:
    (spec, _), (new_spec, new_params, _) = model, quantized
    settings = StatisticsConfig(batch_size=batch_size, **{"min_rows": 0} | settings)
    prefix = Prefix(spec, *calibration, settings, FLOAT32, new_spec.thresholds)
    prefix.start(new_params["embedding"], new_spec.quantization.formats.get("embedding"))
    return prefix


def states(prefix: Prefix, calibration) -> np.ndarray:
    return np.concatenate([np.asarray(hidden) for hidden in prefix._hidden])[: len(calibration[0])]


def through(prefix: Prefix, layers: dict) -> list[Counts]:
    """Sends the rows through layers; returns what was counted."""
    counts = []
    for index, layer in layers.items():
        counts.append(prefix.decide(index, layer))
        prefix.advance(index, layer)
    return counts


def reference(quantized, calibration):
    spec, params, _ = quantized
    tokens, segments = map(jnp.asarray, calibration)
    return run(spec.structure, params, tokens, segment_ids=segments, policy=inference_policy(spec))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("routing", "fields"),
    [
        ({}, {}),
        ({"eviction": False}, {}),
        (None, {}),
        ({"method": "random", "router": "hashed"}, {}),
        ({}, TWO_KINDS_OF_LAYERS),
    ],
    ids=["evicting", "keeping", "dense", "hashed", "two kinds of layers"],
)
def test_rows_arrive_where_the_quantized_model_takes_them(make_routed, calibration, routing, fields):
    model = make_routed(routing=routing, **fields)
    ends = {"embedding_bits": 8, "head_bits": 8} | ({} if routing is None else {"router_bits": 8})
    spec, params, layers = quantized = quantize(*model, **ends)
    prefix = started(model, quantized, calibration)
    counts = through(prefix, layers)
    expected = reference(quantized, calibration)
    hidden = jnp.asarray(states(prefix, calibration))
    there = calibration[1] > 0
    found = jax.jit(unembed, static_argnums=0)(spec.structure, params, hidden)
    np.testing.assert_allclose(np.asarray(found)[there], np.asarray(expected.logits)[there], rtol=1e-5, atol=3e-5)
    executed = np.asarray(expected.routing.execute).sum((0, 1)).tolist()
    assert counts == [Counts(number, 0) for number in executed]
    assert routing is None or 0 < executed[1] < there.sum()
    # The float model arrives elsewhere.
    before = run(model[0], model[1], *map(jnp.asarray, calibration[:1]), segment_ids=jnp.asarray(calibration[1]))
    assert np.abs(np.asarray(before.logits)[there] - np.asarray(expected.logits)[there]).max() > 0.01


def test_tokens_that_count_are_those_that_execute(model, quantized, calibration):
    execute = np.asarray(reference(quantized, calibration).routing.execute)
    prefix = started(model, quantized, calibration)
    for index, layer in quantized[2].items():
        counts = prefix.decide(index, layer)
        counted = np.concatenate(prefix._counted)
        np.testing.assert_array_equal(counted[:10], execute[..., index])
        assert not counted[10:].any()  # rows that fill the last batch up
        assert counts == Counts(int(execute[..., index].sum()), 0)
        prefix.advance(index, layer)
    present = calibration[1] > 0
    first = present & (np.diff(calibration[1], axis=1, prepend=0) != 0)
    assert first.sum() > 10 and execute[first].all()  # the first token of every example is always on
    assert 0.2 < execute[present][:, 1].mean() < 0.9


def test_too_few_rows_are_filled_up_with_the_first_tokens_that_skip(model, quantized, calibration):
    layers, present = quantized[2], calibration[1] > 0
    for missing in (1, 17, 10_000):
        prefix = started(model, quantized, calibration)
        through(prefix, {0: layers[0]})
        executed = prefix.decide(1, layers[1]).executed
        execute = np.concatenate(prefix._execute)[:10]
        spare = present & ~execute
        prefix = started(model, quantized, calibration, min_rows=executed + missing)
        assert through(prefix, {0: layers[0]}) == [Counts(present.sum(), 0)]  # nobody skips it
        counts = prefix.decide(1, layers[1])
        added = np.concatenate(prefix._counted)[:10] & ~execute
        expected = np.flatnonzero(spare)[:missing]
        np.testing.assert_array_equal(np.flatnonzero(added), expected)
        assert counts == Counts(executed, len(expected))
        np.testing.assert_array_equal(np.concatenate(prefix._execute)[:10], execute)  # they still skip
        assert float(prefix.statistics(1, layers[1], "gate").rows) == executed + len(expected)


def test_all_tokens_count_where_routing_is_ignored(model, quantized, calibration):
    layers, present = quantized[2], calibration[1] > 0
    prefix = started(model, quantized, calibration, executed_only=False)
    through(prefix, {0: layers[0]})
    counts = prefix.decide(1, layers[1])
    assert counts.executed < present.sum() == counts.executed + counts.filled
    assert float(prefix.statistics(1, layers[1], "query").rows) == present.sum()


def test_inputs_are_what_the_linears_multiply(model, calibration, rng):
    """The block's result is rebuilt from them, in float64, with the rules of the architecture and no code of it."""
    spec, params = model
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["layers"][1])
    tokens, segments = map(jnp.asarray, calibration)
    hidden = rng.normal(size=(10, 12, 32)).astype(np.float32)
    execute = (rng.random((10, 12)) < 0.5) & (calibration[1] > 0)
    block = merge(skeleton(spec).layers[1], params["layers"][1])

    @jax.jit
    def both(hidden, execute):
        context, _ = context_of(spec, tokens, segments)
        return block.linear_inputs(hidden, context, execute), block(hidden, context, execute)[0]

    inputs, out = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), both(jnp.asarray(hidden), jnp.asarray(execute))
    )
    assert inputs.keys() == READERS.keys()
    kernels = {name: tree["kernel"] for part in ("attention", "mlp") for name, tree in layer[part].items()}

    def norm(x, part):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * layer[part]["scale"]

    wide = hidden.astype(np.float64)
    between = wide + inputs["output"] @ kernels["output"]
    gate = inputs["gate"] @ kernels["gate"]
    np.testing.assert_allclose(inputs["query"], norm(wide, "attention_norm"), atol=1e-5)
    np.testing.assert_allclose(inputs["gate"], norm(between, "mlp_norm"), atol=1e-4)
    np.testing.assert_allclose(inputs["down"], gate / (1 + np.exp(-gate)) * (inputs["gate"] @ kernels["up"]), atol=1e-4)
    expected = between + inputs["down"] @ kernels["down"]
    np.testing.assert_allclose(out[execute], expected[execute], atol=1e-4)
    # A token that is the first of its example sees its own value alone.
    np.testing.assert_allclose(
        inputs["output"][:, 0].reshape(10, 2, 2, 8),
        np.repeat((inputs["query"][:, 0] @ kernels["value"]).reshape(10, 2, 1, 8), 2, axis=2),
        atol=1e-4,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"min_rows": 100}, {"executed_only": False}], ids=["executed", "floor", "all"]
)
def test_statistics_are_sums_over_the_inputs(model, quantized, calibration, settings):
    """With tokens that count although they skip, too: no other token sees their keys, as none ever will."""
    spec, layers = model[0], quantized[2]
    prefix = started(model, quantized, calibration, **settings)
    through(prefix, {0: layers[0]})
    prefix.decide(1, layers[1])
    hidden, execute, counted = (
        np.concatenate([np.asarray(part) for part in parts])[:10]
        for parts in (prefix._hidden, prefix._execute, prefix._counted)
    )
    block = merge(skeleton(spec).layers[1], layers[1])

    @jax.jit
    def inputs(hidden, execute):
        context, _ = context_of(spec, *map(jnp.asarray, calibration))
        return block.linear_inputs(hidden, context, execute)

    assert (settings == {}) == (counted == execute).all()
    for reader, x in inputs(jnp.asarray(hidden), jnp.asarray(execute)).items():
        rows = np.asarray(x, np.float64)[counted]
        found = prefix.statistics(1, layers[1], reader)
        hessian = rows.T @ rows
        np.testing.assert_allclose(found.hessian, hessian, atol=1e-5 * hessian.max())
        np.testing.assert_allclose(found.mean_magnitude, np.abs(rows).mean(0), rtol=1e-3)
        assert float(found.rows) == len(rows)


@pytest.mark.slow
def test_batches_change_nothing(model, quantized, calibration):
    layers = quantized[2]
    found = []
    for batch_size in (1, 4, 16):
        prefix = started(model, quantized, calibration, batch_size=batch_size, min_rows=80)
        through(prefix, {0: layers[0]})
        counts = prefix.decide(1, layers[1])
        statistics = [prefix.statistics(1, layers[1], reader) for reader in ("output", "down")]
        found.append((counts, np.concatenate(prefix._counted)[:10], statistics))
    for counts, counted, statistics in found[1:]:
        assert counts == found[0][0] and counts.filled > 0
        np.testing.assert_array_equal(counted, found[0][1])
        for one, first in zip(statistics, found[0][2], strict=True):
            np.testing.assert_allclose(one.hessian, first.hessian, atol=1e-5 * float(first.hessian.max()))
            assert one.rows == first.rows


@pytest.mark.parametrize("batch_size", [1, 4])
def test_last_sample_is_the_last_row(model, quantized, calibration, batch_size):
    layer = quantized[2][0]
    prefix = started(model, quantized, calibration, batch_size=batch_size)
    prefix.decide(0, layer)
    found = prefix.statistics(0, layer, "query", last_sample_only=True)
    alone = started(model, quantized, tuple(part[-1:] for part in calibration), batch_size=batch_size)
    alone.decide(0, layer)
    expected = alone.statistics(0, layer, "query")
    assert float(found.rows) == (calibration[1][-1] > 0).sum() == float(expected.rows)
    np.testing.assert_allclose(found.hessian, expected.hessian, atol=1e-5 * float(expected.hessian.max()))


def test_decisions_are_those_at_the_width_that_is_made(model, quantized, calibration):
    """Thresholds are stored per bit width: at those of 16 bits fewer tokens would execute."""
    layers = quantized[2]
    settings = StatisticsConfig(batch_size=4, min_rows=0)
    as_float = Prefix(model[0], *calibration, settings, FLOAT32)
    as_float.start(model[1]["embedding"])
    counts = through(as_float, layers)
    assert counts[0].executed == (calibration[1] > 0).sum()
    assert counts[1].executed < through(started(model, quantized, calibration), layers)[1].executed
