import json
import math

import jax
import numpy as np
import pytest

from qtale_jax.artifact import LoadedModel, weight_bytes
from qtale_jax.config.schema import Config, QuantizeConfig
from qtale_jax.data import reasoning
from qtale_jax.data.sources import Choice, Document
from qtale_jax.data.tokens import encode
from qtale_jax.evaluation.evaluate import (
    choice_rows,
    cost,
    default_point,
    evaluate,
    likelihood_rows,
    nats_per_token,
    per_task,
    routing_summary,
    score_choices,
)
from qtale_jax.evaluation.likelihood import Counted, Likelihoods, likelihoods
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.cost import layer_flops, router_flops
from qtale_jax.models.decoder import initialize
from qtale_jax.quantization.pipeline import quantize_parameters
from qtale_jax.reporting.results import RESULT_KEYS, read_evaluation

pytestmark = pytest.mark.slow

NOTHING = Counted(*(np.zeros(()) for _ in range(9)))


def found(values, tokens) -> Likelihoods:
    return Likelihoods(np.asarray(values, float), np.asarray(tokens), np.zeros(len(values), bool), NOTHING)


def test_choices_become_one_row_each(choices):
    examples, _ = choices
    tokenizer = reasoning.tokenizer()
    rows, owners = choice_rows(examples, tokenizer)
    assert owners.tolist() == [i for i, example in enumerate(examples) for _ in example.choices]
    for row, (query, choice) in zip(rows, [(e.query, c) for e in examples for c in e.choices], strict=True):
        assert list(row.ids) == encode(tokenizer, [f"{query} {choice}"])[0]
        assert list(row.ids[: row.start]) == encode(tokenizer, [query])[0]


QUESTIONS = [Choice("a", "q", ("x", "y"), 0), Choice("a", "q", ("x", "y"), 1), Choice("b", "q", ("x", "y", "z"), 2)]
OWNERS = np.array([0, 0, 1, 1, 2, 2, 2])


def test_scores_are_sums_or_means_over_tokens():
    # The second choice of question 0 has the lower sum, but the higher mean.
    scored = found([-4, -5, -3, -2, -1, -1, -1], [1, 5, 1, 1, 1, 1, 1])
    plain = score_choices(QUESTIONS, OWNERS, scored, normalize=False)
    assert plain.tasks == {"a": 1.0, "b": 0.0}  # a tie goes to the first choice
    normalized = score_choices(QUESTIONS, OWNERS, scored, normalize=True)
    assert normalized.tasks == {"a": 0.5, "b": 0.0}
    assert (plain.mean, normalized.mean) == (0.5, 0.25)


def test_the_mean_is_over_tasks_and_so_is_its_error():
    accuracy = score_choices(QUESTIONS, OWNERS, found([-4, -5, -2, -3, -3, -2, -1], [1] * 7), normalize=False)
    assert accuracy.tasks == {"a": 0.5, "b": 1.0} and accuracy.mean == 0.75
    assert accuracy.standard_error == pytest.approx(math.sqrt(0.25 / 2) / 2)


def test_nats_and_their_error_against_a_simulation():
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 40, (4000, 50))
    level = draw.normal(1.5, 0.3, (4000, 50))
    nats = tokens * level
    means = nats.sum(1) / tokens.sum(1)
    errors = []
    for index in range(4000):
        mean, error = nats_per_token(found(-nats[index], tokens[index]))
        assert mean == pytest.approx(means[index])
        errors.append(error)
    # The ratio estimator's standard error is the spread of the ratio over repeated samples of rows.
    assert np.mean(errors) == pytest.approx(means.std(), rel=0.05)


def test_error_of_equal_lengths_is_the_ordinary_one():
    nats = np.array([1.0, 2.0, 4.0, 3.5])
    mean, error = nats_per_token(found(-nats * 10, [10] * 4))
    assert mean == pytest.approx(nats.mean()) and error == pytest.approx(nats.std(ddof=1) / 2)
    assert nats_per_token(found([-3.0], [2])) == (1.5, None)


def test_the_first_records_of_every_task():
    assert per_task(QUESTIONS, 1) == [QUESTIONS[0], QUESTIONS[2]]
    assert per_task(QUESTIONS, None) == QUESTIONS
    assert len(per_task([Document("a"), Document("b")], 1)) == 1


def test_flip_rate_is_the_mean_chance_that_noise_flips(routed, rows):
    spec, params = routed
    counted = likelihoods(spec, params, rows, inference_policy(spec), batch_size=4).counted
    summary = routing_summary(counted)
    assert 0 < summary["flip_rate"] < 0.5
    assert summary["flip_rate"] == pytest.approx(float(counted.flips) / float(counted.decisions))
    assert sum(summary["gap_histogram"]["counts"]) == counted.decisions
    # Against Gumbel noise itself: by Jensen the rate is at least that of the mean gap.
    assert summary["flip_rate"] >= 1 / (1 + math.exp(summary["logit_gap_mean"])) - 1e-6


def test_sigmoid_of_the_gap_is_the_chance_that_gumbel_noise_flips():
    gap, count = 1.3, 200_000
    noise = np.random.default_rng(1).gumbel(size=(2, count))
    flipped = np.mean(gap + noise[1] < noise[0])
    assert flipped == pytest.approx(1 / (1 + math.exp(gap)), abs=4e-3)


def test_cost_follows_from_what_was_executed(routed):
    spec, _ = routed
    counted = Counted(
        np.float32(10), np.array([10.0, 5, 0]), np.array([55.0, 15, 0]), *(np.zeros(()) for _ in range(6))
    )
    found = cost(spec, counted)
    assert found["executed_per_layer"] == [1.0, 0.5, 0.0]
    expected = layer_flops(spec, 5.5) + 0.5 * layer_flops(spec, 3.0) + 2 * 16 * 64 + 2 * router_flops(spec)
    assert found["flops_per_token"] == pytest.approx(expected)


def config(path: str, **evaluate) -> Config:
    return Config.model_validate(
        {
            "data": {"kind": "multiple_choice", "path": path, "evaluation_path": path, "length": 40},
            "evaluate": {"batch_size": 16, **evaluate},
        }
    )


def test_an_evaluation_is_what_reports_read(loaded, choices, tmp_path):
    examples, path = choices
    result = evaluate(loaded, config(path))
    row = result["row"]
    assert (
        tuple(row)
        == RESULT_KEYS
        == (
            "model",
            "routing",
            "quantizer",
            "bits",
            "group_size",
            "theta",
            "executed_ratio",
            "accuracy",
            "standard_error",
            "nats_per_token",
            "weight_bytes",
            "flops_per_token",
            "seed",
        )
    )
    assert (row["model"], row["routing"], row["quantizer"], row["bits"], row["seed"]) == (
        "qtale",
        "qtale",
        "none",
        16,
        7,
    )
    assert row["theta"] == pytest.approx(0.85) and 0 < row["executed_ratio"] < 1
    assert row["weight_bytes"] == weight_bytes(loaded.params)["total"] == sum(result["bytes"].values())
    assert set(row["accuracy"]) == {"count", "rank", "mean"}
    assert np.mean(result["executed_per_layer"]) == pytest.approx(row["executed_ratio"])
    assert 0 < result["executed_ratio_scored"] < 1
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(result, allow_nan=False))
    read = read_evaluation(file)
    assert read.row.model_dump() == row and read.point == "threshold 0.85"
    assert [one.task for one in read.maps] == ["count", "rank"] and read.flip_rate == result["flip_rate"]
    for one, example in zip(read.maps, (examples[0], examples[6]), strict=True):
        assert " ".join(one.tokens[1:]).startswith(example.query[:10])


def test_theta_may_be_given(loaded, choices):
    everything = evaluate(loaded, config(choices[1], max_examples=2), theta=0.0, point="full")
    assert everything["row"]["executed_ratio"] == 1.0 and everything["row"]["theta"] == 0.0
    assert everything["point"] == "full" and default_point(loaded.spec, 0.25) == "threshold 0.25"


def test_theta_of_the_configuration_is_for_routed_models_and_gives_way_to_the_argument(loaded, choices):
    settings = config(choices[1], max_examples=2, threshold=1.0, perplexity=False, maps=0)
    one = evaluate(loaded, settings)
    assert one["row"]["theta"] == 1.0 and one["point"] == "threshold 1.00" and one["row"]["executed_ratio"] < 0.5
    assert evaluate(loaded, settings, theta=0.0)["row"]["executed_ratio"] == 1.0


def test_dropped_layers_are_layers_that_no_token_executes(loaded, choices):
    """The ratio counts the whole model: three of six layers are left, and theta 0 executes all of those."""
    dropped = loaded.spec.model_copy(update={"dropped_layers": (2, 4, 5)})
    model = LoadedModel(dropped, loaded.params, loaded.tokenizer, {})
    settings = config(choices[1], max_examples=2, perplexity=False, maps=0)
    assert evaluate(model, settings, theta=0.0)["row"]["executed_ratio"] == pytest.approx(0.5)
    whole, part = (evaluate(one, settings)["row"]["executed_ratio"] for one in (loaded, model))
    assert part == pytest.approx(whole / 2)


def test_a_quantized_dense_model(loaded, choices, tmp_path):
    spec = loaded.spec.model_copy(update={"routing": None})
    params = initialize(spec, jax.random.key(0))
    spec, params, _ = quantize_parameters(spec, params, QuantizeConfig(bits=3, group_size=8))
    result = evaluate(
        LoadedModel(spec, params, loaded.tokenizer, {}), config(choices[1], name="base", perplexity=False)
    )
    row = result["row"]
    assert (row["model"], row["routing"], row["quantizer"], row["bits"], row["group_size"]) == (
        "base",
        "dense",
        "rtn",
        3,
        8,
    )
    assert row["theta"] is row["nats_per_token"] is None and row["executed_ratio"] == 1.0 and row["seed"] == 0
    assert result["maps"] == [] and result["gap_histogram"] is None
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(result, allow_nan=False))
    assert read_evaluation(file).row.bits == 3


def test_text_is_measured_in_nats_per_token(loaded, tmp_path):
    words = list(reasoning.WORDS)
    file = tmp_path / "text.txt"
    file.write_text("<|endoftext|>".join(" ".join(words[i : i + 9]) for i in range(12)))
    data = {"kind": "text", "path": str(file), "held_out": 0.4, "length": 24}
    settings = Config.model_validate({"data": data, "evaluate": {"batch_size": 16}})
    row = evaluate(loaded, settings)["row"]
    assert row["accuracy"] is None and row["standard_error"] > 0
    assert row["nats_per_token"] == pytest.approx(math.log(64), rel=0.25)  # an untrained model knows nothing
    one = evaluate(loaded, settings.model_copy(update={"data": settings.data.model_copy(update={"held_out": 0.17})}))
    assert one["row"]["standard_error"] is None and len(one["maps"]) == 1


def test_half_precision_changes_little(loaded, choices):
    settings = config(choices[1])
    half = settings.model_copy(update={"train": settings.train.model_copy(update={"compute_dtype": "bfloat16"})})
    nats = [evaluate(loaded, s, theta=0.0)["row"]["nats_per_token"] for s in (settings, half)]
    assert nats[0] != nats[1] and nats[0] == pytest.approx(nats[1], rel=0.02)


def test_of_a_continuous_text_all_pieces_are_scored(loaded):
    text = " ".join(list(reasoning.WORDS)[:25])
    settings = Config.model_validate({"data": {"kind": "text", "path": "unused", "length": 8}})
    rows = likelihood_rows([Document(text, continuous=True)], loaded.tokenizer, settings)
    ids = encode(loaded.tokenizer, [text])[0]
    assert [len(row.ids) for row in rows] == [8, 8, 8, 2] and all(row.start == 1 for row in rows)
    assert [token for row in rows for token in row.ids] == ids  # and no end token: the text goes on
    assert len(likelihood_rows([Document(text, continuous=True)], loaded.tokenizer, settings, 2)) == 2
    (whole,) = likelihood_rows([Document(text)], loaded.tokenizer, settings)
    assert list(whole.ids) == ids[:8]
