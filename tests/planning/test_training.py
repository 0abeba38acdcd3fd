"""Memory of a training step: against sums by hand, and against the arrays of a run that was really set up."""

import functools

import jax
import pytest

from qtale_jax.config.loading import with_overrides
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.sizes import SIZES
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.parallel.mesh import abstract_mesh, build_mesh
from qtale_jax.planning.devices import topology
from qtale_jax.planning.plan import subject_of
from qtale_jax.planning.residuals import kept_bytes
from qtale_jax.planning.state import repeated_bytes, state_bytes
from qtale_jax.planning.step import StepShapes
from qtale_jax.planning.traffic import traffic
from qtale_jax.planning.training import TrainingPlanner
from qtale_jax.training import head
from qtale_jax.training.optimizer import build_optimizer
from qtale_jax.training.start import place_state, prepare, prepare_abstract

GB = 1e9


@pytest.fixture
def spec(tiny):
    """The tiny model with routers and adapters."""
    return lambda *overrides: subject_of(tiny("plan.topology=h100:1", "mesh.fsdp=1", *overrides)).spec


def on_first_device(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(("parameters", "shape"), [("adapters", (2, 2, 2)), ("all", (1, 4, 2))])
def test_bytes_are_those_of_a_real_run(tiny, spec, parameters, shape):
    names = zip(("data", "fsdp", "tensor"), shape, strict=True)
    config = tiny(f"train.parameters={parameters}", *(f"mesh.{axis}={size}" for axis, size in names))
    mesh = build_mesh(config.mesh)
    with jax.set_mesh(mesh):
        start = prepare(config, mesh, jax.random.key(0))
        state = place_state(start, build_optimizer(config.train.optimizer, 2), mesh)
    planned = prepare_abstract(config, start.spec, abstract_mesh(shape))
    found = state_bytes(config, planned, abstract_mesh(shape))
    assert found.pop("frozen parameters", 0) == on_first_device(start.frozen)
    assert found.pop("optimizer") == on_first_device(state) - on_first_device(state.trainable)
    assert list(found.values()) == [on_first_device(state.trainable)]
    assert start.spec == spec(f"train.parameters={parameters}")
    for real, shapes in ((start.trainable, planned.trainable), (start.frozen, planned.frozen)):
        assert {path: (leaf.shape, leaf.dtype) for path, leaf in real.items()} == {
            path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()
        }


def test_bytes_by_hand(tiny, spec):
    """Two devices halve the axis of the residual stream, 16; norms, routers and half of each adapter are whole."""
    config = tiny("mesh.fsdp=2")
    start = prepare_abstract(config, spec(), abstract_mesh((1, 2, 1)))
    found = state_bytes(config, start, abstract_mesh((1, 2, 1)))
    linears = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32
    frozen = 4 * (2 * 64 * 16 + 4 * linears) // 2 + 4 * (4 * 2 * 16 + 16)
    router = 16 * 8 + 8 + 8 + 8 * 2 + 2
    adapters = 4 * (3 * 16 * 2 // 2 + 2 * (16 + 8 + 8))
    trained = 4 * (3 * router + adapters)
    # Two moments, and Adam's and the schedule's counts beside step and bad_step.
    assert found == {"frozen parameters": frozen, "adapters and routers": trained, "optimizer": 2 * trained + 4 * 4}


def test_devices_send_what_they_miss(tiny, spec):
    config = tiny("mesh.fsdp=2")
    start = prepare_abstract(config, spec(), abstract_mesh((1, 2, 1)))
    found = traffic(config, start, (1, 2, 1))
    linears = 4 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32)
    down = 4 * 4 * 3 * 16 * 2
    assert found.weights == (2 * 4 * 64 * 16 + 4 * linears + down) / 2
    # The MLP, whose matrices are the larger, while attention's output projection waits for its gradient.
    assert found.gathered == {"layer": 4 * (3 * 16 * 32 + 16 * 16), "head": 4 * 64 * 16}
    router = 16 * 8 + 8 + 8 + 8 * 2 + 2
    whole = 4 * (3 * router + 4 * 2 * (16 + 8 + 8))
    assert found.gradients == down / 2 + whole  # 2 (n - 1) / n is 1 for two devices
    assert found.per_row == 0
    assert traffic(config, prepare_abstract(config, spec(), abstract_mesh((1, 1, 2))), (1, 1, 2)).per_row == (
        (4 * 4 + 2) * 4 * 12 * 16
    )


@pytest.mark.slow
def test_activations_follow_remat_and_rows(tiny, spec):
    lines, model = {}, spec()
    for remat in ("none", "dots", "full"):
        config = tiny(f"train.remat={remat}")
        shapes = StepShapes(config, model, 1)
        lines[remat] = shapes.activations()
    base, slope = lines["full"].kept
    loss, arguments = shapes._loss(config, shapes.spec, 5)
    assert base + 5 * slope == kept_bytes(loss, *arguments)
    kept = [lines[remat].kept[1] for remat in ("none", "dots", "full")]
    assert kept == sorted(kept, reverse=True) and kept[0] > 3 * kept[2]
    # Beside what is kept the head has the gradient of the logits, and a layer what the policy left out.
    assert {lines[remat].head for remat in lines} == {(0.0, 4.0 * 12 * 64)}
    assert lines["full"].layer[1] > lines["dots"].layer[1] > lines["none"].layer[1] == 0
    # Full remat keeps the residual stream between layers: 4 layers, 12 tokens, 16 wide, float32.
    assert kept[2] > 4 * 12 * 16 * 4


@pytest.mark.slow
def test_logits_in_blocks_are_not_kept(tiny, spec, monkeypatch):
    """The gradient of the residual stream is, 12 tokens of 16; a block, or its gradient, is there for a time."""
    model, whole = spec(), StepShapes(tiny(), spec(), 1).activations()
    monkeypatch.setattr(head, "FEW_LOGITS", 0)
    blocks = StepShapes(tiny(), model, 1).activations()
    assert blocks.head == (4.0 * 512 * 64, 0.0)
    logits, stream = 4 * 12 * 64, 4 * 12 * 16
    assert blocks.kept[1] < whole.kept[1] - logits + stream
    many = 100_000
    assert blocks.at_head(many) < whole.at_head(many) and blocks.in_layer(many) < whole.in_layer(many)
    assert blocks.at_head(1) - sum(blocks.kept) == pytest.approx(blocks.head[0], abs=1)
    everything = StepShapes(tiny("train.parameters=all"), spec("train.parameters=all"), 1).activations()
    assert everything.head == (0.0, 4.0 * 12 * 64)  # a head with a gradient of its own has all logits


def test_microbatches_hold_fewer_activations_and_the_gradient_of_those_before(tiny, spec):
    planner = TrainingPlanner(tiny(), spec())
    whole, half, parts = (planner.memory((1, 2, 1), *rows) for rows in ((4, 1), (2, 1), (2, 2)))
    assert parts["gradients"] - half.get("gradients", 0) == whole["adapters and routers"]
    assert parts["batch"] == whole["batch"] and parts["activations"] == half["activations"]
    assert parts["activations"] < whole["activations"]
    unchanged = ("frozen parameters", "adapters and routers", "optimizer")
    assert [parts[name] for name in unchanged] == [whole[name] for name in unchanged]


def test_tensor_parallelism_divides_the_step(tiny, spec):
    one, two = (StepShapes(tiny(), spec(), size).products(2).flops for size in (1, 2))
    routers = 3 * 3 * 2 * 2 * 12 * 8 * (16 + 2) - 3 * 2 * 2 * 12 * 8 * 16
    assert one / 2 < two < one / 2 + 2 * routers  # routers are computed by every device, as are parts of adapters


def test_distillation_holds_a_teacher(tiny, spec):
    config = tiny()
    distilled = with_overrides(config, {"model": {"path": "x"}, "train": {"distillation": {"weight": 1.0}}})
    start = prepare_abstract(config, spec(), abstract_mesh((1, 1, 1)))
    found = state_bytes(distilled, start, abstract_mesh((1, 1, 1)))
    router = 16 * 8 + 8 + 8 + 8 * 2 + 2
    assert found["teacher"] == 4 * 3 * router  # frozen weights are shared, what trains is copied


def test_a_distilling_step_is_given_frozen_layers_and_embedding_twice_but_not_the_head(tiny, spec):
    """As a compiler counts its arguments: a head that does not train serves model and teacher."""
    config = tiny()
    distilled = with_overrides(config, {"model": {"path": "x"}, "train": {"distillation": {"weight": 1.0}}})
    start = prepare_abstract(config, spec(), abstract_mesh((1, 1, 1)))
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16  # queries and output, keys and values, MLP, norms
    assert repeated_bytes(distilled, start) == 4 * (64 * 16 + 4 * layer)
    assert repeated_bytes(config, start) == 0
    everything = prepare_abstract(tiny("train.parameters=all"), spec("train.parameters=all"), abstract_mesh((1, 1, 1)))
    assert repeated_bytes(distilled, everything) == 0  # what trains is copied


@functools.cache
def planned(name: str, **fields) -> dict:
    spec = ModelSpecification(architecture=SIZES[name], dtype="bfloat16", **fields)
    return abstract_parameters(spec)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-3b", 3_212_749_824),
        ("gemma-3-4b", 3_880_263_168),
    ],
)
def test_named_sizes_are_the_published_ones(name, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(planned(name))) == parameters


@pytest.mark.slow
def test_llama_8b_fine_tunes_on_eight_v5e(shipped):
    """16 GB of bfloat16 weights and 63 million router parameters in float32, which every device holds whole."""
    config = shipped("llama3_1_8b_csqa", "plan.model=llama-3.1-8b", "plan.topology=v5e:2x4")
    subject = subject_of(config)
    assert subject.parameters == 8_030_261_248
    found = TrainingPlanner(config, subject.spec).estimate(topology("v5e:2x4"), subject.sizes)
    assert found.memory["frozen parameters"] == pytest.approx(2 * 8.03 * GB / 8, rel=0.01)
    routers = 4 * 30 * (4096 * 512 + 2 * 512 + 512 * 2 + 2)
    assert routers < found.memory["adapters and routers"] < 1.1 * routers
    assert found.memory["optimizer"] == 2 * found.memory["adapters and routers"] + 16
    assert found.memory["gathered weights"] == 2 * 128256 * 4096
    # The scan keeps the residual stream of 32 layers; beside it the logits of half a row, or their gradient.
    stream, logits = 32 * 1024 * 4096 * 2, 4 * 512 * 128256
    assert stream + logits < found.memory["activations"] < 1.1 * (stream + logits)
    # Adapters and routers have no gradients then; with eight rows a layer takes more, and they do.
    assert "gradients" not in found.memory
    rows = TrainingPlanner(config, subject.spec).memory(subject.sizes, 8, 1)
    assert rows["gradients"] == rows["adapters and routers"]
    assert rows["gathered weights"] < found.memory["gathered weights"] / 2
    # Forward, forward again, gradients of activations but not of weights: six FLOPs for each weight but the embedding.
    weights = 8.03e9 - 128256 * 4096
    assert 6 * weights * 1024 < found.work.flops < 1.15 * 6 * weights * 1024
    # The compiler's peak for this topology, and with gaps between temporary arrays what it sets aside.
    assert found.arguments + found.temporary == pytest.approx(4.39 * GB, rel=0.02)
    assert found.total == pytest.approx(4.70 * GB, rel=0.1)
