import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.inference.generation import generate
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.forward import forward

pytestmark = pytest.mark.slow

NEW, WIDTH = 6, 8

reference = jax.jit(forward, static_argnums=0)


def run(
    model, prompts, *, theta=None, temperature=0.0, top_p=1.0, seed=0, stop=-1, new=NEW, width=WIDTH, cache_dtype=None
):
    """Continues lists of ids, padded with a token that would be noticed."""
    spec, params = model
    tokens = np.full((len(prompts), width), 7, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    return jax.device_get(
        generate(
            spec.structure,
            params,
            jnp.asarray(tokens),
            lengths,
            inference_policy(spec, theta),
            jax.random.key(seed),
            jnp.float32(temperature),
            jnp.float32(top_p),
            jnp.int32(stop),
            max_new_tokens=new,
            cache_dtype=cache_dtype,
        )
    )


def whole_pass(model, ids: list[int]):
    """The forward pass over all tokens at once, padded to one shape."""
    spec, params = model
    tokens = jnp.asarray([ids + [0] * (WIDTH + NEW - len(ids))], jnp.int32)
    lengths = jnp.asarray([len(ids)], jnp.int32)
    return reference(spec.structure, params, tokens, lengths=lengths, policy=inference_policy(spec))


def greedy(model, prompt: list[int], new: int) -> list[int]:
    """Greedy continuation without a cache."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(jnp.argmax(whole_pass(model, ids).logits[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.fixture(params=["dense", "routed", "without_eviction"])
def model(request):
    return request.getfixturevalue(request.param)


in_both_forms = pytest.mark.parametrize("cache_dtype", [None, jnp.dtype(jnp.int8)], ids=["float", "int8"])


@pytest.mark.parametrize("name", ["routed", "hashed"])
def test_routers_are_undecided(name, prompts, request):
    out = run(request.getfixturevalue(name), prompts)
    share = out.new_execute[:, :-1, 1:].mean()
    assert 0.1 < share < 0.9


def test_the_cache_changes_nothing(model, prompts):
    out = run(model, prompts)
    assert out.tokens.tolist() == [greedy(model, prompt, NEW) for prompt in prompts]
    assert out.counts.tolist() == [NEW] * 3


def test_decode_decides_as_prefill_does(model, prompts):
    out = run(model, prompts)
    for row, prompt in enumerate(prompts):
        ids = prompt + out.tokens[row, : NEW - 1].tolist()
        expected = np.asarray(whole_pass(model, ids).routing.execute)[0]
        np.testing.assert_array_equal(out.prompt_execute[row, : len(prompt)], expected[: len(prompt)])
        np.testing.assert_array_equal(out.new_execute[row, : NEW - 1], expected[len(prompt) : len(ids)])
        assert not out.prompt_execute[row, len(prompt) :].any()


def test_skipping_a_layer_in_the_whole_prompt_is_no_different(without_eviction, prompts):
    # At theta 1 only always-on tokens execute routed layers; the rest of the batch must not matter for the others.
    spec, params = without_eviction
    thetas = {"16": (1.0,) * len(spec.routed_layers)}
    none = spec.model_copy(update={"routing": spec.routing.model_copy(update={"thresholds": thetas})})
    assert run((none, params), prompts[2:]).tokens.tolist() == [greedy((none, params), prompts[2], NEW)]


@pytest.mark.parametrize(
    ("name", "cache_dtype"),
    [
        ("routed", None),
        *(pytest.param(name, None, marks=pytest.mark.exhaustive) for name in ("dense", "without_eviction", "hashed")),
        pytest.param("routed", jnp.dtype(jnp.int8), marks=pytest.mark.exhaustive),
        ("without_eviction", jnp.dtype(jnp.int8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "int8" if value else "float",
)
def test_a_batch_equals_its_rows_alone(name, cache_dtype, prompts, request):
    model = request.getfixturevalue(name)
    together = run(model, prompts, cache_dtype=cache_dtype)
    for row, prompt in enumerate(prompts):
        alone = run(model, [prompt], cache_dtype=cache_dtype)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_array_equal(alone.new_execute[0], together.new_execute[row])


@in_both_forms
def test_padding_does_not_matter(routed, prompts, cache_dtype):
    narrow, wide = (run(routed, prompts, width=width, cache_dtype=cache_dtype) for width in (WIDTH, WIDTH + 5))
    np.testing.assert_array_equal(narrow.tokens, wide.tokens)
    np.testing.assert_array_equal(narrow.new_execute, wide.new_execute)


@in_both_forms
def test_a_second_call_remembers_nothing_of_the_first(routed, prompts, cache_dtype):
    fresh = run(routed, prompts[1:2], cache_dtype=cache_dtype)
    run(routed, prompts[2:], cache_dtype=cache_dtype)
    again = run(routed, prompts[1:2], cache_dtype=cache_dtype)
    jax.tree.map(np.testing.assert_array_equal, fresh, again)


def test_theta_zero_generates_as_the_dense_model(routed, prompts):
    from qtale_jax.models.policy import Dense

    out = run(routed, prompts, theta=0.0)
    assert out.new_execute[:, : NEW - 1].all()
    spec, params = routed
    everything = functools.partial(reference, spec.structure, params, policy=Dense())
    for row, prompt in enumerate(prompts):
        ids = prompt + out.tokens[row].tolist()
        logits = everything(jnp.asarray([ids], jnp.int32)).logits[0]
        assert jnp.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == out.tokens[row].tolist()


def test_a_stop_token_ends_its_row_only(routed, prompts):
    free = run(routed, prompts)
    stop = int(free.tokens[0, 2])
    out = run(routed, prompts, stop=stop)
    for row in range(3):
        full = free.tokens[row].tolist()
        count = full.index(stop) + 1 if stop in full else NEW
        assert out.counts[row] == count
        assert out.tokens[row].tolist() == full[:count] + [-1] * (NEW - count)
        assert not out.new_execute[row, count:].any()


def test_always_on_tokens_and_layers_execute(routed, prompts):
    out = run(routed, prompts, theta=1.0)
    assert out.prompt_execute[2, :2].all() and out.prompt_execute[2, :7, 0].all()
    assert not out.prompt_execute[2, 2:7, 1:].any()
    assert out.new_execute[0, 0].all()  # the second token of the row whose prompt is one token
    assert not out.new_execute[0, 1:5, 1:].any()


def test_sampling_is_decided_by_the_seed(routed, prompts):
    draws = [run(routed, prompts, temperature=2.0, seed=seed).tokens.tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    nearly_greedy = run(routed, prompts, temperature=2.0, top_p=1e-6, seed=3)
    assert nearly_greedy.tokens.tolist() == run(routed, prompts).tokens.tolist()


def test_a_row_samples_alike_whatever_stands_beside_it(routed, prompts):
    alone = run(routed, prompts[:1], temperature=1.5, seed=5)
    together = run(routed, prompts, temperature=1.5, seed=5)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[0])


@in_both_forms
def test_thetas_seeds_and_temperatures_share_one_program(routed, prompts, cache_dtype):
    run(routed, prompts, cache_dtype=cache_dtype)
    before = generate._cache_size()
    run(routed, prompts[::-1], theta=0.3, temperature=0.7, top_p=0.9, seed=8, stop=4, cache_dtype=cache_dtype)
    assert generate._cache_size() == before


def test_a_cache_of_another_type_is_refused(dense, prompts):
    with pytest.raises(ValueError, match="floating point or int8, found int4"):
        run(dense, prompts, cache_dtype=jnp.dtype(jnp.int4))
