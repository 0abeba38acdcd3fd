"""Parameter counts of every published model that is named here, of the skeleton that `eval_shape` gives."""

import math
from pathlib import Path

import jax
import pytest
import yaml

from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.huggingface.config import architecture_from
from qtale_jax.models.huggingface.names import tensors
from qtale_jax.models.specification import ModelSpecification

PUBLISHED = yaml.safe_load(Path(__file__).with_name("published_sizes.yaml").read_text())


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    """Layers have the same parameters, so one of them is drawn and counted as often as there are layers."""
    whole = architecture_from(PUBLISHED[name]["config"], "config.json")
    one = abstract_parameters(ModelSpecification(architecture=whole.with_layers((0,))))
    rest = count({part: tree for part, tree in one.items() if part != "layers"})
    assert rest + whole.num_layers * count(one["layers"]) == PUBLISHED[name]["parameters"]
    # The tensors of the whole checkpoint are those parameters.
    assert sum(math.prod(tensor.shape) for tensor in tensors(whole)) == PUBLISHED[name]["parameters"]


@pytest.mark.slow
def test_parameter_count_of_a_whole_skeleton():
    published = PUBLISHED["gemma-3-1b"]
    spec = ModelSpecification(architecture=architecture_from(published["config"], "config.json"))
    assert count(abstract_parameters(spec)) == published["parameters"]


def test_gemma_3_is_global_in_every_sixth_layer():
    architecture = architecture_from(PUBLISHED["gemma-3-1b"]["config"], "config.json")
    assert architecture.global_layers == (5, 11, 17, 23) and architecture.window(0) == 512
    assert (architecture.rope_theta, architecture.local_rope_theta) == (1e6, 1e4)
