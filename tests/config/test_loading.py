"""Files and overrides to a checked configuration: what is accepted, and the line that says what is wrong."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_jax.config.loading import base_config, load_config, method_config, resolve, with_overrides
from qtale_jax.config.schema import Config, LoraConfig, RoutingConfig
from qtale_jax.errors import InputError


@pytest.fixture
def load(tmp_path):
    """Loads a configuration from text and overrides."""

    def load(text="seed: 0\n", *overrides):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return load_config(path, list(overrides))

    return load


def refusal(load, *arguments):
    with pytest.raises(InputError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_file_and_command_line_in_this_order(load):
    config = load("train: {steps: 10, batch_size: 16}\n", "train.steps=20", "train.steps=30", "lora=null")
    assert (config.train.steps, config.train.batch_size, config.train.log_every) == (30, 16, 20)
    assert config.lora is None
    assert load("train: {steps: 10}\n", "train.steps=null").train.steps is None
    assert load("seed: 1\n", "lora.targets=[gate, up]").lora == LoraConfig(targets=("gate", "up"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 1}", "trian: unknown key (did you mean 'train'?); allowed: output, seed, model,"),
        ("train: {stepps: 1}", "train.stepps: unknown key (did you mean 'steps'?); allowed: steps, epochs,"),
        ("train: {optimizer: {lr: 1}}", "train.optimizer.lr: unknown key; allowed: learning_rate,"),
        ("experiment: {quantizers: [{bit: 4}]}", "experiment.quantizers.0.bit: unknown key (did you mean 'bits'?)"),
        (
            "model: {architecture: {rope_scaling: {factr: 2}}}",
            "rope_scaling.factr: unknown key (did you mean 'factor'?)",
        ),
        ("model: {architecture: {rope_scaling: {kind: yarn}}}", "kind: found 'yarn'; allowed: llama3|linear"),
        ("routing: {method: qtal}", "found 'qtal'; allowed: dense|dllm|qtale|mod|random (did you mean 'qtale'?)"),
        ("routing: {targets_range: [0.3, 1]}", "routing.targets_range: unknown key (did you mean 'target_range'?)"),
        ("routing: {target_range: [0.3, 1.5]}", "routing.target_range.1: found 1.5; allowed: number >= 0, <= 1"),
        ("routing: {target_range: [0.3]}", "routing.target_range.1: found [0.3]; allowed: number >= 0, <= 1"),
        ("routing: {target_range: 0.3}", "target_range: found 0.3; allowed: pair of number >= 0, <= 1 or null"),
        ("routing: {noise_schedule: linear}", "noise_schedule: found 'linear'; allowed: constant|anneal"),
        ("routing: {preset: qtale_pluss}", "found 'qtale_pluss'; allowed: qtale_plus or null"),
        ("train: {quantization_aware: {bits: 2}}", "train.quantization_aware.bits: unknown key; allowed: formats,"),
        ("train: {quantization_aware: {formats: [{bits: 5}]}}", "formats.0.bits: found 5; allowed: 2|3|4|8"),
        ("model: {drop: {keep: 2}}", "model.drop.keep: found 2; allowed: number >= 0, <= 1"),
        ("model: {drop: {keep: 0.5}}", "model.drop.keep=0.5 takes layers out of a parent, and there is none"),
        ("model: {drop: {kep: 1}}", "model.drop.kep: unknown key (did you mean 'keep'?)"),
        ("data: {suite: studdy}", "data.suite: found 'studdy'; allowed: basic|study (did you mean 'study'?)"),
        ("evaluate: {threshold: 1.1}", "evaluate.threshold: found 1.1; allowed: number >= 0, <= 1"),
        ("experiment: {thresholds: [0.5, -1]}", "experiment.thresholds.1: found -1; allowed: number >= 0, <= 1"),
        ("routing: {target: 1.5}", "routing.target: found 1.5; allowed: number >= 0, <= 1"),
        ("routing: {target: .nan}", "routing.target: found nan; allowed: number"),
        ("train: {steps: 0}", "train.steps: found 0; allowed: integer > 0 or null"),
        ("train: {steps: 1.5}", "train.steps: found 1.5; allowed: integer > 0 or null"),
        ("train: {steps: true}", "train.steps: found true; allowed: integer > 0 or null"),
        ("train: {steps: '5'}", "train.steps: found '5'; allowed: integer > 0 or null"),
        ("train: {steps: [1, 2]}", "train.steps: found [1, 2]; allowed: integer > 0 or null"),
        ("train: {optimizer: {learning_rate: .inf}}", "learning_rate: found inf; allowed: number > 0"),
        ("train: 5", "train: found 5; allowed: section"),
        ("train: null", "train: found null; allowed: section"),
        ("lora: true", "lora: found true; allowed: section or null"),
        (
            "lora: {targets: [query, kye]}",
            "lora.targets.1: found 'kye'; allowed: query|key|value|output|gate|up|down (did",
        ),
        ("lora: {targets: query}", "lora.targets: found 'query'; allowed: list of query|key|"),
        ("output: 5", "output: found 5; allowed: text"),
        ("routing: {eviction: 1}", "routing.eviction: found 1; allowed: true|false"),
        ("quantize: {bits: 5}", "quantize.bits: found 5; allowed: 2|3|4|8|16"),
        ("experiment: {methods: {x: 3}}", "experiment.methods.x: found 3; allowed: mapping"),
        ("experiment: {seeds: [-1]}", "experiment.seeds.0: found -1; allowed: integer >= 0"),
        ("experiment: {methods: {3: {}}}", "experiment.methods.3: found a key that is no text; allowed: text"),
        ("1: {a: 2}", "1: found a key that is no text; allowed: text"),
    ],
)
def test_bad_keys_and_values_name_place_found_and_allowed(load, tmp_path, text, message):
    refused = refusal(load, text)
    assert message in refused
    assert refused.startswith(f"{tmp_path / 'experiment.yaml'}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize: {bits: 16}", "quantize: bits=16 does not go with method='rtn'"),
        ("quantize: {method: none}", "quantize: bits=4 does not go with method='none'"),
        ("quantize: {group_size: 0}", "quantize.group_size: found 0; allowed: a positive number of inputs, or -1"),
        (
            "quantize: {group_size: 48}",
            "=48 does not divide the 64 inputs of a linear; allowed: quantize.group_size=32, or",
        ),
        (
            "experiment: {quantizers: [{bits: 4, group_size: 7}]}",
            "experiment.quantizers.0.group_size=7 does not divide the 64 inputs of a linear; allowed: "
            "experiment.quantizers.0.group_size=8, or experiment.quantizers.0.group_size=-1 (one group)",
        ),
        ("train: {quantization_aware: {formats: [{bits: 2, group_size: 96}]}}", "formats.0.group_size=96 does not"),
        ("routing: {always_on_layers: 10}", "always_on_layers=10 leaves no routed layer of 10; allowed: 0 to 9"),
        ("routing: {method: dllm, entropy_weight: 0.3}", "'dllm' has no entropy term, found entropy_weight=0.3"),
        ("routing: {entropy_weight: 0}", "method 'qtale' needs entropy_weight > 0"),
        ("routing: {target_range: [0.9, 0.3]}", "target_range has to rise, found [0.9, 0.3]"),
        (
            "routing: {method: mod, target_range: [0.3, 0.9]}",
            "target_range does not go with method='mod'; allowed: dllm or qtale",
        ),
        ("routing: {method: random, target_range: [0.3, 0.9]}", "does not go with method='random'"),
        ("train: {microbatches: 3}", "train.microbatches=3 does not divide train.batch_size=64"),
        ("mesh: {data: 3, fsdp: 2}", "mesh.data=3 times mesh.fsdp=2 does not divide the 64 rows"),
        ("mesh: {data: 0}", "mesh: axis sizes are positive or -1"),
        ("mesh: {fsdp: -1}", "mesh: only one axis can be -1"),
        ("routing: {method: dense}\ntrain: {parameters: routers}", "train.parameters='routers' does not go with"),
        ("routing: {method: dense}\nlora: null", "leaves nothing to train"),
        (
            "routing: {method: dense}\ntrain: {skipped_share: 0.25}",
            "train.skipped_share=0.25 does not go with routing.method='dense', which has no routers that learn; "
            "allowed: dllm, qtale or mod, or train.skipped_share=null",
        ),
        ("routing: {method: random}\ntrain: {skipped_share: 1}", "does not go with routing.method='random'"),
        (
            "routing: {eviction: false}\ntrain: {skipped_share: 0.25}",
            "train.skipped_share=0.25 does not go with routing.eviction=false, where every token's keys and values",
        ),
        ("train: {skipped_share: 0}", "train.skipped_share: found 0; allowed: number > 0, <= 1 or null"),
        ("train: {distillation: {weight: 2}}", "train.distillation.weight=2 needs a dense model"),
        (
            "model: {architecture: {rope_scaling: {kind: linear, original_length: 64}}}",
            "original_length would do nothing with kind='linear'; allowed: kind=llama3 with it",
        ),
        ("model: {architecture: {num_heads: 3}}", "num_heads=3 does not divide hidden_size=64"),
        ("model: {architecture: {num_kv_heads: 3}}", "num_kv_heads=3 does not divide num_heads=4"),
        ("calibrate: {objective: budget}", "calibrate.objective='budget' needs the speed that is asked for; allowed: "),
        (
            "budget: {tokens_per_second: 5}",
            "budget.tokens_per_second=5 would do nothing with calibrate.objective='ratio'",
        ),
        (
            "budget: {tokens_per_second: 5, milliseconds_per_token: 2}\ncalibrate: {objective: budget}",
            "budget: tokens_per_second and milliseconds_per_token are both given; allowed: one of them",
        ),
        ("data: {length: 1024}", "data.length=1024 is longer than the context; allowed: up to model.architecture.max_"),
        ("data: {kind: text}", "data: kind='text' needs path"),
        ("experiment: {seeds: []}", "experiment: seeds is empty"),
        ("experiment: {seeds: [1, 1]}", "experiment: seeds has an entry twice"),
        ("experiment: {quantizers: [{bits: 4}, {bits: 4}]}", "experiment: quantizers has an entry twice"),
        (
            "experiment: {quantizers: [{bits: 3}, {bits: 4}, {bits: 4, symmetric: true}]}",
            "experiment: quantizers.1 and quantizers.2 are both shown as rtn at 4 bits, group size -1; allowed: ",
        ),
        (
            "experiment: {ratios: [0.5, 0.6, 0.604]}",
            "experiment: ratios 0.6 and 0.604 are both shown as 0.60; allowed: one of them",
        ),
        (
            "experiment: {points: {qtale: {thresholds: [0.1, 0.101]}}}",
            "experiment.points.qtale: thresholds 0.1 and 0.101 are both shown as 0.10; allowed: one of them",
        ),
        ("data: {kind: text, path: a, separator: ''}", "data.separator"),
        ("experiment: {quantizers: [{bits: 4, model: x}]}", "quantizers name model or output"),
        ("experiment: {methods: {a/b: {}}}", "experiment.methods: found the name 'a/b'"),
        (
            "experiment: {base: {}}\nmodel: {path: x}",
            "experiment.base trains from nothing, but model.path='x' is given",
        ),
    ],
)
def test_combinations_that_cannot_work(load, tmp_path, text, message):
    refused = refusal(load, text)
    assert message in refused
    assert refused.startswith(f"{tmp_path / 'experiment.yaml'}: ")


def test_the_command_line_is_named_when_it_is_at_fault(load):
    assert refusal(load, "seed: 0\n", "train.steps=0").startswith("command line: train.steps: found 0; allowed: ")
    assert refusal(load, "seed: 0\n", "train={stps: 3}").startswith("command line: train.stps: unknown key")
    assert refusal(load, "train: {steps: 0}\n", "train.epochs=2").count("experiment.yaml: train.steps") == 1


def test_further_problems_are_counted(load):
    assert refusal(load, "train: {steps: 0, epochs: -1}\nsed: 1").endswith("(and 2 more)")


def test_long_values_are_cut(load):
    assert len(refusal(load, f"seed: {'x' * 500}")) < 250


@pytest.mark.parametrize("inherited", ["", "entropy_weight: 0.7", "method: qtale, entropy_weight: 0.7"])
def test_switching_to_dllm_drops_the_inherited_entropy_weight(load, tmp_path, inherited):
    text = f"routing: {{{inherited}}}\n"
    switched = load(text, "routing.method=dllm")
    assert switched.routing.method == "dllm"
    assert switched.routing.effective_entropy_weight == 0.0
    assert with_overrides(load(text), {"routing": {"method": "dllm"}}).routing.effective_entropy_weight == 0.0
    (tmp_path / "parent.yaml").write_text(text)
    assert load("extends: parent.yaml\nrouting: {method: dllm}\n").routing.effective_entropy_weight == 0.0


def test_switching_back_to_qtale_restores_the_default(load):
    config = with_overrides(load("routing: {method: dllm, entropy_weight: 0}\n"), {"routing": {"method": "qtale"}})
    assert config.routing.entropy_weight == RoutingConfig().entropy_weight


def test_methods_without_routers_that_learn_drop_an_inherited_skipped_share(load):
    config = load("train: {skipped_share: 0.25}\nexperiment: {base: {}, methods: {dense: {}, qtale: {}, random: {}}}\n")
    shares = {name: method_config(config, name).train.skipped_share for name in config.experiment.methods}
    assert shares == {"dense": None, "qtale": 0.25, "random": None}
    assert base_config(config).train.skipped_share is None
    assert load("train: {skipped_share: 0.25}\n", "routing.method=dense").train.skipped_share is None
    with pytest.raises(InputError, match="train.skipped_share=0.5 does not go with routing.method='dense'"):
        with_overrides(config, {"routing": {"method": "dense"}, "train": {"skipped_share": 0.5}})


def test_asking_for_dllm_with_an_entropy_weight_is_refused(load):
    assert "no entropy term" in refusal(load, "seed: 0\n", "routing.method=dllm", "routing.entropy_weight=0.3")
    with pytest.raises(InputError, match="no entropy term"):
        with_overrides(load(), {"routing": {"method": "dllm", "entropy_weight": 0.3}})


def test_overrides_leave_the_original_alone_and_take_lists_too(load):
    config = load("train: {steps: 10}\n")
    assert with_overrides(config, {"train": {"epochs": 2.0}}).train.steps == 10
    assert with_overrides(config, ["train.steps=3", "lora.rank=2"]).train.steps == 3
    assert config.train.steps == 10
    with pytest.raises(InputError, match=r"^stage: train\.stps: unknown key"):
        with_overrides(config, {"train": {"stps": 3}}, source="stage")


def test_methods_are_checked_when_the_file_is_loaded(load):
    grid = "experiment: {methods: {dense: {}, mine: {routing: {rate_wieght: 3}}}}\n"
    assert "experiment.methods.mine: routing.rate_wieght: unknown key (did you mean 'rate_weight'?)" in refusal(
        load, grid
    )
    assert "experiment.methods.dllm.seed" not in refusal(load, "seed: 0\n", "experiment.methods.dllm.seed=3")
    assert "experiment.methods.dllm: found 'seed', which belongs to the whole experiment" in refusal(
        load, "seed: 0\n", "experiment.methods.dllm.seed=3"
    )
    assert "experiment.base: train.steps: found 0" in refusal(load, "experiment: {base: {train: {steps: 0}}}\n")


def test_a_methods_name_sets_the_routing_method(load):
    config = load(
        "experiment: {methods: {dllm: {}, qtale: {}, wide: {routing: {router_hidden: 64}}, dense: {lora: {rank: 2}}, "
        "mod: {}, random: {}}}"
    )
    methods = {name: method_config(config, name).routing.method for name in config.experiment.methods}
    expected = {name: name for name in ("dllm", "qtale", "dense", "mod", "random")}
    assert methods == expected | {"wide": "qtale"}
    named = load("experiment: {methods: {dllm: {routing: {method: qtale}}}}")
    assert method_config(named, "dllm").routing.method == "qtale"


def test_the_base_is_dense_and_trains_everything_unless_told_otherwise(load):
    config = load(
        "train: {steps: 7, distillation: {weight: 2.0}}\n"
        "experiment: {base: {train: {steps: 9}}, methods: {qtale: {}}}\n"
    )
    base = base_config(config)
    assert (base.routing.method, base.lora, base.train.parameters, base.train.steps) == ("dense", None, "all", 9)
    assert base.train.distillation.weight == 0.0
    method = method_config(config, "qtale", base="runs/x/base")
    assert (method.model.path, method.train.steps, method.train.distillation.weight) == ("runs/x/base", 7, 2.0)
    assert method.experiment.base is None


def test_a_target_range_survives_being_written(load):
    config = load("routing: {target_range: [0.35, 1]}\n")
    assert config.routing.target_range == (0.35, 1.0)
    assert load(yaml.safe_dump(resolve(config))).routing.target_range == (0.35, 1.0)


def test_the_base_neither_quantizes_nor_drops_what_its_methods_do(load):
    config = load(
        "train: {quantization_aware: {formats: [{bits: 3}]}}\nexperiment: {base: {}, methods: {qtale: {}, dense: "
        "{routing: {method: dense}, model: {drop: {keep: 0.5}}}}}\n"
    )
    assert base_config(config).train.quantization_aware.formats == () and base_config(config).model.drop.keep == 1.0
    assert method_config(config, "dense", base="runs/x").model.drop.keep == 0.5
    assert [format.bits for format in method_config(config, "qtale").train.quantization_aware.formats] == [3]


def test_setting_one_method_on_the_command_line_keeps_the_others(load):
    config = load("seed: 0\n", "experiment.methods.dllm.routing.target=0.6", "experiment.quantizers.0.symmetric=true")
    assert set(config.experiment.methods) == {"dense", "dllm", "qtale"}
    assert method_config(config, "dllm").routing.target == 0.6
    assert config.experiment.quantizers[0].symmetric


def test_a_run_without_a_grid_need_not_suit_every_method(load):
    shallow = "model: {architecture: {num_layers: 2}}\nrouting: {method: dense}\ntrain: {parameters: all}\n"
    assert load(shallow).routing.method == "dense"


def test_resolving_is_complete_and_loads_again(load, tmp_path):
    config = load("routing: {method: dllm}\nexperiment: {methods: {qtale: {train: {steps: 3}}}}\n", "lora=null")
    values = resolve(config)
    assert set(values) == set(Config.model_fields)
    assert set(values["train"]) == set(type(config.train).model_fields)
    assert values["routing"]["entropy_weight"] == 0.0
    again = load(yaml.safe_dump(values))
    assert resolve(again) == values


@settings(max_examples=20)
@given(
    method=st.sampled_from(["dense", "dllm", "qtale"]),
    rate=st.floats(0, 1),
    learning_rate=st.floats(1e-9, 10),
    steps=st.none() | st.integers(1, 10**9),
    targets=st.lists(st.sampled_from(["query", "gate"]), max_size=3),
    title=st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), max_size=20),
)
def test_any_configuration_survives_yaml(tmp_path_factory, method, rate, learning_rate, steps, targets, title):
    config = with_overrides(
        Config(),
        {
            "routing": {"method": method, "target": rate},
            "train": {"steps": steps, "optimizer": {"learning_rate": learning_rate}},
            "lora": {"targets": targets},
            "experiment": {"title": title},
        },
    )
    path = tmp_path_factory.getbasetemp() / "survives.yaml"
    path.write_text(yaml.safe_dump(resolve(config), allow_unicode=True), encoding="utf-8")
    assert resolve(load_config(path)) == resolve(config)
