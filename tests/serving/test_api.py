"""The server through the official client."""

import asyncio
import http.client
import json
import socket
import time
from urllib.parse import urlsplit

import openai
import pytest

from qtale_jax.data import reasoning

pytestmark = pytest.mark.slow

NEW = 12
WORDS = list(reasoning.WORDS)
PROMPTS = [" ".join(WORDS[3 + 2 * i : 3 + 2 * i + size]) for i, size in enumerate((1, 4, 11, 3, 7, 2, 12, 5, 3, 9))]


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


@pytest.fixture(scope="module")
def expected(model):
    """What `Model.generate` says to each prompt alone."""
    return {prompt: model.generate([prompt], NEW)[0] for prompt in PROMPTS}


def raw(running, method: str, path: str, body: bytes | None = None) -> tuple[int, dict, bytes]:
    """A request as bytes: status, headers, body."""
    connection = http.client.HTTPConnection(urlsplit(running.url).netloc, timeout=120)
    connection.request(method, path, body)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def ask(**settings) -> bytes:
    return json.dumps({"model": "tiny", "prompt": PROMPTS[1], "temperature": 0, **settings}).encode()


def test_models_health_and_metrics(running, client):
    (card,) = client.models.list().data
    assert card.id == "tiny" == client.models.retrieve("tiny").id
    with pytest.raises(openai.NotFoundError, match="'other' is not here; allowed: 'tiny'"):
        client.models.retrieve("other")
    assert raw(running, "GET", "/health")[2] == b'{"status":"ok"}'
    client.completions.create(model="tiny", prompt=PROMPTS[1], max_tokens=4, extra_body={"ignore_eos": True})
    status, headers, text = raw(running, "GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    now = running.engine.statistics()
    assert float(values["qtale_executed_ratio"]) == pytest.approx(now.executed_ratio)
    assert float(values["qtale_kv_bytes_held"]) == now.kv_bytes_held and float(values["qtale_rows"]) == 3
    assert float(values["qtale_new_tokens_total"]) == now.new_tokens >= 4
    assert {"qtale_tokens_per_second", "qtale_requests_waiting", "qtale_kv_bytes"} <= set(values)
    assert float(values['qtale_http_responses_total{status="200"}']) >= 1


def test_a_completion_is_what_the_model_says(client, expected):
    for prompt in PROMPTS[:3]:
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=NEW, temperature=0)
        one = expected[prompt]
        assert found.object == "text_completion" and found.model == "tiny"
        assert found.choices[0].text == one.text and found.choices[0].finish_reason in ("stop", "length")
        assert found.usage.completion_tokens == len(one.tokens)
        assert found.usage.prompt_tokens == len(prompt.split()) + 1
        assert found.usage.executed_ratio == pytest.approx(one.executed_ratio, abs=1e-5)


def test_several_prompts_token_ids_and_options(client, model, expected):
    found = client.completions.create(model="tiny", prompt=PROMPTS[:4], max_tokens=NEW, temperature=0)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == [expected[prompt].text for prompt in PROMPTS[:4]]
    ids = running_ids(model, PROMPTS[1])
    found = client.completions.create(model="tiny", prompt=ids, max_tokens=NEW, temperature=0, extra_body={"theta": 0})
    dense = model.with_threshold(0.0).generate([PROMPTS[1]], NEW)[0]
    assert found.choices[0].text == dense.text and found.usage.executed_ratio == 1.0
    sampled = [client.completions.create(model="tiny", prompt=PROMPTS[4], seed=5, top_p=0.9) for _ in range(2)]
    alone = model.generate([PROMPTS[4]], 16, 1.0, 0.9, seed=5)[0]
    assert sampled[0].choices[0].text == sampled[1].choices[0].text == alone.text
    word = alone.text.split()[3]
    found = client.completions.create(model="tiny", prompt=PROMPTS[4], seed=5, top_p=0.9, stop=[word], n=1)
    assert found.choices[0].text == alone.text[: alone.text.index(word)]
    assert found.choices[0].finish_reason == "stop"


def running_ids(model, text):
    tokenizer = model.tokenizer
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_a_stream_has_the_same_text_in_pieces(client, expected):
    for prompt in PROMPTS[:3]:
        stream = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=NEW,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected[prompt].text
        reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
        assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])
        assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == len(expected[prompt].tokens)


def test_chat(client, model):
    messages = [{"role": "system", "content": WORDS[3]}, {"role": "user", "content": f"{WORDS[5]} {WORDS[9]}"}]
    alone = model.generate([f"{WORDS[3]} {WORDS[5]} {WORDS[9]} ="], NEW)[0]
    # An answer is a text of its own, which begins with no space.
    answer = alone.text.removeprefix(" ")
    settings = {"model": "tiny", "messages": messages, "temperature": 0}
    found = client.chat.completions.create(**settings, max_completion_tokens=NEW)
    assert found.object == "chat.completion" and found.choices[0].message.role == "assistant"
    assert found.choices[0].message.content == answer != alone.text and found.usage.prompt_tokens == 5
    parts = [{"role": "user", "content": [{"type": "text", "text": f"{WORDS[3]} {WORDS[5]} {WORDS[9]}"}]}]
    chunks = list(client.chat.completions.create(**settings | {"messages": parts}, max_tokens=NEW, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    longest = client.chat.completions.create(**settings)
    assert longest.usage.total_tokens == 32 or longest.choices[0].finish_reason == "stop"


BAD = [
    (b"{oops", "not valid JSON"),
    (b"[]", "the body"),
    (ask(prompt=None), "prompt"),
    (b'{"model": "tiny"}', "prompt: missing"),
    (ask(prompt=[]), "prompt"),
    (ask(prompt=[1, "a"]), "prompt"),
    (ask(prompt=[99]), "allowed: ids from 0 to 63"),
    (ask(prompt="xylophone"), "cannot encode"),
    (ask(max_tokens=0), "max_tokens"),
    (ask(max_tokens="5"), "max_tokens"),
    (ask(max_tokens=29), "max_tokens=29; allowed: up to 28"),
    (ask(max_tokens=28), "a prompt of 5 tokens and 28 new ones exceed the context of 32"),
    (ask(temperature=-1), "temperature"),
    (ask(temperature=float("nan")), "temperature"),
    (ask(top_p=0), "top_p"),
    (ask(stop=[""]), "stop"),
    (ask(theta=2), "theta"),
    (ask(ignore_eos=1), "ignore_eos"),
    (ask(theta=[0.1]), "1 thresholds for 2 routed layers"),
    (ask(stream=True, stream_options={"include_obfuscation": "yes"}), "stream_options"),
    (ask(stream=True, stream_options={"usage": True}), "stream_options.usage: unknown key"),
    (ask(n=2), "n is not supported; allowed: null or 1"),
    (ask(logprobs=5), "logprobs is not supported"),
    (ask(temprature=1), "temprature: unknown key"),
]


@pytest.mark.parametrize(("body", "message"), BAD, ids=lambda value: str(value)[:40])
def test_malformed_requests_are_400(running, body, message):
    status, _, text = raw(running, "POST", "/v1/completions", body)
    error = json.loads(text)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error"), error
    assert message in error["message"] and "\n" not in error["message"] and set(error) >= {"param", "code"}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"max_tokens": 29}, "max_tokens"),
        ({"max_completion_tokens": 29}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 29}, "max_completion_tokens"),
    ],
)
def test_an_error_about_the_new_tokens_names_the_key_that_asked_for_them(running, asked, named):
    body = {"model": "tiny", "messages": [{"role": "user", "content": WORDS[3]}], **asked}
    status, _, text = raw(running, "POST", "/v1/chat/completions", json.dumps(body).encode())
    error = json.loads(text)["error"]
    assert (status, error["message"], error["param"]) == (400, f"{named}=29; allowed: up to 28", named)


@pytest.mark.parametrize("padded", [True, False, None])
def test_a_stream_may_be_asked_for_padding_and_has_none(client, expected, padded):
    options = {"include_usage": True, "include_obfuscation": padded}
    settings = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": NEW, "temperature": 0}
    *chunks, last = client.completions.create(**settings, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[PROMPTS[1]].text
    assert last.usage.completion_tokens == len(expected[PROMPTS[1]].tokens)
    assert not any(hasattr(chunk, "obfuscation") for chunk in chunks)


def test_a_request_that_ignores_end_tokens_has_all_that_it_asked_for(running, client, model):
    """Beside one that ends with them."""
    prompt, own = PROMPTS[4], model.tokenizer.eos_token_id
    alone = {seed: model.generate([prompt], NEW, 1.0, 1.0, seed=seed)[0] for seed in range(40)}
    seed = next(seed for seed, found in alone.items() if own in found.tokens[: NEW - 4])
    settings = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "seed": seed, "stream": True}
    settings["stream_options"] = {"include_usage": True}
    streams = [client.completions.create(**settings, extra_body={"ignore_eos": asked}) for asked in (False, True, None)]
    chunks = [list(stream) for stream in streams]
    texts = ["".join(chunk.choices[0].text for chunk in each[:-1]) for each in chunks]
    assert [each[-2].choices[0].finish_reason for each in chunks] == ["stop", "length", "stop"]
    ended = len(alone[seed].tokens)
    assert [each[-1].usage.completion_tokens for each in chunks] == [ended, NEW, ended]
    assert texts[0] == texts[2] == alone[seed].text and texts[1].startswith(texts[0]) and texts[1] != texts[0]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": WORDS[3]}], "max_tokens": NEW}
    answers = [client.chat.completions.create(**chat, seed=i, extra_body={"ignore_eos": True}) for i in range(12)]
    assert {(one.usage.completion_tokens, one.choices[0].finish_reason) for one in answers} == {(NEW, "length")}
    assert running.is_idle()


def test_other_refusals(running, client):
    assert json.loads(raw(running, "GET", "/v1/completions")[2])["error"]["message"].startswith("GET is not allowed")
    assert raw(running, "POST", "/v1/nothing", b"{}")[0] == 404
    status, _, text = raw(running, "POST", "/v1/completions", ask(prompt=" ".join(["1"] * 4000)))
    assert status == 413 and json.loads(text)["error"]["code"] == "body_too_large"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="tinny", prompt="a")
    assert caught.value.code == "model_not_found" and "did you mean 'tiny'" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=PROMPTS[6], max_tokens=25)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="tiny", messages=[])
    assert running.is_idle()


def test_forty_streams_at_once_and_nobody_notices_the_bad_ones(running, expected):
    """The text of each is that of a single request, while others are malformed or hang up."""

    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=20, timeout=120) as client:

            async def stream(prompt: str) -> str:
                settings = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0}
                answer = await client.completions.create(**settings, stream=True)
                return "".join([chunk.choices[0].text async for chunk in answer])

            async def leave(prompt: str) -> None:
                settings = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0}
                async with await client.completions.create(**settings, stream=True) as answer:
                    async for _ in answer:
                        break

            async def bad() -> str:
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.completions.create(model="tiny", prompt="xylophone", max_tokens=3)
                return str(caught.value.status_code)

            work = [stream(PROMPTS[i % 10]) for i in range(40)]
            others = [leave(PROMPTS[i]) for i in range(5)] + [bad() for _ in range(5)]
            mixed = [one for pair in zip(others, work[:10], strict=True) for one in pair] + work[10:]
            found = await asyncio.gather(*mixed)
            return [text for text in found[1:20:2]] + list(found[20:])

    texts = asyncio.run(everyone())
    assert texts == [expected[PROMPTS[i % 10]].text for i in range(40)]
    assert running.is_idle()


@pytest.mark.parametrize("streams", [True, False])
def test_who_hangs_up_gives_the_row_back(running, streams):
    """While the engine stands still, so that the request cannot have ended by itself."""
    before = running.engine.statistics().finished.get("cancelled", 0)
    with running.engine._stepping:
        host, port = urlsplit(running.url).netloc.split(":")
        with socket.create_connection((host, int(port))) as connection:
            body = ask(max_tokens=20, stream=streams)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            while not running.engine.busy:
                time.sleep(0.01)
        request = next(iter(running.engine._schedule.requests))
        while not request.cancelled:
            time.sleep(0.01)
    assert running.is_idle() and running.engine.statistics().finished["cancelled"] == before + 1


def test_a_full_queue_and_a_request_that_takes_too_long(running, client, expected):
    settings = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": NEW, "temperature": 0}
    with running.engine._stepping:
        streams = [client.completions.create(**settings, stream=True) for _ in range(43)]
        with pytest.raises(openai.RateLimitError, match="the queue is full") as caught:
            client.completions.create(**settings)
        assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "1"
    assert all("".join(chunk.choices[0].text for chunk in one) == expected[PROMPTS[1]].text for one in streams)
    limit, running.service.timeout = running.service.timeout, 0.2
    try:
        with running.engine._stepping:
            with pytest.raises(openai.InternalServerError) as late:
                client.completions.create(**settings)
            assert late.value.status_code == 504 and late.value.code == "timeout"
            with pytest.raises(openai.APIError, match="took longer than 0.2 seconds"):
                list(client.completions.create(**settings, stream=True))
    finally:
        running.service.timeout = limit
    assert running.is_idle()
