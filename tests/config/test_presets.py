"""Named recipes: what they set, and that keys which are given win over them."""

import yaml

from qtale_jax.config.loading import load_config, method_config, resolve, with_overrides
from qtale_jax.config.presets import PRESETS, with_preset
from qtale_jax.config.schema import Config

RECIPE = PRESETS["qtale_plus"]


def load(tmp_path, text, *overrides) -> Config:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return load_config(path, list(overrides))


def fields(config: Config) -> list:
    routing, train = config.routing, config.train
    bits = [format.bits for format in train.quantization_aware.formats]
    return [routing.eviction, routing.entropy_schedule, train.distillation.weight, bits]


WHOLE = [
    RECIPE["routing"]["eviction"],
    RECIPE["routing"]["entropy_schedule"],
    RECIPE["train"]["distillation"]["weight"],
    [format["bits"] for format in RECIPE["train"]["quantization_aware"]["formats"]],
]
DEFAULTS = [True, "constant", 0.0, []]


def test_values_without_a_preset_are_left_alone():
    assert with_preset({"seed": 3}) == {"seed": 3}
    assert with_preset({"routing": {"preset": None}}) == {"routing": {"preset": None}}
    assert with_preset({"routing": 3}) == {"routing": 3}  # refused by the schema, with its place


def test_given_keys_win_and_the_recipe_is_not_changed(tmp_path):
    before = yaml.safe_dump(PRESETS)
    text = "model: {path: parent}\nrouting: {preset: qtale_plus, entropy_schedule: constant}\n"
    config = load(tmp_path, text, "train.quantization_aware.formats=[{bits: 8}]")
    assert fields(config) == [WHOLE[0], "constant", WHOLE[2], [8]]
    assert yaml.safe_dump(PRESETS) == before


def test_one_method_of_an_experiment_may_have_it(tmp_path):
    text = "seed: 0\nexperiment: {base: {}, methods: {qtale: {}, better: {routing: {preset: qtale_plus}}}}\n"
    config = load(tmp_path, text)
    assert fields(method_config(config, "qtale", base="b")) == DEFAULTS
    better = method_config(config, "better", base="b")
    assert fields(better) == WHOLE and better.routing.method == "qtale"
    assert fields(with_overrides(better, {"seed": 4})) == WHOLE  # as the grid lays seeds and outputs on it


def test_what_it_resolved_to_is_what_is_written_and_read_again(tmp_path):
    text = "model: {path: parent}\nrouting: {preset: qtale_plus, eviction: true}\n"
    config = load(tmp_path, text)
    assert fields(config) == [True, *WHOLE[1:]]
    assert resolve(load(tmp_path, yaml.safe_dump(resolve(config)))) == resolve(config)
