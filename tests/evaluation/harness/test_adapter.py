"""The adapter itself, on a small random model: independence from the batch, counts, limits."""

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from qtale_jax.artifact import LoadedModel
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.evaluation import likelihood
from qtale_jax.evaluation.harness.adapter import HarnessModel
from qtale_jax.evaluation.harness.generation import _counted, first_stop, tokens_until, width_class
from qtale_jax.evaluation.likelihood import Row, likelihoods
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.decoder import initialize
from qtale_jax.models.forward import forward
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification

WORDS = list(reasoning.WORDS)


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    """A routed model with a context of 48 tokens, thresholds such that some tokens skip."""
    architecture = Architecture(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=48,
    )
    routing = RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8, thresholds={"16": (0.85, 0.85)})
    spec = ModelSpecification(architecture=architecture, routing=routing)
    return LoadedModel(spec, initialize(spec, jax.random.key(2)), reasoning.tokenizer(), {})


def instance(kind: str, *arguments, task: str = "task") -> Instance:
    return Instance(kind, {}, arguments, 0, (task, 0, 1))


def text(draw: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[i] for i in draw.integers(0, len(WORDS), count))


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Contexts of 0 to 40 words, the longest of which do not fit with their continuations."""
    draw = np.random.default_rng(4)
    lengths = [0, 3, 46, 20, 1, 26, 33, 8, 12, 45]
    return [(text(draw, n), " " + text(draw, int(draw.integers(1, 6)))) for n in lengths]


@pytest.mark.slow
def test_order_and_batch_size_change_no_score(small, pairs):
    asked = [instance("loglikelihood", *pair) for pair in pairs]
    expected = HarnessModel(small, batch_size=4).loglikelihood(asked)
    assert len({round(value, 3) for value, _ in expected}) == len(pairs)
    for batch_size, order in ((1, range(len(pairs))), (4, reversed(range(len(pairs)))), (7, [3, 1, 2, 0])):
        order = list(order)
        found = HarnessModel(small, batch_size=batch_size).loglikelihood([asked[i] for i in order])
        np.testing.assert_allclose([v for v, _ in found], [expected[i][0] for i in order], atol=1e-5, rtol=0)
        assert [greedy for _, greedy in found] == [expected[i][1] for i in order]


@pytest.mark.slow
def test_more_padding_changes_no_score(small, pairs, monkeypatch):
    asked = [instance("loglikelihood", *pair) for pair in pairs]
    expected = HarnessModel(small, batch_size=4).loglikelihood(asked)
    widest = small.spec.architecture.max_length + 1
    shapes = []
    monkeypatch.setattr(likelihood, "padded_length", lambda length: shapes.append(length) or widest)
    found = HarnessModel(small, batch_size=4).loglikelihood(asked)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=1e-5, rtol=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len(shapes) == len(pairs) and min(shapes) <= 16 < widest  # these were padded to 16 before


@pytest.mark.slow
def test_what_does_not_fit_loses_its_beginning_and_is_counted(small, pairs):
    model = HarnessModel(small, batch_size=4)
    found = model.loglikelihood([instance("loglikelihood", *pair) for pair in pairs])
    whole = [model.tokenizer.encode(context + continuation) for context, continuation in pairs]
    assert model.counts["task"].truncated == sum(len(ids) > 49 for ids in whole) > 0
    # The 48 tokens that are read, by hand: the logits at the last positions.
    index = next(i for i, ids in enumerate(whole) if len(ids) > 49)
    ids = np.asarray(whole[index][-49:], np.int32)
    count = len(whole[index]) - len(model.tokenizer.encode(pairs[index][0]))
    output = forward(small.spec, small.params, ids[None, :-1], policy=inference_policy(small.spec))
    log_p = np.asarray(jax.nn.log_softmax(output.logits[0]))[np.arange(48), ids[1:]]
    assert found[index][0] == pytest.approx(log_p[-count:].sum(), abs=1e-4)


@pytest.mark.slow
def test_every_task_is_counted_by_itself(small, pairs):
    tasks = ["a" if index % 3 else "b" for index in range(len(pairs))]
    model = HarnessModel(small, batch_size=4)
    model.loglikelihood([instance("loglikelihood", *pair, task=task) for task, pair in zip(tasks, pairs, strict=True)])
    for name in "ab":
        alone = HarnessModel(small, batch_size=3)
        own = [pair for task, pair in zip(tasks, pairs, strict=True) if task == name]
        alone.loglikelihood([instance("loglikelihood", *pair, task=name) for pair in own])
        assert model.counts[name].requests == len(own)
        found, expected = model.counts[name].counted, alone.counts[name].counted
        np.testing.assert_array_equal(found.executed, expected.executed)
        np.testing.assert_array_equal(found.keys, expected.keys)
        assert 0 < found.executed[1:].sum() < 2 * found.tokens


def test_rolling_windows_predict_every_token_once(small):
    draw = np.random.default_rng(5)
    model = HarnessModel(small, batch_size=2)
    sentence = text(draw, 110)
    (value,) = model.loglikelihood_rolling([instance("loglikelihood_rolling", sentence)])
    ids = model.tok_encode(sentence)
    rows, done = [Row([model.prefix_token_id, *ids[:48]], 1)], 48
    while done < len(ids):
        end = min(done + 48, len(ids))
        rows.append(Row(ids[end - 49 : end], 49 - (end - done)))
        done = end
    policy = inference_policy(small.spec)
    expected = likelihoods(small.spec, small.params, rows, policy, context=49).log_likelihood
    assert len(rows) == 3 and value == pytest.approx(expected.sum(), abs=1e-4)


@pytest.mark.slow
def test_order_and_batch_size_change_no_rolling_score(small):
    draw = np.random.default_rng(6)
    asked = [instance("loglikelihood_rolling", text(draw, count)) for count in (110, 3, 60)]
    expected = HarnessModel(small, batch_size=2).loglikelihood_rolling(asked)
    found = HarnessModel(small, batch_size=4).loglikelihood_rolling(asked[::-1])
    np.testing.assert_allclose(found[::-1], expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_generation_does_not_depend_on_the_batch_and_is_counted_once(small):
    draw = np.random.default_rng(8)
    settings = {"until": ["never said"], "max_gen_toks": 40}
    prompts = [text(draw, n) for n in (2, 6, 5)]
    asked = [instance("generate_until", prompt, dict(settings)) for prompt in prompts]
    together = HarnessModel(small, batch_size=3)
    expected = together.generate_until(asked)
    assert all(expected) and len(set(expected)) == 3
    alone = HarnessModel(small, batch_size=1)
    assert alone.generate_until(asked[::-1]) == expected[::-1]
    found = together.counts["task"].counted
    np.testing.assert_array_equal(found.executed, alone.counts["task"].counted.executed)
    # A round has 32 tokens, so prompts were run twice, and count once; the last new token is never run. Prompts of more
    # than 8 tokens would lose some, as 40 new ones have to fit.
    lengths = [len(together.tok_encode(prompt)) for prompt in prompts]
    assert max(lengths) <= 8 and together.counts["task"].truncated == 0
    assert found.tokens == sum(lengths) + 3 * 39
    assert 0 < found.executed[2] < found.tokens


def test_without_eviction_generation_counts_the_keys_of_skipped_tokens(small):
    execute = np.random.default_rng(3).random((1, 9, 3)) < 0.5
    routing = small.spec.routing.model_copy(update={"eviction": False})
    whole = _counted(small.spec.model_copy(update={"routing": routing}), execute)
    seen = np.arange(1, 10)[None, :, None]
    np.testing.assert_array_equal(whole.keys, np.sum(execute * seen, axis=(0, 1)))
    assert np.all(_counted(small.spec, execute).keys < whole.keys)


@pytest.mark.parametrize(
    ("stops", "place"), [(("cd",), 2), (("d", "bc"), 1), (("", "f"), 5), (("x", ""), None), ((), None)]
)
def test_the_earliest_stop_string_counts(stops, place):
    assert first_stop("abcdefab", stops) == place


def test_tokens_until_the_stop_string_is_complete():
    pieces = ["ab", "c", "de", "f", "ab"]
    decode = lambda ids: "".join(pieces[i] for i in ids)  # noqa: E731
    assert tokens_until(range(5), ("bcd",), decode) == 3
    assert tokens_until(range(5), ("a",), decode) == 1
    assert tokens_until(range(5), ("zz",), decode) == 5


def test_few_widths():
    assert {width_class(n) for n in range(1, 300)} == {64, 128, 256, 512}
    assert all(width_class(n) >= n for n in range(1, 600))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "'num_beams'; allowed: do_sample"),
        ({"max_gen_toks": 48}, "48 new tokens.*1 to 47"),
        ({"max_gen_toks": 0}, "0 new tokens"),
    ],
)
def test_generation_that_cannot_be_done_is_refused(small, settings, message):
    with pytest.raises(InputError, match=f"task: .*{message}"):
        HarnessModel(small).generate_until([instance("generate_until", WORDS[0], settings)])


def test_a_model_without_a_tokenizer_is_refused(small):
    with pytest.raises(InputError, match="no tokenizer"):
        HarnessModel(LoadedModel(small.spec, small.params, None, {}))
