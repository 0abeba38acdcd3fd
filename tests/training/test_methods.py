"""Every way of training, for a few steps: what it logs, writes and starts from."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from qtale_jax.artifact import load_model
from qtale_jax.calibration.calibrate import calibrate
from qtale_jax.config.schema import Config
from qtale_jax.evaluation.evaluate import evaluate
from qtale_jax.training.loop import train

pytestmark = pytest.mark.slow

MIXED = {"formats": [{"bits": 4}, {"bits": 2, "group_size": 8}], "every": 2}
RECIPE = {"target_range": [0.4, 1.0], "rate_loss": "batch", "entropy_schedule": "anneal", "noise_schedule": "anneal"}
METHODS = {
    "mod": {"routing": {"method": "mod", "rate_schedule": "constant"}},
    "random": {"routing": {"method": "random"}},
    "qtale": {"routing": RECIPE, "train": {"quantization_aware": MIXED, "distillation": {"weight": 1.0}}},
    "noise": {"train": {"quantization_aware": MIXED | {"form": "noise"}}},
    "drop": {"routing": {"method": "dense"}, "model": {"drop": {"keep": 0.67, "examples": 4}}},
}


def finish(make_config, folder: Path, name: str, **sections) -> tuple[Path, list[dict], Config]:
    config = make_config(lora=None, **sections).model_copy(update={"output": str(folder / name)})
    path = train(config, quiet=True)
    return path, [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()], config


@pytest.fixture(scope="module")
def parent(tmp_path_factory, make_config) -> Path:
    """A dense model of three layers."""
    routing = {"method": "dense"}
    return finish(make_config, tmp_path_factory.mktemp("parent"), "base", routing=routing, train={"steps": 1})[0]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory, make_config, parent):
    """Fine-tunes the parent once per method."""
    done = {}

    def of(name: str):
        if name not in done:
            sections = {"model": {}, **METHODS[name]}
            sections["model"] = {**sections["model"], "path": str(parent)}
            done[name] = finish(make_config, tmp_path_factory.mktemp(name), name, **sections)
        return done[name]

    return of


def measured(path: Path, config: Config, theta: float | None = None) -> dict:
    settings = {"batch_size": 16, "max_examples": 4, "perplexity": True, "maps": 1, "threshold": theta}
    changed = Config.model_validate(config.model_dump(exclude_unset=True) | {"evaluate": settings})
    return evaluate(load_model(path), changed)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.exhaustive if n == "noise" else ()) for n in METHODS]
)
def test_training_is_finite_and_leaves_a_whole_model(fine_tuned, name):
    path, rows, _ = fine_tuned(name)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) and np.isfinite(row["gradient_norm"]) for row in rows)
    assert rows[-1]["validation"] is not None
    model = load_model(path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))
    assert (model.spec.routing.method if model.spec.routing else "drop") == {"noise": "qtale"}.get(name, name)


@pytest.mark.parametrize("name", ["mod", "random", "qtale"])
def test_theta_is_found_for_an_asked_share(fine_tuned, name):
    """To the nearest share that the few rows of this data allow."""
    path, _, config = fine_tuned(name)
    model = load_model(path)
    asked = {"examples": 8, "ratio": 0.7, "tolerance": 0.03}
    changed = Config.model_validate(config.model_dump(exclude_unset=True) | {"calibrate": asked})
    calibrated, found = calibrate(model, changed)
    assert calibrated.spec.thresholds == (found.theta,) * 2
    shares = [ratio for _, ratio in sorted(found.path)]
    assert shares[0] == 1.0 and shares[-1] < 0.7
    assert found.ratio == pytest.approx(0.7, abs=0.12)
    assert found.ratio == min(shares, key=lambda ratio: abs(ratio - 0.7))


def test_mixture_of_depths_executes_its_share_and_learns_the_choice(fine_tuned):
    _, rows, config = fine_tuned("mod")
    for row in rows:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + config.routing.rate_weight * row["choice_loss"])
        # (0.5 * 3 - 1) / 2 of the two routed layers; the rounding is that of rows of few tokens
        np.testing.assert_allclose(row["executed_per_layer"], 0.25, atol=0.1)
        assert row["executed_per_layer"][0] == row["executed_per_layer"][1]
    assert "rate_loss" not in rows[0] and "entropy_loss" not in rows[0]
    assert rows[-1]["choice_loss"] < rows[0]["choice_loss"]


def test_random_routing_has_no_routing_loss_and_trains_at_its_share(fine_tuned):
    path, rows, config = fine_tuned("random")
    assert all(row["loss"] == row["cross_entropy"] and row["flip_rate"] == 0 for row in rows)
    assert np.mean([row["executed_per_layer"] for row in rows]) == pytest.approx(0.25, abs=0.12)
    assert measured(path, config, 0.0)["row"]["executed_ratio"] == 1.0
    # theta = 1 - R of the routed layers, with the always-on layer and first token on top
    assert load_model(path).spec.thresholds == pytest.approx((0.75,) * 2)
    found = measured(path, config)["executed_per_layer"]
    assert found[0] == 1.0 and np.mean(found[1:]) == pytest.approx(0.25 + 0.1, abs=0.2)


def test_a_range_of_targets_is_aimed_at_in_turn(fine_tuned):
    _, rows, _ = fine_tuned("qtale")
    targets = [row["target"] for row in rows]
    assert targets[0] == targets[3] == pytest.approx(1.0) and targets[1] == pytest.approx(0.4)
    assert 0.4 < targets[2] < 1.0
    assert rows[0]["executed_ratio"] > 0.95 and rows[1]["executed_ratio"] < 0.9  # theta moves along
    assert all(row["distillation"] >= 0 for row in rows)


def test_a_target_is_logged_as_it_is_in_microbatches_too(trainer, batch):
    two_layers = {"architecture": {"num_layers": 2}}
    run = trainer(model=two_layers, routing={"target_range": [0.4, 0.9]}, train={"microbatches": 2})
    assert run.advance(batch)["target"] == pytest.approx(0.9, rel=1e-5)


def test_a_model_without_layers_counts_as_a_share_of_the_whole(fine_tuned, parent):
    path, _, config = fine_tuned("drop")
    spec = load_model(path).spec
    assert spec.architecture.num_layers == 2 and len(spec.dropped_layers) == 1 and spec.dropped_layers[0] > 0
    assert spec.routing is None and spec.kept_share == pytest.approx(2 / 3)
    row, whole = measured(path, config)["row"], measured(parent, config)["row"]
    assert row["executed_ratio"] == pytest.approx(2 / 3) and whole["executed_ratio"] == 1.0
    assert row["theta"] is None and row["flops_per_token"] < whole["flops_per_token"]
    assert measured(path, config, 0.3)["row"] == row  # a dense model has no threshold


def test_a_routed_model_of_fewer_layers_executes_a_share_of_the_share(fine_tuned, make_config, tmp_path):
    path, _, _ = fine_tuned("drop")
    model = load_model(path)
    routed, _, config = finish(make_config, tmp_path, "routed", model={"path": str(path)}, train={"steps": 1})
    spec = load_model(routed).spec
    assert spec.dropped_layers == model.spec.dropped_layers and spec.routing.method == "qtale"
    found = measured(routed, config, 1.0)
    per_layer = np.mean(found["executed_per_layer"])
    assert found["row"]["executed_ratio"] == pytest.approx(per_layer * 2 / 3)
    assert found["row"]["theta"] == 1.0 and found["point"] == "threshold 1.00"


def test_random_routing_continues_from_what_has_no_routers(fine_tuned, make_config, tmp_path):
    """Routers are added to a model that was routed at random: it has none to keep."""
    path, _, _ = fine_tuned("random")
    learned, _, _ = finish(make_config, tmp_path, "learned", model={"path": str(path)}, train={"steps": 1})
    model = load_model(learned)
    assert model.spec.routing.router == "learned" and "router" in model.params["layers"][1]
