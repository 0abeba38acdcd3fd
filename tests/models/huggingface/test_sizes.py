"""Parameter counts of every published model that is named here, of the skeleton that `eval_shape` gives."""

import math
from pathlib import Path

import jax
import pytest
import yaml

from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.huggingface.config import architecture_from
from qtale_jax.models.huggingface.names import tensors
from qtale_jax.models.rotary import frequencies
from qtale_jax.models.sizes import SIZES
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


@pytest.mark.parametrize("name", [name for name in SIZES if name in PUBLISHED])
def test_sizes_known_by_name_are_the_published_ones(name):
    published = architecture_from(PUBLISHED[name]["config"], "config.json")
    left_unsaid = {"rope_scaling", "norm_eps"} if published.family == "llama" else set()
    expected = SIZES[name].model_dump(exclude=left_unsaid)
    assert published.model_dump(exclude=left_unsaid) == expected


def test_gemma_3_is_global_in_every_sixth_layer():
    architecture = architecture_from(PUBLISHED["gemma-3-1b"]["config"], "config.json")
    assert architecture.global_layers == (5, 11, 17, 23) and architecture.window(0) == 512
    assert (architecture.rope_theta, architecture.local_rope_theta) == (1e6, 1e4)


def test_gemma_3_from_4b_on_scales_the_global_layers():
    for name, layers in (("gemma-3-4b", 34), ("gemma-3-12b", 48), ("gemma-3-27b", 62)):
        architecture = SIZES[name]
        assert architecture.num_layers == layers and architecture.global_layers[-1] == layers // 6 * 6 - 1
        everywhere, local = (frequencies(architecture, local) for local in (False, True))
        assert (everywhere[0], local[0]) == (1 / 8, 1.0)
