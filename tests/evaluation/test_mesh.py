"""Models that are sharded over several devices score, execute and calibrate as on one."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.artifact import LoadedModel, load_model, save_model
from qtale_jax.config.schema import Config, MeshConfig, QuantizeConfig
from qtale_jax.errors import InputError
from qtale_jax.evaluation.evaluate import evaluate, layout
from qtale_jax.evaluation.likelihood import Likelihoods, likelihoods
from qtale_jax.evaluation.loading import load_on_mesh
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.placement import layer_shardings, mesh_of
from qtale_jax.parallel.mesh import build_mesh
from qtale_jax.quantization.pipeline import quantize_parameters

SHAPES = ((8, 1, 1), (1, 8, 1), (4, 1, 2))


def mesh_config(shape: tuple[int, int, int]) -> MeshConfig:
    return MeshConfig(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))


def on_mesh(model: LoadedModel, shape: tuple[int, int, int]) -> LoadedModel:
    mesh = build_mesh(mesh_config(shape))
    return dataclasses.replace(model, params=jax.device_put(model.params, layer_shardings(model.spec, mesh)))


def scored(model: LoadedModel, rows, batch_size: int) -> Likelihoods:
    params = layout(model.spec, model.params)
    return likelihoods(model.spec, params, rows, inference_policy(model.spec), batch_size=batch_size)


def assert_same(found: Likelihoods, expected: Likelihoods) -> None:
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, atol=1e-4)
    np.testing.assert_array_equal(found.is_greedy, expected.is_greedy)
    for name in ("tokens", "executed", "decisions", "executed_scored"):
        np.testing.assert_array_equal(getattr(found.counted, name), getattr(expected.counted, name))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.exhaustive) for s in SHAPES)])
def test_scores_and_decisions_are_those_of_one_device(loaded, rows, shape):
    sharded = on_mesh(loaded, shape)
    assert mesh_of(layout(sharded.spec, sharded.params)) is not None
    assert_same(scored(sharded, rows, 8), scored(loaded, rows, 8))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.exhaustive)])
def test_quantized_weights_are_sharded_like_what_they_belong_to(loaded, rows, shape):
    spec, params, _ = quantize_parameters(loaded.spec, loaded.params, QuantizeConfig(bits=4, group_size=8))
    quantized = dataclasses.replace(loaded, spec=spec, params=params)
    assert_same(scored(on_mesh(quantized, shape), rows, 8), scored(quantized, rows, 8))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_batches_that_the_devices_do_not_divide(loaded, rows):
    assert_same(scored(on_mesh(loaded, (8, 1, 1)), rows, 3), scored(loaded, rows, 3))


@pytest.mark.slow
def test_the_stage_reads_straight_into_shards_and_writes_the_same(loaded, choices, tmp_path):
    save_model(tmp_path / "model", loaded.spec, loaded.params, tokenizer=loaded.tokenizer)
    config = Config.model_validate(
        {
            "data": {"kind": "multiple_choice", "path": choices[1], "evaluation_path": choices[1], "length": 40},
            "evaluate": {"batch_size": 8, "maps": 1},
        }
    )
    sharded = load_on_mesh(tmp_path / "model", mesh_config((2, 2, 2)))
    kernel = sharded.params["layers"][0]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4  # fsdp x tensor
    found, expected = evaluate(sharded, config), evaluate(load_model(tmp_path / "model"), config)
    assert found["maps"] and found["row"].keys() == expected["row"].keys()
    for name, value in expected["row"].items():
        if isinstance(value, float) and math.isfinite(value):
            assert found["row"][name] == pytest.approx(value, abs=1e-5), name
        else:
            assert json.dumps(found["row"][name]) == json.dumps(value), name


@pytest.mark.slow
def test_continuations_are_those_of_one_device(loaded, rows):
    pytest.importorskip("lm_eval")
    from qtale_jax.evaluation.harness.generation import Request, continue_requests

    def texts(model: LoadedModel) -> list[str | None]:
        requests = [Request(list(row.ids[:8]), (), 5) for row in rows[:4]]
        policy = inference_policy(model.spec)
        continue_requests(
            model.spec,
            model.params,
            model.tokenizer,
            requests,
            policy,
            ends=(2,),
            batch_size=4,
            compute_dtype=jnp.dtype("float32"),
        )
        return [request.text for request in requests]

    assert texts(on_mesh(loaded, (2, 2, 2))) == texts(loaded)


def test_a_mesh_that_does_not_fit_is_refused(loaded, tmp_path):
    save_model(tmp_path / "model", loaded.spec, loaded.params, tokenizer=loaded.tokenizer)
    with pytest.raises(InputError, match="does not fit 8 devices"):
        load_on_mesh(tmp_path / "model", MeshConfig(data=3))
    assert mesh_of(load_model(tmp_path / "model").params) is None
