"""Generation that skips, from prompts to tokens: the masked engine's tokens, in chunks, with a cache that grows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.inference import streaming
from qtale_jax.inference.decode import decode
from qtale_jax.inference.generation import generate
from qtale_jax.inference.pages import page_bytes
from qtale_jax.inference.policies import inference_policy
from qtale_jax.inference.prefill import prefill
from qtale_jax.inference.rows import end_tokens
from qtale_jax.inference.streaming import Options, joined, stream
from qtale_jax.models.policy import Sampled

pytestmark = pytest.mark.slow

NEW, WIDTH = 10, 8
# Prompts of up to 8 tokens in two parts, and pages so small that the pool grows while 10 more come.
OPTIONS = Options(chunk=4, width=5, page=2, least_step=1)


def padded(prompts) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(prompts), WIDTH), 7, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def chunks(model, prompts, *, theta=None, seed=0, options=OPTIONS, **settings):
    spec, params = model
    policy, key = inference_policy(spec, theta), jax.random.key(seed)
    return list(
        stream(spec.structure, params, *padded(prompts), policy, key, max_new_tokens=NEW, options=options, **settings)
    )


def run(*arguments, **settings):
    return joined(chunks(*arguments, **settings))


def masked(model, prompts, *, theta=None, seed=0, temperature=0.0, top_p=1.0, stop_ids=(), cache_dtype=None):
    spec, params = model
    tokens, lengths = padded(prompts)
    return jax.device_get(
        generate(
            spec.structure,
            params,
            jnp.asarray(tokens),
            jnp.asarray(lengths),
            inference_policy(spec, theta),
            jax.random.key(seed),
            jnp.float32(temperature),
            jnp.float32(top_p),
            end_tokens(stop_ids),
            max_new_tokens=NEW,
            cache_dtype=cache_dtype,
        )
    )


def same(out, expected):
    """Tokens and decisions; the last token of a row is not run here."""
    steps = out.tokens.shape[1]
    np.testing.assert_array_equal(out.tokens, expected.tokens[:, :steps])
    assert (expected.tokens[:, steps:] == -1).all()
    np.testing.assert_array_equal(out.counts, expected.counts)
    np.testing.assert_array_equal(out.prompt_execute, expected.prompt_execute)
    for row, count in enumerate(out.counts):
        np.testing.assert_array_equal(out.execute[row, : count - 1], expected.new_execute[row, : count - 1])
        assert not out.execute[row, count - 1 :].any()


def test_tokens_are_those_of_the_masked_engine(routed, prompts):
    out, expected = run(routed, prompts), masked(routed, prompts)
    assert 0.1 < out.execute[:, :-1, 1:].mean() < 0.9
    same(out, expected)
    free = expected.tokens
    # Each of two tokens ends rows, and not only the first or the last one.
    ends = [int(free[0, 2]), int(free[1, 4])]
    out, expected = run(routed, prompts, stop_ids=ends), masked(routed, prompts, stop_ids=ends)
    same(out, expected)
    for row, tokens in enumerate(free.tolist()):
        place = next((i + 1 for i, token in enumerate(tokens) if token in ends), NEW)
        assert expected.tokens[row, : expected.counts[row]].tolist() == tokens[:place]
    assert expected.counts[0] <= 3 and expected.counts[1] <= 5
    sampling = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    same(run(routed, prompts, **sampling), masked(routed, prompts, **sampling))
    assert not np.array_equal(run(routed, prompts, **sampling).tokens, out.tokens)


@pytest.mark.exhaustive
def test_an_int8_cache(without_eviction, prompts):
    options = Options(chunk=4, width=5, page=2, cache_dtype=jnp.dtype(jnp.int8))
    same(
        run(without_eviction, prompts, options=options),
        masked(without_eviction, prompts, cache_dtype=jnp.dtype(jnp.int8)),
    )


def test_a_batch_equals_its_rows_alone_and_a_second_call_a_first(routed, prompts):
    together = run(routed, prompts)
    for row, prompt in enumerate(prompts):
        alone = run(routed, [prompt])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_array_equal(alone.execute[0], together.execute[row])
        assert alone.row_bytes[0] == together.row_bytes[row]
    again = run(routed, prompts)
    jax.tree.map(np.testing.assert_array_equal, vars(together), vars(again))


def test_chunks_are_of_one_size_whatever_the_pool_does(routed, prompts):
    found = chunks(routed, prompts)
    tokens = joined(found).tokens
    assert len(found) > 2 and all(1 <= part.tokens.shape[1] <= 4 for part in found)
    assert [part.finished for part in found] == [False] * (len(found) - 1) + [True]
    large = chunks(routed, prompts, options=Options(chunk=4, width=5, page=2))
    assert [part.tokens.shape[1] for part in large] == [4, 4, 2]
    np.testing.assert_array_equal(joined(large).tokens, tokens)


def test_the_cache_holds_what_is_kept_and_little_more(routed, prompts):
    spec, _ = routed
    found = chunks(routed, prompts)
    out, page = joined(found), page_bytes(spec.architecture, jnp.float32, 2)
    executed = out.execute.sum(1) + out.prompt_execute.sum(1)
    np.testing.assert_array_equal(out.kept, executed.T)
    np.testing.assert_array_equal(out.row_bytes, (-(-out.kept // 2)).sum(0) * page)
    held = [part.held_bytes for part in found]
    assert held == sorted(held) and held[0] < held[-1]
    dense = [part.held_bytes for part in chunks(routed, prompts, theta=0.0)]
    assert max(held) < 0.8 * dense[-1]


def test_one_program_per_shape_and_none_after_the_first_call(routed, prompts):
    large = Options(chunk=4, width=5, page=2)
    before = [program._cache_size() for program in (prefill, decode)]
    run(routed, prompts, options=large, seed=1)
    after = [program._cache_size() for program in (prefill, decode)]
    assert all(0 <= two - one <= 1 for one, two in zip(before, after, strict=True))
    run(routed, prompts[::-1], theta=0.3, temperature=0.7, top_p=0.9, seed=8, stop_ids=[4], options=large)
    run(routed, [[3] * 8, [1], [2, 5]], theta=1.0, options=large)
    assert [program._cache_size() for program in (prefill, decode)] == after


def test_the_loop_never_asks_the_host(routed, prompts, monkeypatch):
    """A chunk is one program without callbacks; what comes back is fetched once, after it."""
    programs, fetched, get = [], [], jax.device_get

    def watched(*arguments, **settings):
        programs.append(decode.lower(*arguments, **settings).as_text())
        with jax.transfer_guard("disallow"):
            return decode(*arguments, **settings)

    monkeypatch.setattr(streaming, "decode", watched)
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or get(tree))
    large = Options(chunk=4, width=5, page=2)
    found = chunks(routed, prompts, options=large)
    assert [part.tokens.shape[1] for part in found] == [4, 4, 2] and len(programs) == len(found)
    # Two parts of the prompts, what the cache holds after them, and the chunks.
    assert len(fetched) == 2 + 1 + len(found)
    for program in programs:
        assert "stablehlo.while" in program
        assert not any(word in program for word in ("callback", "infeed", "outfeed", "send", "recv"))


@pytest.mark.exhaustive  # tests/inference/test_advance.py has it for one call
def test_theta_zero_is_the_dense_model(routed, prompts):
    spec, params = routed
    dense = spec.structure.model_copy(update={"routing": None})
    bare = {**params, "layers": {n: {k: v for k, v in p.items() if k != "router"} for n, p in params["layers"].items()}}
    out = run(routed, prompts, theta=0.0)
    assert out.execute[:, :-1].all()
    np.testing.assert_array_equal(out.tokens, run((dense, bare), prompts).tokens)


def test_what_cannot_be_run_is_refused(routed, prompts):
    spec, params = routed
    with pytest.raises(ValueError, match="floating point or int8, found int4"):
        run(routed, prompts, options=Options(cache_dtype=jnp.dtype(jnp.int4)))
    with pytest.raises(ValueError, match="found Sampled"):
        next(
            stream(
                spec.structure,
                params,
                *padded(prompts),
                Sampled(jax.random.key(0)),
                jax.random.key(0),
                max_new_tokens=2,
            )
        )
