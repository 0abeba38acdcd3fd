"""Requests that share a batch: each gets what it would get alone, and leaves nothing behind."""

import dataclasses
import threading
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_jax import Engine, EngineOptions, Model, RequestOptions
from qtale_jax.data import reasoning
from qtale_jax.engine.requests import QueueFull, TooLong
from qtale_jax.errors import InputError
from qtale_jax.inference.decode import decode
from qtale_jax.inference.joining import join, leave
from qtale_jax.inference.prefill import prefill
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification

pytestmark = pytest.mark.slow

# Three rows whose pages do not suffice for three long requests: some are interrupted.
OPTIONS = EngineOptions(rows=3, queue=40, context=32, pool=0.4, chunk=4, width=4, page=4)
NEW = 12
WORDS = list(reasoning.WORDS)
PROMPTS = [" ".join(WORDS[3 + 2 * i : 3 + 2 * i + size]) for i, size in enumerate((1, 4, 11, 3, 7, 2, 12, 5, 3, 9))]


@pytest.fixture(scope="session")
def model() -> Model:
    """Two routed layers that about half of the tokens skip."""
    architecture = Architecture(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=64,
    )
    routing = RoutingSpecification(method="qtale", always_on_layers=0, router_hidden=8)
    spec = ModelSpecification(architecture=architecture, routing=routing)
    found = Model(spec, initialize(spec, jax.random.key(6)), reasoning.tokenizer(), {})
    seen = found.forward(jax.random.randint(jax.random.key(1), (8, 12), 0, 64, jnp.int32)).routing.probability
    return found.with_threshold(np.median(np.asarray(seen[:, 2:]), axis=(0, 1)).tolist())


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    """An engine that is warm and idle; every test has to leave it so."""
    found = Engine(model, OPTIONS)
    found.warm_up()
    return found


@pytest.fixture(scope="session")
def alone(model):
    """What `Model.generate` says to a prompt that is all there is."""

    @cache
    def generate(prompt: str, **settings):
        return model.generate([prompt], NEW, **settings)[0]

    return generate


def is_idle(engine: Engine) -> None:
    """Nothing runs, every row is free and every page unused, on the device and in the mirror."""
    assert not engine.busy and not engine.step()
    batch, schedule = engine._batch, engine._schedule
    cache, rows = jax.device_get((batch._cache, batch._rows.done))
    assert rows.all() and not cache.counts.any() and not batch.counts.any()
    assert int(cache.used) == batch.used == engine.statistics().kv_bytes == 0
    assert sorted(cache.order.tolist()) == list(range(batch.shape.pages))
    assert schedule.free == OPTIONS.rows and not schedule.running and not schedule.waiting
    assert not batch._last


def agrees(completion, expected, count=NEW):
    """The first `count` tokens of what a request says alone."""
    assert completion.tokens == expected.tokens[:count]
    if len(completion.tokens) == len(expected.tokens):
        assert completion.text == expected.text
        assert completion.executed_ratio == pytest.approx(expected.executed_ratio, abs=1e-9)


def test_everyone_gets_what_he_would_get_alone_and_nothing_is_compiled(engine, alone, model):
    programs = (prefill, join, decode, leave)
    before = [program._cache_size() for program in programs]
    counts = [1 + (5 * i) % NEW for i in range(20)]
    streams = [engine.submit(PROMPTS[i % 10], RequestOptions(max_new_tokens=n)) for i, n in enumerate(counts)]
    engine.run()
    assert [program._cache_size() for program in programs] == before
    is_idle(engine)
    seen = engine.statistics()
    for i, (stream, count) in enumerate(zip(streams, counts, strict=True)):
        completion, expected = stream.result(), alone(PROMPTS[i % 10])
        agrees(completion, expected, count)
        assert "".join(stream) == completion.text
        ended = model.tokenizer.eos_token_id in completion.tokens
        assert completion.finish_reason == ("stop" if ended else "length")
    assert seen.new_tokens == sum(len(stream.result().tokens) for stream in streams)
    assert 0.2 < seen.executed_ratio < 0.8 and seen.finished["length"] > 10
    executed, layers = (sum(getattr(s.result(), name) for s in streams) for name in ("executed_layers", "layers"))
    # What an interrupted request ran is run, and counted, again.
    assert seen.executed_layers >= executed and seen.layers >= layers


def test_interrupted_requests_say_the_same(model, engine, alone):
    before = engine.statistics().interruptions
    dense = model.with_threshold(0.0)
    prompts = [PROMPTS[index] for index in (1, 3, 8)]
    streams = [engine.submit(prompt, RequestOptions(NEW, theta=0.0)) for prompt in prompts]
    sampled = engine.submit(prompts[0], RequestOptions(NEW, 1.5, 0.9, seed=7, theta=0.0))
    engine.run()
    assert engine.statistics().interruptions > before
    is_idle(engine)
    for prompt, stream in zip(prompts, streams, strict=True):
        agrees(stream.result(), dense.generate([prompt], NEW)[0])
        assert stream.result().executed_ratio == 1.0
    assert sampled.result().tokens == dense.generate([prompts[0]], NEW, 1.5, 0.9, seed=7)[0].tokens


def test_every_request_has_its_own_options(model, engine, alone):
    prompt = PROMPTS[4]
    cases = [
        (RequestOptions(NEW), model, {}),
        (RequestOptions(NEW, theta=1.0), model.with_threshold(1.0), {}),
        (RequestOptions(NEW, temperature=2.0, seed=3), model, {"temperature": 2.0, "seed": 3}),
        (RequestOptions(NEW, temperature=2.0, top_p=0.5, seed=4), model, {"temperature": 2.0, "top_p": 0.5, "seed": 4}),
        (RequestOptions(NEW, theta=(0.0, 1.0)), model.with_threshold((0.0, 1.0)), {}),
    ]
    streams = [engine.submit(prompt, options) for options, _, _ in cases]
    engine.run()
    found = [stream.result() for stream in streams]
    for one, (_, other, arguments) in zip(found, cases, strict=True):
        agrees(one, other.generate([prompt], NEW, **arguments)[0])
    assert len({tuple(one.tokens) for one in found[:4]}) > 2
    is_idle(engine)


def test_first_come_first_served(engine):
    order = []
    streams = []
    for number in range(9):
        # The longest prompts first: the short ones behind them do not overtake.
        prompt, length = (PROMPTS[6], 2) if number < 4 else (PROMPTS[0], 2)
        first = threading.Event()

        def told(update, number=number, first=first):
            if not first.is_set():
                first.set()
                order.append(number)

        streams.append(engine.submit(prompt, RequestOptions(length), told))
    engine.run()
    assert order == sorted(order) and len(order) == 9
    is_idle(engine)


def test_tokens_that_only_the_checkpoint_says_end_a_turn_end_it(model, alone):
    prompt = next(prompt for prompt in PROMPTS if len(alone(prompt).tokens) == NEW)
    free = alone(prompt).tokens
    place = next(i for i in range(2, NEW) if free[i] not in free[:i])
    config = {"eos_token_id": [63, free[place]]}
    chat = dataclasses.replace(model, provenance={"huggingface": {"generation_config": config}})
    engine = Engine(chat, OPTIONS)
    engine.warm_up()
    programs = (prefill, join, decode, leave)
    before = [program._cache_size() for program in programs]
    found = engine.submit(prompt, RequestOptions(NEW)).result()
    assert found.tokens == free[: place + 1] and found.finish_reason == "stop"
    assert found.text == chat.generate([prompt], NEW)[0].text
    assert [program._cache_size() for program in programs[:2]] == before[:2]
    is_idle(engine)


def test_end_tokens_end_no_row_that_ignores_them(model, alone):
    """While they end the others of the batch, and nothing is compiled for it; also after an interruption."""
    prompts = [prompt for prompt in PROMPTS if len(alone(prompt).tokens) == NEW][:3]
    free = [alone(prompt).tokens for prompt in prompts]
    ends = {tokens[3] for tokens in free}  # so every one of them would end within four tokens
    config = {"eos_token_id": sorted(ends)}
    chat = dataclasses.replace(model, provenance={"huggingface": {"generation_config": config}})
    engine = Engine(chat, OPTIONS)
    engine.warm_up()
    programs = (prefill, join, decode, leave)
    before = [program._cache_size() for program in programs]

    def asked(*ignoring: bool, **settings):
        options = [RequestOptions(NEW, ignore_eos=ignores, **settings) for ignores in ignoring]
        streams = [engine.submit(prompt, one) for prompt, one in zip(prompts, options, strict=True)]
        engine.run()
        return [stream.result() for stream in streams]

    first, second, third = asked(True, False, True)
    assert (first.tokens, third.tokens) == (free[0], free[2])
    assert (first.finish_reason, third.finish_reason) == ("length", "length")
    place = next(i for i, token in enumerate(free[1]) if token in ends)
    assert second.tokens == free[1][: place + 1] and second.finish_reason == "stop" and place <= 3
    interrupted = engine.statistics().interruptions
    for found, tokens in zip(asked(True, True, True, theta=0.0), asked(False, False, False, theta=0.0), strict=True):
        assert len(found.tokens) == NEW and found.tokens[: len(tokens.tokens)] == tokens.tokens
    assert engine.statistics().interruptions > interrupted
    last = free[0][:4]  # an end token that comes last is no reason for the end
    found = engine.submit(prompts[0], RequestOptions(4, ignore_eos=True)).result()
    assert found.tokens == last and found.finish_reason == "length"
    word = next(word for word in first.text.split() if word)
    stopped = engine.submit(prompts[0], RequestOptions(NEW, ignore_eos=True, stop=(word,))).result()
    assert stopped.finish_reason == "stop" and word not in stopped.text
    assert [program._cache_size() for program in programs] == before
    is_idle(engine)


def test_stop_strings_may_span_tokens(engine, alone, model):
    expected = next(found for found in map(alone, PROMPTS) if len(found.tokens) == NEW)
    prompt = next(prompt for prompt in PROMPTS if alone(prompt) == expected)
    words = expected.text.split(" ")
    # The end of one word and the beginning of the next, which come in different chunks.
    place = next(i for i in range(3, len(words) - 1) if words[i] and words[i + 1])
    stop = f"{words[place][-1]} {words[place + 1][0]}"
    cut = expected.text.index(stop)
    stream = engine.submit(prompt, RequestOptions(NEW, stop=("never there", stop)))
    pieces = list(stream)
    found = stream.result()
    assert found.text == "".join(pieces) == expected.text[:cut] and found.finish_reason == "stop"
    count = next(n for n in range(1, NEW + 1) if stop in model.tokenizer.decode(expected.tokens[:n]))
    assert found.tokens == expected.tokens[:count]
    assert engine.submit(prompt, RequestOptions(NEW, stop=("never there",))).result().text == expected.text
    is_idle(engine)


def test_cancelled_requests_leave_at_the_next_step(engine, alone):
    streams = [engine.submit(prompt, RequestOptions(NEW)) for prompt in PROMPTS[:6]]
    engine.step()
    for number in (0, 2, 5):  # two that run, one that waits
        streams[number].cancel()
    engine.step()
    assert [stream.completion is not None for stream in streams] == [True, False, True, False, False, True]
    engine.run()
    for number, stream in enumerate(streams):
        if number in (0, 2, 5):
            found = stream.result()
            assert found.finish_reason == "cancelled"
            assert found.tokens == alone(PROMPTS[number]).tokens[: len(found.tokens)]
        else:
            agrees(stream.result(), alone(PROMPTS[number]))
    streams[1].cancel()
    is_idle(engine)


def test_what_cannot_be_is_refused(engine, model):
    for options, message in [
        (RequestOptions(0), "max_new_tokens=0; allowed: 1 or more"),
        (RequestOptions(temperature=-1.0), "temperature=-1"),
        (RequestOptions(temperature=float("nan")), "temperature=nan"),
        (RequestOptions(top_p=0.0), "top_p=0; allowed: above 0"),
        (RequestOptions(seed=2**32), "seed="),
        (RequestOptions(stop=("a", "")), "stop="),
        (RequestOptions(stop="text"), "stop="),
        (RequestOptions(theta=(0.1, 0.2, 0.3)), "3 thresholds for 2 routed layers; allowed: 1 or 2"),
        (RequestOptions(theta=1.5), "theta=1.5; allowed: 0 to 1"),
    ]:
        with pytest.raises(InputError, match=message):
            engine.submit(PROMPTS[0], options)
    with pytest.raises(TooLong, match="a prompt of 13 tokens and 20 new ones exceed the context of 32"):
        engine.submit(PROMPTS[6], RequestOptions(20))
    with pytest.raises(InputError, match="cannot encode"):
        engine.submit("xylophone")
    for ids in ([], [64], [-1]):
        with pytest.raises(InputError, match="allowed: ids from 0 to 63"):
            engine.submit(ids)
    streams = [engine.submit([5], RequestOptions(1)) for _ in range(OPTIONS.rows + OPTIONS.queue)]
    with pytest.raises(QueueFull, match="the queue is full: 0 requests run and 43 wait; allowed: 40"):
        engine.submit([5], RequestOptions(1))
    engine.run()
    assert all(len(stream.result().tokens) == 1 for stream in streams)
    is_idle(engine)
    for changed, message in [
        ({"rows": 0}, "rows=0; allowed: 1 or more"),
        ({"queue": -1}, "queue=-1"),
        ({"pool": 0.0}, "pool=0"),
        ({"context": 65}, "context=65; allowed: 2 to 64"),
        ({"kv_cache": "int4"}, "kv_cache='int4'"),
    ]:
        with pytest.raises(InputError, match=message):
            Engine(model, EngineOptions(**changed))


actions = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"), st.integers(0, 9), st.integers(1, NEW), st.sampled_from([None, 0.0, 1.0]), st.booleans()
        ),
        st.tuples(st.just("step")),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
    ),
    min_size=5,
    max_size=30,
)


@given(actions)
@settings(max_examples=25)
def test_no_row_and_no_page_is_lost_whatever_happens(engine, actions):
    streams, before = [], Counter(engine.statistics().finished)
    for action, *arguments in actions:
        if action == "submit":
            prompt, count, theta, stops = arguments
            stop = ("1", " 2") if stops else ()
            streams.append(engine.submit(PROMPTS[prompt], RequestOptions(count, theta=theta, stop=stop)))
        elif action == "step":
            engine.step()
            batch = engine._batch
            held = [
                page
                for layer in range(2)
                for row in range(OPTIONS.rows)
                for page in np.asarray(batch._cache.table)[layer, row][: -(-int(batch.counts[layer, row]) // 4)]
            ]
            assert len(set(held)) == len(held) == batch.used <= batch.shape.pages
            assert set(engine._schedule.running) == {row for row in range(3) if row not in engine._schedule._free}
        elif streams:
            streams[arguments[0] % len(streams)].cancel()
    engine.run()
    is_idle(engine)
    assert all(stream.completion is not None for stream in streams)
    assert sum(engine.statistics().finished.values()) - sum(before.values()) == len(streams)


def test_requests_come_from_other_threads(engine, alone):
    found = {}

    def ask(prompt):
        done = threading.Event()
        pieces = []

        def told(update):
            pieces.append(update.text)
            if update.completion:
                found[prompt] = (update.completion, "".join(pieces))
                done.set()

        engine.submit(prompt, RequestOptions(NEW), told)
        assert done.wait(120)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if engine.wait(0.01):
            engine.step()
    assert len(found) == len(PROMPTS)
    for prompt, (completion, text) in found.items():
        agrees(completion, alone(prompt))
        assert text == completion.text
    is_idle(engine)


def test_a_failed_engine_ends_everyone(model):
    engine = Engine(model, OPTIONS)
    streams = [engine.submit([token], RequestOptions(NEW)) for token in (5, 6)]
    engine.abandon()
    assert [stream.result().finish_reason for stream in streams] == ["failed", "failed"] and not engine.busy
