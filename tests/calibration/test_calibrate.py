import jax
import pytest

from qtale_jax.artifact import LoadedModel, load_model, save_model
from qtale_jax.calibration.calibrate import calibrate
from qtale_jax.config.schema import Config, QuantizeConfig
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.evaluation.evaluate import default_point
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification
from qtale_jax.quantization.pipeline import quantize_parameters

ARCHITECTURE = Architecture(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_length=32,
)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """A routed model at 4 bits that already has a threshold for 16 bits."""
    routing = RoutingSpecification(
        method="qtale", always_on_layers=1, router_hidden=8, thresholds={"16": (0.5, 0.5, 0.5)}
    )
    spec = ModelSpecification(architecture=ARCHITECTURE, routing=routing)
    spec, params, _ = quantize_parameters(spec, initialize(spec, jax.random.key(1)), QuantizeConfig(bits=4))
    return LoadedModel(spec, params, reasoning.tokenizer(), {"seed": 0})


@pytest.fixture
def config(tmp_path):
    """Builds a configuration over sixty lines of words, half of which are for calibration."""
    words = list(reasoning.WORDS)
    file = tmp_path / "text.txt"
    file.write_text("<|endoftext|>".join(" ".join(words[(7 * i) % 40 :][:20]) for i in range(60)))

    def build(**calibrate) -> Config:
        return Config.model_validate(
            {
                "data": {"kind": "text", "path": str(file), "held_out": 0.4, "length": 24},
                "evaluate": {"batch_size": 24},
                "calibrate": {"examples": 24, **calibrate},
            }
        )

    return build


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_the_asked_ratio_is_executed_and_theta_stored_for_these_bits(model, config, tmp_path, ratio):
    found_model, found = calibrate(model, config(ratio=ratio, tolerance=0.01))
    assert found.ratio == pytest.approx(ratio, abs=0.01)
    routing = found_model.spec.routing
    assert routing.thresholds == {"16": (0.5,) * 3, "4": (found.theta,) * 3}
    assert found_model.spec.thresholds == (found.theta,) * 3
    note = routing.calibration["4"]
    assert (note["objective"], note["ratio"], note["reached"]) == ("ratio", ratio, found.ratio)
    assert note["examples"] == 24 and note["data"]["split"] == "calibration"
    assert default_point(found_model.spec, None) == f"ratio {ratio:.2f}"
    assert found_model.params is model.params and "4" not in model.spec.routing.thresholds
    save_model(tmp_path / "saved", found_model.spec, found_model.params)
    assert load_model(tmp_path / "saved").spec == found_model.spec


def test_quality_lets_more_be_lost_for_less_execution(model, config):
    strict, _ = calibrate(model, config(objective="quality", within=0.0))
    loose, found = calibrate(model, config(objective="quality", within=100.0))
    assert loose.spec.thresholds >= strict.spec.thresholds
    assert found.ratio == min(ratio for _, ratio in found.path)
    assert loose.spec.routing.calibration["4"]["objective"] == "quality"


def test_what_cannot_be_calibrated_is_refused(model, config):
    dense = ModelSpecification(architecture=ARCHITECTURE)
    with pytest.raises(InputError, match="a dense model has no threshold"):
        calibrate(LoadedModel(dense, {}, model.tokenizer, {}), config())
    with pytest.raises(InputError, match="has no tokenizer"):
        calibrate(LoadedModel(model.spec, model.params, None, {}), config())
    with pytest.raises(InputError, match="calibrate.examples=25, but the calibration split has only 24 rows"):
        calibrate(model, config(examples=25))
