"""Training that skips, against masked execution: the same values, the same gradients in expectation over samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.models import forward
from qtale_jax.models.attention import attend
from qtale_jax.models.forward import run_trunk
from qtale_jax.models.policy import ExpertChoice, Sampled
from qtale_jax.models.skipping import SHARES, Selection, Skipping, weighted
from qtale_jax.models.stacking import stack_layers
from qtale_jax.planning.residuals import kept_bytes

LENGTH = 24
POLICIES = {"sampled": Sampled(jax.random.key(3)), "chosen": ExpertChoice(0.4)}


@pytest.fixture(scope="module")
def rows() -> tuple[jax.Array, jax.Array]:
    """Tokens and segments (3, 24): one example, three packed ones, one and much padding."""
    segments = np.ones((3, LENGTH), np.int32)
    segments[1] = np.repeat([1, 2, 3], [9, 5, 10])
    segments[2, 10:] = 0
    tokens = jax.random.randint(jax.random.key(7), segments.shape, 1, 40, jnp.int32)
    return tokens, jnp.asarray(segments)


@pytest.fixture(scope="module")
def model(make_spec, make_params):
    """Four layers with adapters, three of them routed; parameters stacked."""
    spec = make_spec(
        routing={"always_on_layers": 1, "always_on_tokens": 1}, lora={"targets": ("query", "value", "up")}, num_layers=4
    )
    return spec, stack_layers(spec, make_params(spec))


def split(params) -> tuple[dict, dict]:
    """What trains (routers and adapters) and what does not."""
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    trains = {name: leaf for name, leaf in flat.items() if "router" in name or "lora" in name}
    return trains, params


def merged(trains, params):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: trains.get(jax.tree_util.keystr(path), leaf), params)


def loss_of(spec, params, rows, policy, remat="none"):
    """A loss of what trains and of a request to skip; it gives the hidden states and routing besides."""
    tokens, segments = rows
    present = segments > 0
    target = jax.random.normal(jax.random.key(1), (*tokens.shape, spec.architecture.hidden_size), jnp.float32)

    def loss(trains, skipping):
        hidden, routing, gates = run_trunk(
            spec, merged(trains, params), tokens, segment_ids=segments, policy=policy, remat=remat, skipping=skipping
        )
        assert gates is not None
        return jnp.sum(jnp.where(present[..., None], target * jnp.sin(hidden), 0.0)), (hidden, routing.execute, gates)

    return loss


def graded(spec, params, rows, policy, remat="none"):
    trains, rest = split(params)
    function = jax.value_and_grad(loss_of(spec, rest, rows, policy, remat), has_aux=True)
    return jax.jit(functools.partial(function, trains))


@pytest.fixture(scope="module")
def masked(model, rows):
    """Value and gradients of masked execution, by policy."""
    return {name: graded(*model, rows, policy)(None) for name, policy in POLICIES.items()}


def assert_same(found, expected, names=lambda name: True):
    assert found.keys() == expected.keys()
    for name in filter(names, expected):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=name)
        assert np.any(expected[name] != 0), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_values_are_those_of_masked_execution(model, rows, masked, policy, share):
    (loss, (hidden, execute, gates)), _ = masked[policy]
    run = jax.jit(loss_of(model[0], model[1], rows, POLICIES[policy]))
    found = run(split(model[1])[0], Skipping(jax.random.key(5), share))
    present = np.asarray(rows[1]) > 0
    np.testing.assert_allclose(np.asarray(found[1][0])[present], np.asarray(hidden)[present], atol=1e-5)
    np.testing.assert_array_equal(found[1][1], execute)
    np.testing.assert_array_equal(np.asarray(found[1][2])[present], np.asarray(gates)[present])
    assert 0.2 < float(np.mean(np.asarray(execute)[present])) < 0.8
    assert found[0] == pytest.approx(float(loss), abs=1e-4)


def test_layers_may_differ_in_what_they_see(make_spec, make_params, rows):
    """Windows and rotations of local layers are taken along."""
    windows = {"sliding_window": 3, "global_layers": (1,), "local_rope_theta": 50.0}
    spec = make_spec(routing={"always_on_layers": 0, "always_on_tokens": 1}, num_layers=2, **windows)
    params = stack_layers(spec, make_params(spec))
    run = jax.jit(loss_of(spec, params, rows, POLICIES["sampled"]))
    masked, found = (run(split(params)[0], skipping) for skipping in (None, Skipping(jax.random.key(5), 0.1)))
    assert found[0] == pytest.approx(float(masked[0]), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "remat"), [("sampled", "none"), ("sampled", "dots"), ("sampled", "full"), ("chosen", "none")]
)
def test_gradients_are_those_of_masked_execution_when_nothing_is_left_out(model, rows, masked, policy, remat):
    found = graded(*model, rows, POLICIES[policy], remat)(Skipping(jax.random.key(5), 1.0))
    assert_same(found[1], masked[policy][1])


def standard_scores(model, rows, expected, count: int) -> tuple[dict, dict]:
    """How far the mean gradient over `count` samples is from the expected one, in standard errors; and one gradient."""
    gradient = graded(*model, rows, POLICIES["sampled"])
    keys = jax.random.split(jax.random.key(11), count)
    found = jax.jit(lambda keys: jax.lax.map(lambda key: gradient(Skipping(key, 0.1))[1], keys))(keys)
    scores = {}
    for name, samples in found.items():
        samples, target = np.asarray(samples, np.float64), np.asarray(expected[name], np.float64)
        error = samples.std(axis=0, ddof=1) / count**0.5
        moves = error > 1e-4 * np.abs(target).max()
        scores[name] = (samples.mean(axis=0) - target)[moves] / error[moves]
    return scores, {name: samples[0] for name, samples in found.items()}


@pytest.mark.slow
def test_gradients_of_routers_are_those_of_masked_execution_in_expectation(model, rows, masked, monkeypatch):
    expected = masked["sampled"][1]
    scores, one = standard_scores(model, rows, expected, 400)
    of_routers = np.concatenate([score for name, score in scores.items() if "router" in name])
    assert of_routers.size > 300 and np.abs(of_routers).max() < 5
    assert 0.5 < np.mean(of_routers**2) < 2
    # What no later router passes anything to is not sampled at all.
    last = [name for name in expected if "lora" in name and "routed" in name]
    assert last
    for name in last:
        np.testing.assert_allclose(one[name][-1], expected[name][-1], atol=1e-5, rtol=1e-5)
    # Without their weights the sampled tokens would count too little.
    monkeypatch.setattr(forward, "weighted", lambda gate, weight: gate)
    biased, _ = standard_scores(model, rows, expected, 400)
    assert np.mean(np.concatenate([score for name, score in biased.items() if "router" in name]) ** 2) > 10


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_selection_fills_the_smallest_size_that_holds_it(rng, share):
    length = 40
    present = np.arange(length) < np.array([40, 33, 0, 8])[:, None]
    execute = present & (rng.random(present.shape) < np.array([0.3, 0.5, 0.5, 0.0])[:, None])
    draw = jax.jit(jax.vmap(lambda key: Selection.of(jnp.asarray(execute), jnp.asarray(present), share, key)))
    found = draw(jax.random.split(jax.random.key(0), 300))
    chosen, weight = np.asarray(found.compaction.chosen), np.asarray(found.weight)
    executing, skipping = execute.sum(1), (present & ~execute).sum(1)
    needed = (executing + np.ceil(np.float32(share) * skipping)).max()
    size = next(size for size in found.sizes if size >= needed)
    assert found.sizes == tuple(np.ceil(length * np.array(SHARES)).astype(int))
    assert (np.asarray(found.sizes)[np.asarray(found.index)] == size).all()
    assert (chosen[:, execute]).all() and not chosen[:, ~present].any()
    np.testing.assert_array_equal(chosen.sum(2), np.broadcast_to(np.minimum(size, present.sum(1)), (300, 4)))
    assert (weight[:, execute] == 1).all() and weight[chosen].max() <= 1 / share + 1e-5
    # The sampled tokens stand for all of the skipped ones, and each is drawn as often as the others.
    drawn = np.where(chosen & ~execute, weight, 0.0)
    np.testing.assert_allclose(drawn.sum(2), np.broadcast_to(skipping, (300, 4)), rtol=1e-5)
    often = drawn.mean(0)[present & ~execute]
    assert np.abs(often - 1).max() < 5 * np.sqrt((1 / share - 1) / 300) + 1e-5


def test_weight_multiplies_the_gradient_alone():
    gate, weight = jnp.asarray([[1.0, 0.0]]), jnp.asarray([[1.0, 4.0]])
    value, pull = jax.vjp(lambda gate: weighted(gate, weight), gate)
    np.testing.assert_array_equal(value, gate)
    np.testing.assert_array_equal(pull(jnp.ones_like(gate))[0], weight)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_what_a_query_says_of_an_evicted_key_does_not_depend_on_other_evicted_keys(rng, size):
    """Without that, leaving evicted keys out would bias the gradient of those that are there."""
    query = jnp.asarray(size * rng.normal(size=(1, 8, 4, 4)), jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(1, 8, 2, 4)), jnp.float32) for _ in range(2))
    stays = np.array([True, False, True, False, False, True, False, True])
    causal, kept = jnp.tril(jnp.ones((1, 8, 8), jnp.bool_)), jnp.asarray(stays | np.eye(8, dtype=bool))[None]

    def of_gate(there):
        def total(gate):
            return jnp.sum(jnp.sin(attend(query, key, value, there, kept, gate))[:, stays])

        return np.asarray(jax.grad(total)(kept.astype(jnp.float32)))

    among_all, alone = of_gate(causal), of_gate(causal & jnp.asarray(stays | (np.arange(8) == 3))[None, None])
    assert np.abs(among_all[0, stays, 3]).max() > 1e-3
    np.testing.assert_allclose(alone[0, stays, 3], among_all[0, stays, 3], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_more_is_kept_than_by_masked_execution(model, rows, remat):
    """Not once for every size, and no copies of weights."""
    trains, rest = split(model[1])
    loss = loss_of(model[0], rest, rows, POLICIES["sampled"], remat)
    skipping, without = (kept_bytes(loss, trains, asked) for asked in (Skipping(jax.random.key(0), 0.25), None))
    assert skipping < 1.1 * without
