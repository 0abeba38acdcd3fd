"""The public contract: load, forward, generate, score, with_threshold, save, routing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qtale_jax
from qtale_jax.artifact import save_model
from qtale_jax.artifact.lineage import lineage
from qtale_jax.data import reasoning
from qtale_jax.data.tokens import encode
from qtale_jax.errors import InputError
from qtale_jax.generate import main as run_generate
from qtale_jax.inference.decode import decode
from qtale_jax.models.decoder import initialize
from qtale_jax.models.policy import Dense
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification

WORDS = list(reasoning.WORDS)
PROMPT, OTHER = " ".join(WORDS[3:9]), " ".join(WORDS[9:12])


def saved(folder, routed: bool, tokenizer=True):
    architecture = Architecture(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=32,
    )
    routing = RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8) if routed else None
    spec = ModelSpecification(architecture=architecture, routing=routing)
    path = folder / f"{'routed' if routed else 'dense'}{'' if tokenizer else '-bare'}"
    save_model(
        path,
        spec,
        initialize(spec, jax.random.key(6)),
        tokenizer=reasoning.tokenizer() if tokenizer else None,
        provenance={"seed": 3},
    )
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"), routed=True)


@pytest.fixture(scope="module")
def model(path):
    return qtale_jax.load(path)


def test_the_package_has_what_it_promises():
    names = {"load", "results", "Model", "Generation", "Results", "Score", "TextRouting", "__version__"}
    names |= {"Engine", "EngineOptions", "RequestOptions", "InputError", "QueueFull", "TooLong"}
    assert names == set(qtale_jax.__all__)
    for name in qtale_jax.__all__:
        assert getattr(qtale_jax, name)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = qtale_jax.lode  # pyright: ignore[reportAttributeAccessIssue]


def test_forward_gives_logits_and_routing(model):
    tokens = np.array([[1, 5, 6, 7], [1, 8, 0, 0]])
    out = model.forward(tokens, lengths=[4, 2])
    assert out.logits.shape == (2, 4, 64) and out.logits.dtype == jnp.float32
    assert out.routing.logits.shape == (2, 4, 2, 2) and out.routing.probability.shape == (2, 4, 2)
    assert out.routing.execute.shape == (2, 4, 3) and not out.routing.execute[1, 2:].any()
    np.testing.assert_array_equal(out.routing.execute[0, 2:, 1:], np.asarray(out.routing.probability[0, 2:]) >= 0.5)
    alone = model.forward(tokens[1:, :2])
    np.testing.assert_allclose(alone.logits[0], out.logits[1, :2], atol=1e-5)


def test_theta_zero_is_the_dense_model(model):
    tokens = np.array([[1, 5, 6, 7, 9, 11]])
    zero, dense = model.with_threshold(0.0).forward(tokens), model.forward(tokens, policy=Dense())
    np.testing.assert_array_equal(zero.logits, dense.logits)
    assert zero.routing.execute.all()


def test_with_threshold_leaves_the_model_alone(model):
    never = model.with_threshold(1.0)
    assert never.params is model.params and model.spec.thresholds == (0.5, 0.5)
    routing = never.routing(PROMPT)
    assert routing.execute[:2].all() and routing.execute[:, 0].all() and not routing.execute[2:, 1:].any()
    assert model.with_threshold([0.1, 0.2]).spec.thresholds == (0.1, 0.2)
    with pytest.raises(InputError, match="3 thresholds for 2 routed layers"):
        model.with_threshold([0.1, 0.2, 0.3])


@pytest.mark.parametrize("theta", [np.float32(0.25), np.float64(0.25), np.array(0.25), jnp.bfloat16(0.25), 0.25])
def test_a_threshold_may_be_any_number(model, theta):
    assert model.with_threshold(theta).spec.thresholds == (0.25, 0.25)
    assert model.with_threshold(np.array([0, 1])).spec.thresholds == (0.0, 1.0)
    options = qtale_jax.RequestOptions(theta=theta)
    np.testing.assert_array_equal(options.thresholds(model.spec), np.float32([0.25, 0.25]))


@pytest.mark.parametrize("theta", [2.0, -0.1, float("nan"), [0.5, 1.5], "0.5", [[0.5, 0.5]], [[0.1], [0.2, 0.3]], True])
def test_other_thresholds_are_refused(model, theta):
    for ask in (model.with_threshold, lambda theta: qtale_jax.RequestOptions(theta=theta).thresholds(model.spec)):
        with pytest.raises(InputError, match="theta=.*; allowed: "):
            ask(theta)


def test_routing_of_a_text(model):
    routing = model.routing(PROMPT)
    ids = encode(model.tokenizer, [PROMPT])[0]
    assert routing.words == model.tokenizer.convert_ids_to_tokens(ids) and len(routing.words) == 7
    assert routing.execute.shape == (7, 3) and routing.probability.shape == (7, 2)
    assert routing.executed_ratio == routing.execute.mean()


@pytest.mark.slow
def test_generation(model):
    generations = model.generate([PROMPT, OTHER], max_new_tokens=4)
    assert all(isinstance(one, qtale_jax.Generation) for one in generations)
    for prompt, one in zip((PROMPT, OTHER), generations, strict=True):
        assert model.generate([prompt], max_new_tokens=4) == [one]
        assert 1 <= len(one.tokens) <= 4
        ids = encode(model.tokenizer, [prompt])[0] + one.tokens
        assert prompt + one.text == model.tokenizer.decode(ids, skip_special_tokens=True)
        execute = np.asarray(model.forward(np.array([ids[:-1]])).routing.execute)
        assert one.executed_ratio == pytest.approx(execute.mean())
    assert model.generate([], max_new_tokens=4) == []
    sampled = [model.generate([PROMPT], 4, temperature=2.0, seed=seed)[0].tokens for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 4, "temperature": -1.0},
        {"max_new_tokens": 4, "temperature": float("nan")},
        {"max_new_tokens": 4, "temperature": float("inf")},
        {"max_new_tokens": 4, "top_p": 0.0},
        {"max_new_tokens": 4, "top_p": 1.1},
        {"max_new_tokens": 26},
        {"max_new_tokens": 4, "kv_cache": "int4"},
    ],
)
def test_impossible_generations_are_refused(model, arguments):
    with pytest.raises(InputError):
        model.generate([PROMPT], **arguments)


@pytest.mark.parametrize("prompts", [PROMPT, "", [5, 6]])
def test_a_text_is_no_list_of_prompts(model, prompts):
    for what in ("generate", "stream"):
        with pytest.raises(InputError, match=f"{what}: prompts=.*; allowed: a list of texts"):
            getattr(model, what)(prompts, 4)


def test_sizes_that_cannot_be_are_refused(model):
    with pytest.raises(InputError, match="stream: chunk=0; allowed: 1 or more"):
        model.stream([PROMPT], 4, chunk=0)
    with pytest.raises(InputError, match="score: batch_size=0; allowed: 1 or more"):
        model.score([(PROMPT, " " + WORDS[20])], batch_size=0)
    assert model.routing(" ".join(WORDS[3:34])).execute.shape == (32, 3)
    with pytest.raises(InputError, match="routing: a text of 33 tokens exceeds the context of 32"):
        model.routing(" ".join(WORDS[3:35]))


@pytest.mark.slow
def test_both_engines_and_the_stream_say_the_same(model):
    found, expected = (model.generate([PROMPT, OTHER], 6, engine=engine) for engine in ("skip", "masked"))
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.tokens, one.executed_ratio) == (other.text, other.tokens, other.executed_ratio)
    pieces = list(model.stream([PROMPT, OTHER], 6, chunk=2))
    assert len(pieces) >= 1 and ["".join(parts) for parts in zip(*pieces, strict=True)] == [one.text for one in found]
    with pytest.raises(InputError, match="engine='fast'; allowed: 'skip' or 'masked'"):
        model.generate([PROMPT], 6, engine="fast")


def ending_with(model, *ends):
    """The model as one whose checkpoint says that tokens end a turn which are not the tokenizer's end token."""
    provenance = {**model.provenance, "huggingface": {"generation_config": {"eos_token_id": list(ends)}}}
    return dataclasses.replace(model, provenance=provenance)


@pytest.mark.slow
def test_tokens_that_only_the_checkpoint_says_end_a_turn_end_it(model):
    free = model.generate([PROMPT], 6)[0]
    assert len(free.tokens) == 6
    place = next(i for i in range(1, 6) if free.tokens[i] not in free.tokens[:i])
    chat = ending_with(model, 63, free.tokens[place])
    text = " " + model.tokenizer.decode(free.tokens[:place], skip_special_tokens=True)
    before = decode._cache_size()
    for engine in ("skip", "masked"):
        found = chat.generate([PROMPT], 6, engine=engine)[0]
        assert found.tokens == free.tokens[: place + 1] and found.text == text
    assert "".join(piece for (piece,) in chat.stream([PROMPT], 6, chunk=2)) == text
    assert decode._cache_size() <= before + 2  # one per size of chunk


def test_end_tokens_are_those_of_the_tokenizer_and_of_the_checkpoint(model, path):
    own = model.tokenizer.eos_token_id
    assert model.end_ids == (own,) and ending_with(model, 7, own, 9).end_ids == (own, 7, 9)
    made = lineage("quantize", path, ending_with(model, 7, 9).provenance)
    assert dataclasses.replace(model, provenance=made).end_ids == (own, 7, 9)
    for value, ends in ((None, (own,)), (7, (own, 7)), (own, (own,))):
        provenance = {"huggingface": {"generation_config": {"eos_token_id": value}}}
        assert dataclasses.replace(model, provenance=provenance).end_ids == ends
    with pytest.raises(InputError, match="eos_token_id=\\['</s>'\\]; allowed: a token id, or a list of them"):
        ending_with(model, "</s>").generate([PROMPT], 2)


def test_config_json_has_the_end_tokens_of_a_checkpoint_without_generation_config(model):
    def ends(**checkpoint):
        return dataclasses.replace(model, provenance={"huggingface": checkpoint}).end_ids

    own = model.tokenizer.eos_token_id
    for value, found in ((None, (own,)), (7, (own, 7)), ([7, own, 9], (own, 7, 9))):
        assert ends(config={"eos_token_id": value}) == found
    assert ends(config={}) == ends() == (own,)
    assert ends(config={"eos_token_id": 7}, generation_config={"eos_token_id": 9}) == (own, 9)
    assert ends(config={"eos_token_id": 7}, generation_config={"bos_token_id": 1}) == (own,)  # transformers does so too
    with pytest.raises(InputError, match="^config.json: eos_token_id=True; allowed: a token id, or a list of them"):
        ends(config={"eos_token_id": True})


@pytest.fixture(scope="module")
def spaced(model):
    """The model with a tokenizer whose words have their space before them, and whose texts begin with none."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"▁{word}": index for index, word in enumerate(WORDS) if index > 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return dataclasses.replace(model, tokenizer=tokenizer)


@pytest.mark.slow
def test_a_continuation_goes_on_where_its_prompt_ends(spaced, tmp_path, capsys):
    (one,) = spaced.generate([PROMPT], 5)
    alone = spaced.tokenizer.decode(one.tokens, skip_special_tokens=True)
    ids = encode(spaced.tokenizer, [PROMPT])[0] + one.tokens
    assert alone and PROMPT + one.text == f"{PROMPT} {alone}" == spaced.tokenizer.decode(ids, skip_special_tokens=True)
    assert spaced.generate([PROMPT], 5, engine="masked")[0].text == one.text
    assert "".join(piece for (piece,) in spaced.stream([PROMPT], 5, chunk=2)) == one.text
    engine = qtale_jax.Engine(spaced, qtale_jax.EngineOptions(rows=2, chunk=2, width=8))
    for prompt in (PROMPT, ids[: -len(one.tokens)]):
        assert engine.submit(prompt, qtale_jax.RequestOptions(5)).result().text == one.text
    assert engine.submit(PROMPT, qtale_jax.RequestOptions(5, continues=False)).result().text == alone
    spaced.save(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "prompts": [PROMPT], "max_new_tokens": 5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"generate": settings}))
    run_generate([str(tmp_path / "config.yaml")])
    assert capsys.readouterr().out.startswith(f"{PROMPT} {alone}\n")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_generation_with_an_int8_cache(model, path, tmp_path, capsys):
    """The argument and the configuration key choose the same program, another one than without them."""
    default, before = model.generate([PROMPT], 5), decode._cache_size()
    rounded = model.generate([PROMPT], 5, kv_cache="int8")
    assert decode._cache_size() == before + 1
    assert rounded[0].kv_bytes < default[0].kv_bytes
    assert model.generate([PROMPT], 5, kv_cache="float") == default
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"generate": {"model": str(path), "prompts": [PROMPT], "max_new_tokens": 5}})
    )
    for form, (one,) in (("float", default), ("int8", rounded)):
        run_generate([str(tmp_path / "config.yaml"), f"generate.kv_cache={form}"])
        assert capsys.readouterr().out.startswith(f"{PROMPT}{one.text}\n[{len(one.tokens)} tokens")
    assert decode._cache_size() == before + 1
    with pytest.raises(InputError, match="generate.kv_cache"):
        run_generate([str(tmp_path / "config.yaml"), "generate.kv_cache=int4"])


@pytest.mark.slow
def test_kernels_say_the_same(model, path, tmp_path, capsys):
    """The argument and the configuration key choose the same program; Pallas here is interpreted, or left alone."""
    expected = model.generate([PROMPT], 5)
    assert model.with_kernels("pallas").generate([PROMPT], 5) == expected
    before = decode._cache_size()
    assert model.with_kernels("interpreted").generate([PROMPT], 5) == expected
    assert decode._cache_size() == before + 1
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"generate": {"model": str(path), "prompts": [PROMPT], "max_new_tokens": 5}})
    )
    run_generate([str(tmp_path / "config.yaml"), "generate.kernels=interpreted"])
    assert capsys.readouterr().out.startswith(f"{PROMPT}{expected[0].text}\n[{len(expected[0].tokens)} tokens")
    assert decode._cache_size() == before + 1
    with pytest.raises(InputError, match="kernels='triton'; allowed: 'auto', 'xla', 'pallas', 'interpreted'"):
        model.with_kernels("triton")


@pytest.mark.slow
def test_scores(model):
    pairs = [(PROMPT, " " + WORDS[20]), (OTHER, " ".join(["", *WORDS[30:33]])), ("", WORDS[4])]
    scores = model.score(pairs)
    for (context, continuation), score in zip(pairs, scores, strict=True):
        assert isinstance(score, qtale_jax.Score)
        ids = encode(model.tokenizer, [context + continuation])[0]
        start = len(encode(model.tokenizer, [context])[0])
        logp = np.asarray(jax.nn.log_softmax(model.forward(np.array([ids])).logits))[0]
        expected = sum(logp[i - 1, ids[i]] for i in range(start, len(ids)))
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
    greedy = model.generate([PROMPT], 1)[0]
    if greedy.text:
        assert model.score([(PROMPT, greedy.text)])[0].is_greedy
    assert model.score([]) == []
    with pytest.raises(InputError, match="40 tokens.*context of 32"):
        model.score([(" ".join(WORDS[3:42]), "")])
    with pytest.raises(InputError, match="empty"):
        model.score([("", "")])


def test_saving_and_loading_changes_nothing(model, path, tmp_path):
    changed = model.with_threshold(0.25)
    changed.save(tmp_path / "copy")
    copy = qtale_jax.load(tmp_path / "copy")
    assert copy.spec == changed.spec and copy.provenance == {"seed": 3}
    jax.tree.map(np.testing.assert_array_equal, copy.params, model.params)
    tokens = np.array([[1, 5, 6, 7]])
    np.testing.assert_array_equal(copy.forward(tokens).logits, changed.forward(tokens).logits)
    with pytest.raises(InputError, match="exists"):
        model.save(path)


def test_half_precision_activations(path, model):
    half = qtale_jax.load(path, compute_dtype="bfloat16")
    tokens = np.array([[1, 5, 6, 7]])
    out, expected = half.forward(tokens, policy=Dense()).logits, model.forward(tokens, policy=Dense()).logits
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=0.1)


def test_other_types_of_activations_are_refused(path):
    with pytest.raises(InputError, match="load: compute_dtype='foo'; allowed: 'float32' or 'bfloat16'"):
        qtale_jax.load(path, compute_dtype="foo")


def test_a_dense_model(tmp_path):
    dense = qtale_jax.load(saved(tmp_path, routed=False))
    assert dense.forward(np.array([[1, 2, 3]])).routing.execute.all()
    assert dense.routing(PROMPT).executed_ratio == 1.0
    with pytest.raises(InputError, match="a dense model has no threshold"):
        dense.with_threshold(0.3)


def test_a_model_without_a_tokenizer(tmp_path):
    bare = qtale_jax.load(saved(tmp_path, routed=False, tokenizer=False))
    for ask in (lambda: bare.generate(["a"], 2), lambda: bare.score([("a", "b")]), lambda: bare.routing("a")):
        with pytest.raises(InputError, match="no tokenizer"):
            ask()


def test_a_missing_model(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        qtale_jax.load(tmp_path / "nowhere")


def test_a_notebook_shows_what_a_model_is_and_what_a_text_executes(model, tmp_path_factory):
    assert repr(model).startswith("Model(llama, 3 layers of width 16") and len(repr(model)) < 300
    shown = model._repr_html_()
    assert "QTALE, routers in layers 1 to 2" in shown and "seed 3" in shown
    assert f"{sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)):,} (" in shown
    routing = model.routing(PROMPT)
    tokens, layers = routing.execute.shape
    assert repr(routing).startswith(f"TextRouting({tokens} tokens × {layers} layers, ")
    assert routing._repr_html_().count("<title>") == tokens * layers
    assert f"p(execute) = {routing.probability[2, 0]:.3f}" in routing._repr_html_()
    dense = qtale_jax.load(saved(tmp_path_factory.mktemp("dense"), routed=False))
    assert "every token executes every layer" in dense._repr_html_()
    assert "100.0 % of" in dense.routing(PROMPT)._repr_html_()
