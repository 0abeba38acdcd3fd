"""FLOPs against formulas worked out by hand."""

import pytest

from qtale_jax.models.cost import flops_per_token, layer_flops, peak_flops, router_flops, training_flops_per_token


def test_dense_model(make_spec):
    """D = 16, MLP 24, 4 heads and 2 key heads of 4, 3 layers, 40 tokens of vocabulary, 10 keys."""
    spec = make_spec()
    attention = 2 * (16 * 16 + 16 * 8 + 16 * 8 + 16 * 16)
    scores_and_mix = 2 * 2 * (4 * 4) * 10
    mlp = 3 * 2 * 16 * 24
    assert layer_flops(spec, 10) == attention + scores_and_mix + mlp
    assert flops_per_token(spec, [1.0] * 3, [10] * 3) == 3 * (attention + scores_and_mix + mlp) + 2 * 16 * 40
    assert router_flops(spec) == 0


def test_only_executed_layers_cost_but_every_router_does(make_spec):
    spec = make_spec(routing={"always_on_layers": 1, "router_hidden": 8})
    assert router_flops(spec) == 2 * (16 * 8 + 8 * 2)
    found = flops_per_token(spec, [1.0, 0.5, 0.0], [10, 4, 0])
    blocks = layer_flops(spec, 10) + 0.5 * layer_flops(spec, 4)
    assert found == pytest.approx(blocks + 2 * 16 * 40 + 2 * router_flops(spec))


def test_without_eviction_skipped_tokens_cost_their_keys_and_values(make_spec):
    evicting, keeping = (make_spec(routing={"always_on_layers": 1, "eviction": eviction}) for eviction in (True, False))
    executed, keys = [1.0, 0.5, 0.0], [10, 10, 10]
    more = flops_per_token(keeping, executed, keys) - flops_per_token(evicting, executed, keys)
    assert more == pytest.approx((0.5 + 1.0) * 2 * 2 * 16 * 8)


def test_training_is_three_forwards_of_every_block(make_spec):
    spec = make_spec(routing={"always_on_layers": 1})
    assert training_flops_per_token(spec, 20) == 3 * flops_per_token(spec, [1.0] * 3, [10] * 3)


@pytest.mark.parametrize(("length", "window"), [(20, 4), (20, 20), (20, 30), (1, 1)])
def test_training_counts_the_keys_inside_the_window(make_spec, length, window):
    """Continuous, as half of the length is without a window: the integral of min(position, window)."""
    spec = make_spec(sliding_window=window)
    steps = [(i + 0.5) / 100 for i in range(100 * length)]
    keys = sum(min(step, window) for step in steps) / len(steps)
    assert training_flops_per_token(spec, length) == pytest.approx(3 * flops_per_token(spec, [1.0] * 3, [keys] * 3))


def test_peak_rate_is_measured_where_no_data_sheet_helps():
    assert peak_flops() > 1e8
