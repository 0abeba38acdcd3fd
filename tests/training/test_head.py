"""The head in blocks: the loss of all logits and its gradient, without all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.config.schema import MeshConfig
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification
from qtale_jax.parallel.mesh import build_mesh, sharding
from qtale_jax.planning.collectives import collectives, gathered
from qtale_jax.training import head
from qtale_jax.training.loop import sharded_batch

ROWS, LENGTH, WIDTH, WORDS = 4, 20, 8, 50
SHAPE = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 8, "num_layers": 1, "max_length": 8}
SHAPE |= {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4}


@pytest.fixture(scope="module", params=[False, True], ids=["free", "tied, capped"])
def spec(request) -> ModelSpecification:
    other = {"tied_head": True, "logit_softcap": 2.0} if request.param else {}
    return ModelSpecification(architecture=Architecture(**SHAPE | other))


@pytest.fixture
def problem(spec, rng):
    """Hidden states, what is given, positions: a teacher whose head and states are others; weights with holes."""
    params, teacher = (head.needed(initialize(spec, jax.random.key(seed))) for seed in (0, 1))
    hidden, dense = (jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32) for _ in range(2))
    weights = rng.integers(0, 2, (ROWS, LENGTH)) * rng.uniform(0.5, 2, (ROWS, LENGTH))
    targets = jnp.asarray(rng.integers(0, WORDS, (ROWS, LENGTH)), jnp.int32)
    given = head.Given(params, jnp.float32(weights.sum()), teacher)
    return hidden, given, head.Positions(targets, jnp.asarray(weights, jnp.float32), dense)


@pytest.fixture
def small_blocks(monkeypatch):
    """Three positions of every row at a time: 20 are not a multiple."""
    monkeypatch.setattr(head, "FEW_LOGITS", 0)
    monkeypatch.setattr(head, "BLOCK_TOKENS", 3 * ROWS)


def evaluated(spec, hidden, given, positions, trained, distillation):
    """((loss, parts), gradient of 2 x loss by the hidden states)."""
    settings = head.Head(spec, distillation, temperature=1.5)
    function = functools.partial(head.losses, settings, trained=trained)

    def twice(hidden):
        loss, parts = function(hidden, given, positions)
        return 2 * loss, (loss, parts)

    slopes, found = jax.jit(jax.grad(twice, has_aux=True))(hidden)
    return found, slopes


@pytest.mark.parametrize("distillation", [0.0, 0.7])
def test_blocks_give_the_loss_and_gradient_of_all_logits(spec, problem, small_blocks, distillation):
    expected, slopes = evaluated(spec, *problem, trained=True, distillation=distillation)
    found, by_blocks = evaluated(spec, *problem, trained=False, distillation=distillation)
    assert expected[1].keys() == found[1].keys() == {"cross_entropy"} | ({"distillation"} if distillation else set())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    np.testing.assert_allclose(by_blocks, slopes, atol=1e-7)
    assert np.abs(slopes).max() > 1e-3
    value, parts = head.losses(head.Head(spec, distillation, 1.5), *problem, trained=False)  # no gradient asked for
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (value, parts), expected)


def test_bfloat16_states_have_bfloat16_gradients(spec, problem, small_blocks):
    hidden, given, positions = problem
    states = hidden.astype(jnp.bfloat16), given, positions
    (_, expected), (_, found) = (evaluated(spec, *states, trained, 0.0) for trained in (True, False))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-3)


def test_positions_that_count_for_nothing_cost_nothing(spec, problem, small_blocks):
    """Two positions of each row count, scattered: one block of seven. In the others even NaN changes nothing."""
    hidden, given, positions = problem
    counts = np.zeros((ROWS, LENGTH), bool)
    for row, places in enumerate([(0, 7), (19, 3), (5, 6), (18, 11)]):
        counts[row, list(places)] = True
    lost = ~counts
    # The block has room for one more position of each row, which is computed: the first of those that do not count.
    lost[np.arange(ROWS), np.argmax(lost, axis=1)] = False
    positions = head.Positions(positions.targets, jnp.asarray(counts, jnp.float32))
    total = head.Given(given.params, jnp.float32(counts.sum()))
    expected, slopes = evaluated(spec, hidden, total, positions, trained=True, distillation=0.0)
    ruined = jnp.where(jnp.asarray(lost)[..., None], jnp.nan, hidden)
    found, by_blocks = evaluated(spec, ruined, total, positions, trained=False, distillation=0.0)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(by_blocks, slopes, atol=1e-7)
    nothing = head.Positions(positions.targets, jnp.zeros_like(positions.weights))
    found, by_blocks = evaluated(spec, jnp.full_like(hidden, jnp.nan), total, nothing, False, 0.0)
    assert found[0] == 0 and not np.any(by_blocks)


def test_all_logits_are_never_there(rng):
    """Of 1,024 positions and 5,000 words: what the compiled gradient needs besides its arguments."""
    spec = ModelSpecification(architecture=Architecture(**SHAPE | {"vocab_size": 5000}))
    given = head.Given(head.needed(initialize(spec, jax.random.key(0))), jnp.float32(1))
    hidden = jnp.zeros((2, 1024, WIDTH))
    positions = head.Positions(jnp.zeros((2, 1024), jnp.int32), jnp.ones((2, 1024)))
    logits = 4 * 2 * 1024 * 5000

    def temporary(trained: bool) -> int:
        loss = functools.partial(head.losses, head.Head(spec), trained=trained)
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(hidden, given, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(trained=True) > logits
    assert temporary(trained=False) < 0.8 * logits  # blocks of a quarter, and of their gradient


def test_without_a_head_of_its_own_the_teacher_has_that_of_the_model(spec, problem, small_blocks):
    hidden, given, positions = problem
    same = head.Given(given.params, given.total, given.params)
    for trained in (True, False):
        expected, slopes = evaluated(spec, hidden, same, positions, trained, 0.7)
        found, others = evaluated(spec, hidden, head.Given(given.params, given.total), positions, trained, 0.7)
        assert found[1]["distillation"] == expected[1]["distillation"] > 0
        np.testing.assert_array_equal(others, slopes)


@pytest.mark.parametrize("distillation", [0.0, 0.7])
def test_devices_put_the_head_together_once(spec, problem, small_blocks, distillation):
    """Not for each of the blocks, and not for a teacher that has the same."""
    hidden, given, positions = problem
    given = head.Given(given.params, given.total)
    mesh = build_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    name = "embedding" if spec.architecture.tied_head else "head"
    (weights,) = given.params[name].values()
    with jax.set_mesh(mesh):
        placed = sharding(mesh, ("vocab", "embed") if name == "embedding" else ("embed", "vocab"), weights.shape)
        given.params[name] = {key: jax.device_put(weights, placed) for key in given.params[name]}
        loss = functools.partial(head.losses, head.Head(spec, distillation), trained=False)
        program = jax.jit(jax.grad(loss, has_aux=True)).lower(hidden, given, positions).compile()
    found = collectives(program.as_text())["all-gather"]
    assert found["count"] <= 3 and found["bytes"] < 2 * weights.nbytes


@pytest.mark.slow
def test_a_step_that_distils_puts_a_frozen_head_together_once(trainer, batch, monkeypatch):
    """As one that does not; with a head that trains it is another one than the teacher's."""
    monkeypatch.setattr(head, "FEW_LOGITS", 0)
    monkeypatch.setattr(head, "BLOCK_TOKENS", 4)

    def gathers(parameters: str, weight: float) -> int:
        train = {"parameters": parameters, "distillation": {"weight": weight}}
        run = trainer(jax.devices()[:2], train=train, mesh={"fsdp": 2}, experiment={"base": {}})
        everything = run.start.frozen | run.start.trainable
        if weight:
            run.teacher = {path: leaf for path, leaf in everything.items() if "/lora/" not in path}
        with jax.set_mesh(run.mesh):
            placed = sharded_batch(run.mesh, batch)
            lowered = run.compiled.lower(run.state, run.start.frozen, run.teacher, placed, jax.random.key(0))
        (shape,) = {leaf.shape for path, leaf in everything.items() if path.startswith("head/")}
        found = gathered(lowered.compile().as_text())
        return sum(each["count"] for each in found if each["array"] == f"f32[{shape[0]},{shape[1]}]")

    once = gathers("adapters", 0.0)
    assert once > 0 and gathers("adapters", 0.5) == once
    assert gathers("all", 0.5) > once


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_step_in_blocks_is_the_same_step(trainer, batch, monkeypatch, shape):
    """Under distillation, with adapters, on one device and on eight."""
    batch["weights"][:5, :6] = 0
    sections = {
        "train": {"parameters": "adapters", "distillation": {"weight": 0.5}},
        "routing": {"rate_schedule": "constant"},
        "experiment": {"base": {}},  # a teacher is given by hand
    }
    runs = [trainer(**sections)]
    runs.append(
        trainer(
            jax.devices()[: np.prod(shape)], **sections, mesh=dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
        )
    )
    losses = []
    for run, limit in zip(runs, (head.FEW_LOGITS, 0), strict=True):
        monkeypatch.setattr(head, "FEW_LOGITS", limit)
        monkeypatch.setattr(head, "BLOCK_TOKENS", 4)
        run.teacher = {path: leaf for path, leaf in run.start.frozen.items() if "/lora/" not in path}
        run.teacher |= {path: leaf for path, leaf in run.start.trainable.items() if "/lora/" not in path}
        losses.append([run.advance(batch)["loss"] for _ in range(3)])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5, rtol=0)
    assert losses[0][2] != losses[0][0]
