"""Logical axes, the table that maps them, and meshes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from qtale_jax.config.schema import MeshConfig
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import abstract_parameters, logical_axes
from qtale_jax.models.specification import Architecture, LoraSpecification, ModelSpecification, RoutingSpecification
from qtale_jax.models.stacking import stack_layers
from qtale_jax.parallel.axes import AXES, RULES, constrain, partition_spec
from qtale_jax.parallel.mesh import build_mesh, replicated, rows_held, sharding, shardings

SPEC = ModelSpecification(
    architecture=Architecture(
        vocab_size=57,
        hidden_size=16,
        intermediate_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_length=16,
    ),
    routing=RoutingSpecification(method="qtale", router_hidden=8),
    lora=LoraSpecification(rank=2),
)


def test_names_map_to_mesh_axes():
    assert partition_spec(("layers", "embed", "heads")) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec(("batch", "length")) == PartitionSpec(("data", "fsdp"), None)
    assert partition_spec((None,)) == PartitionSpec(None)


def test_rules_name_only_axes_of_the_mesh():
    named = {axis for entry in RULES.values() if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
    assert named <= set(AXES)


@pytest.mark.parametrize("names", [("heads", "mlp"), ("batch", "embed"), ("vocab", "activation_vocab")])
def test_one_mesh_axis_cannot_serve_two_dimensions(names):
    with pytest.raises(ValueError, match="appears twice"):
        partition_spec(names)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no sharding rule for axes \['head'\]; known: .*'heads'"):
        partition_spec(("embed", "head"))


@pytest.mark.parametrize("stacked", [False, True])
def test_every_parameter_of_a_model_has_a_sharding(stacked):
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes, abstract = logical_axes(SPEC), abstract_parameters(SPEC)
    if stacked:
        axes, abstract = stack_layers(SPEC, axes), stack_layers(SPEC, abstract)
    placed = shardings(mesh, axes, abstract)
    assert jax.tree.structure(placed) == jax.tree.structure(abstract)
    for leaf, where in zip(jax.tree.leaves(abstract), jax.tree.leaves(placed), strict=True):
        where.shard_shape(leaf.shape)  # raises if the mesh does not divide it
    assert placed["head"]["kernel"].spec == PartitionSpec("fsdp", None)  # 57 tokens do not divide by two


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=8), (8, 1, 1)),
    ],
)
def test_open_axis_takes_what_is_left(config, shape):
    mesh = build_mesh(config)
    assert mesh.axis_names == AXES and mesh.devices.shape == shape


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=-1, tensor=3), MeshConfig(data=4)])
def test_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(InputError, match="does not fit 8 devices: the product has to be 8"):
        build_mesh(config)


def test_dimension_that_does_not_divide_stays_whole():
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert sharding(mesh, ("embed", "mlp"), (6, 7)).spec == PartitionSpec("fsdp", None)
    assert replicated(mesh).is_fully_replicated


def test_constraint_without_a_mesh_does_nothing():
    x = jnp.zeros((2, 3, 4), jnp.float32)
    assert constrain(x, "batch", "length", "activation_embed") is x


def test_constraint_leaves_whole_what_the_mesh_does_not_divide():
    """A vocabulary of 57 on two tensor shards, or one row on eight devices, is no error."""
    x = jnp.arange(3 * 4 * 57, dtype=jnp.float32).reshape(3, 4, 57)
    with jax.set_mesh(build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        found = jax.jit(lambda x: constrain(x, "batch", "length", "activation_vocab"))(x)
    assert (found == x).all()


def test_processes_hold_the_rows_of_their_devices():
    """Halves of the devices, as two processes would have them: next to each other, or every other one."""
    devices, mesh = jax.devices(), build_mesh(MeshConfig(data=4, tensor=2))
    assert rows_held(mesh, 8).tolist() == list(range(8))
    assert rows_held(mesh, 8, devices[:4]).tolist() == [0, 1, 2, 3]
    assert rows_held(mesh, 8, [*devices[:2], *devices[4:6]]).tolist() == [0, 1, 4, 5]
    # The tensor axis lies across them: both hold all rows.
    assert rows_held(mesh, 8, devices[::2]).tolist() == rows_held(mesh, 8, devices[1::2]).tolist() == list(range(8))
