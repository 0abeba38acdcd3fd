"""Against the harness's own Hugging Face backend on the same weights (golden/generate.py)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from qtale_jax.evaluation.harness.adapter import HarnessModel
from qtale_jax.evaluation.harness.generation import ROUND, Request, continue_requests
from qtale_jax.inference.policies import inference_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(stories) -> HarnessModel:
    return HarnessModel(stories, batch_size=8)


def ask(model, kind, arguments):
    return getattr(model, kind)([Instance(kind, {}, entry, 0, ("task", 0, 1)) for entry in arguments])


def test_rolling_likelihoods_agree_also_beyond_the_context(model, expected):
    documents, values = zip(*expected["rolling"], strict=True)
    lengths = [len(model.tok_encode(document)) for document in documents]
    assert min(lengths) < model.max_length < 2 * model.max_length < max(lengths)
    found = ask(model, "loglikelihood_rolling", [(document,) for document in documents])
    np.testing.assert_allclose(found, values, atol=2e-3, rtol=1e-6)


def test_continuations_agree_and_end_before_the_stop_string(model, expected):
    settings = {"do_sample": False, "max_gen_toks": 70}
    asked = [(prompt, {**settings, "until": stops}) for prompt, stops, _ in expected["generation"]]
    texts = [text for *_, text in expected["generation"]]
    assert ask(model, "generate_until", asked) == texts
    spanning = 0
    for (_, stops, _), text in zip(expected["generation"], texts, strict=True):
        assert not any(stop in text for stop in stops)
        spanning += min(len(model.tok_encode(stop, add_special_tokens=False)) for stop in stops) > 1
    assert spanning >= 4


def test_tokens_that_only_the_checkpoint_says_end_a_turn_end_it(model, stories, expected):
    prompt, _, whole = next(entry for entry in expected["generation"] if entry[1] == ["never said"])
    end = model.tok_encode(whole, add_special_tokens=False)[12]
    config = {"huggingface": {"generation_config": {"eos_token_id": [1, end]}}}
    chat = HarnessModel(dataclasses.replace(stories, provenance=config), batch_size=8)
    (found,) = ask(chat, "generate_until", [(prompt, {"until": [], "max_gen_toks": 70})])
    assert found and whole.startswith(found) and len(found) < len(whole) / 2


def test_a_stop_string_may_begin_in_one_round_and_end_in_the_next(model, stories, expected):
    prompt, _, whole = next(entry for entry in expected["generation"] if entry[1] == ["never said"])
    request = Request(model.tok_encode(prompt), (), 70)
    settings = {"ends": (1,), "batch_size": 8, "compute_dtype": jnp.dtype(jnp.float32)}
    policy = inference_policy(stories.spec)
    continue_requests(stories.spec, stories.params, stories.tokenizer, [request], policy, **settings)
    assert request.text == whole and len(request.new) == 70
    # From the last character of the first round's last token but one to within the second round's eighth token; shorter
    # ones are said earlier too.
    before, within = (len(model.tokenizer.decode(request.new[:count])) for count in (ROUND - 1, ROUND + 8))
    stop = whole[before - 1 : within - 1]
    assert whole.find(stop) == before - 1
    assert ask(model, "generate_until", [(prompt, {"until": [stop], "max_gen_toks": 70})]) == [whole[: before - 1]]
