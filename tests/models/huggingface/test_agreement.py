"""Converted models compute what transformers computes, and the pretrained one what its reference says."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax import artifact
from qtale_jax.inference.generation import generate
from qtale_jax.models.forward import forward
from qtale_jax.models.huggingface import from_huggingface, to_huggingface
from qtale_jax.models.policy import Dense
from qtale_jax.models.specification import LinearScaling, ModelSpecification, RopeScaling

NAMES = sorted(file.parent.name for file in Path(__file__).parents[1].glob("golden/*/expected.npz"))

run = jax.jit(forward, static_argnames=("spec",))


@pytest.fixture(scope="module")
def expected(golden):
    """Tokens, logits and greedy continuations of every golden model."""
    found = {}
    for name in NAMES:
        with np.load(golden / name / "expected.npz") as data:
            found[name] = {key: data[key] for key in data.files}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_logits_agree(converted, expected, name):
    model, golden = artifact.load_model(converted / name), expected[name]
    found = run(model.spec, model.params, jnp.asarray(golden["tokens"])).logits
    np.testing.assert_allclose(np.asarray(found), golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_continuations_agree(converted, expected, name):
    """Each greedy token is the winner after the prompt and the tokens before it."""
    model, golden = artifact.load_model(converted / name), expected[name]
    start, count = 8, golden["greedy"].shape[1]
    tokens = np.zeros_like(golden["tokens"])
    tokens[:, :start] = golden["tokens"][:, :start]
    tokens[:, start : start + count] = golden["greedy"]
    winners = np.asarray(run(model.spec, model.params, jnp.asarray(tokens)).logits).argmax(axis=-1)
    np.testing.assert_array_equal(winners[:, start - 1 : start + count - 1], golden["greedy"])


@pytest.mark.parametrize("name", ["llama3_1", "linear", "gemma3_images"])
def test_the_golden_rope_scaling_matters(converted, expected, name):
    model, golden = artifact.load_model(converted / name), expected[name]
    unscaled = model.spec.architecture.model_copy(update={"rope_scaling": None})
    found = run(ModelSpecification(architecture=unscaled), model.params, jnp.asarray(golden["tokens"])).logits
    assert np.abs(np.asarray(found) - golden["logits"]).max() > 0.1


def test_shapes_of_the_golden_models(converted):
    architectures = {name: artifact.read_model_json(converted / name).spec.architecture for name in NAMES}
    assert architectures["llama2"].num_kv_heads == architectures["llama2"].num_heads == 4
    assert architectures["llama3_1"].rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=32
    )
    assert architectures["llama3_1"].rope_theta == 100.0
    assert architectures["linear"].rope_scaling == LinearScaling(factor=4.0)
    assert (architectures["grouped"].num_kv_heads, architectures["grouped"].head_dim) == (1, 12)
    assert architectures["tied"].tied_head
    dtypes = {name: artifact.read_model_json(converted / name).spec.dtype for name in NAMES}
    assert {name for name, dtype in dtypes.items() if dtype != "float32"} == {"tied", "gemma3", "gemma3_images"}


@pytest.fixture(scope="session")
def stories(shared_data, tmp_path_factory):
    """The pretrained stories260k, converted; skips where it is absent."""
    source = shared_data / "stories260k"
    if not source.is_dir():
        pytest.skip(f"no checkpoint in {source}")
    path = tmp_path_factory.mktemp("stories") / "model"
    from_huggingface(source, path)
    return path


def test_stories260k_and_back_is_bit_equal(raw, shared_data, stories, tmp_path):
    to_huggingface(stories, tmp_path / "back")
    assert raw(tmp_path / "back") == raw(shared_data / "stories260k")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((shared_data / "stories260k" / "config.json").read_text())
    before, after = (artifact.load_tokenizer(path) for path in (shared_data / "stories260k", tmp_path / "back"))
    assert before("Once upon a time")["input_ids"] == after("Once upon a time")["input_ids"]


@pytest.mark.slow
def test_stories260k_writes_the_same_story(shared_data, stories):
    golden = json.loads((shared_data / "stories260k" / "golden.json").read_text())
    model = artifact.load_model(stories)
    prompt = np.asarray([golden["prompt_ids"]], np.int32)
    found = generate(
        model.spec,
        model.params,
        jnp.asarray(prompt),
        jnp.asarray([prompt.shape[1]], jnp.int32),
        Dense(),
        jax.random.key(0),
        jnp.float32(0),
        jnp.float32(1),
        jnp.int32(-1),
        max_new_tokens=len(golden["greedy_ids"]) - prompt.shape[1],
    )
    assert prompt[0].tolist() + found.tokens[0].tolist() == golden["greedy_ids"]


@pytest.mark.slow
def test_stories260k_likelihood(shared_data, stories, optimized):
    golden = json.loads((shared_data / "stories260k" / "golden.json").read_text())
    model = artifact.load_model(stories)
    text = (shared_data / "text" / "tinystories_train_sample.txt").read_text(encoding="utf-8", errors="ignore")
    documents = [story.strip() for story in text.split("<|endoftext|>")[1:101]]
    rows = [([1] + model.tokenizer.encode(story, add_special_tokens=False))[:512] for story in documents]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), 512), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids

    @functools.partial(jax.jit, compiler_options=optimized)  # fifty thousand tokens: to compute takes longest
    def nats(tokens, lengths):
        logits = forward(model.spec, model.params, tokens, lengths=lengths).logits[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[:, :, 0]
        counts = jnp.arange(1, 512, dtype=jnp.int32)[None, :] < lengths[:, None]
        return -jnp.sum(jnp.where(counts, chosen, 0.0), axis=1)

    found = [np.asarray(nats(tokens[i : i + 10], lengths[i : i + 10]), np.float64) for i in range(0, len(rows), 10)]
    count = int((lengths - 1).sum())
    assert count == golden["nats_tokens"]
    assert np.concatenate(found).sum() / count == pytest.approx(golden["nats_per_token"], abs=1e-4)
