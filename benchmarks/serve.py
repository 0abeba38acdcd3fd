"""What the server does to many clients: 200 streams at once, then 2,000 requests of which some are bad, then SIGTERM.

python benchmarks/serve.py --output benchmarks/results/serve_cpu.json

The model is tiny and random: requests and their ways to go wrong are counted here, not arithmetic. Texts are compared
with those of single requests at temperature 0. Lost: a good request without its whole text, or a bad one without the
refusal that is due. Leaked: rows or pages that are not free when nobody asks for anything.
"""

import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import jax
import openai
import yaml
from harness import Row, parser, report

import qtale_jax
from qtale_jax.artifact import save_model
from qtale_jax.data import reasoning
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification

ARCHITECTURE = Architecture(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=128,
)
NEW, CONTEXT = 24, 64
SERVE = {"model": "tiny", "port": 0, "rows": 16, "queue": 256, "context": CONTEXT, "pool": 0.5, "width": 32}


def make_model(path: Path) -> None:
    """A random model whose routers skip about half."""
    routing = RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8)
    spec = ModelSpecification(architecture=ARCHITECTURE, routing=routing)
    model = qtale_jax.Model(spec, initialize(spec, jax.random.key(0)), reasoning.tokenizer(), {})
    tokens = jax.random.randint(jax.random.key(1), (8, 32), 0, ARCHITECTURE.vocab_size)
    theta = jax.numpy.median(model.forward(tokens).routing.probability[:, 2:], axis=(0, 1))
    found = model.with_threshold(theta.tolist())
    save_model(path, found.spec, found.params, tokenizer=found.tokenizer)


def prompts(count: int) -> list[str]:
    """Random words, 1 to 30 of them."""
    draw, words = random.Random(0), list(reasoning.WORDS)[3:]
    return [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(count)]


@dataclass
class Running:
    """A server's process, its address and its metrics."""

    process: subprocess.Popen
    url: str

    def metrics(self) -> dict[str, float]:
        """All samples by name."""
        with urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    def leaked(self) -> tuple[int, int]:
        """Rows and bytes of pages that are still taken; waits ten seconds for them."""
        end, found = time.monotonic() + 10, (1, 1)
        while any(found) and time.monotonic() < end:
            now = self.metrics()
            waiting = now["qtale_requests_running"] + now["qtale_requests_waiting"]
            found = int(waiting), int(now["qtale_kv_bytes"])
            time.sleep(0.05)
        return found


@contextmanager
def server(folder: Path) -> Iterator[Running]:
    """A server's process that is ready."""
    (folder / "config.yaml").write_text(yaml.safe_dump({"serve": SERVE}))
    command = [sys.executable, "-m", "qtale_jax.serve", "config.yaml"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("serving"):
                raise SystemExit("the server did not start")
            yield Running(process, line.split()[-1])
        finally:
            process.kill()


def client(url: str) -> openai.AsyncOpenAI:
    """The official client; a full queue makes it try again."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=100, timeout=600)


async def stream(api: openai.AsyncOpenAI, prompt: str) -> str:
    """The text of a stream."""
    answer = await api.completions.create(model="tiny", prompt=prompt, max_tokens=NEW, temperature=0, stream=True)
    return "".join([chunk.choices[0].text async for chunk in answer])


async def singles(url: str, texts: list[str]) -> dict[str, str]:
    """What each prompt gives alone, one after the other."""
    async with client(url) as api:
        return {prompt: await stream(api, prompt) for prompt in texts}


async def together(url: str, texts: list[str]) -> list[str]:
    """All of them at once."""
    async with client(url) as api:
        return list(await asyncio.gather(*(stream(api, prompt) for prompt in texts)))


KINDS = ("good", "whole", "malformed", "unknown", "oversize", "leaves", "hangs up")
WEIGHTS = (50, 15, 8, 7, 8, 6, 6)


async def mixed(url: str, expected: dict[str, str], count: int) -> tuple[Counter, Counter]:
    """Requests of all kinds, 100 at a time: how many there were of each kind, and how many did not get what is due."""
    draw, texts = random.Random(1), list(expected)
    kinds = draw.choices(KINDS, WEIGHTS, k=count)
    lost: Counter[str] = Counter()
    gate = asyncio.Semaphore(100)
    async with client(url) as api:

        async def one(kind: str, prompt: str) -> None:
            async with gate:
                if not await _due(api, url, kind, prompt, expected[prompt]):
                    lost[kind] += 1

        await asyncio.gather(*(one(kind, draw.choice(texts)) for kind in kinds))
    return Counter(kinds), lost


async def _due(api: openai.AsyncOpenAI, url: str, kind: str, prompt: str, text: str) -> bool:
    """Whether a request got what is due to its kind."""
    settings = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0}
    if kind == "good":
        return await stream(api, prompt) == text
    if kind == "whole":
        return (await api.completions.create(**settings)).choices[0].text == text
    if kind == "malformed":
        status, body = await _bytes(url, b'{"model": "tiny", "prompt": [')
        return status == 400 and json.loads(body)["error"]["type"] == "invalid_request_error"
    if kind == "leaves":
        async with await api.completions.create(**settings, stream=True) as answer:
            async for _ in answer:
                break
        return True
    if kind == "hangs up":
        await _bytes(url, json.dumps(settings).encode(), wait=False)
        return True
    try:
        changed = {"prompt": "xylophone"} if kind == "unknown" else {"max_tokens": CONTEXT}
        await api.completions.create(**settings | changed)
    except openai.BadRequestError as error:
        return kind == "unknown" or error.code == "context_length_exceeded"
    return False


async def _bytes(url: str, body: bytes, wait: bool = True) -> tuple[int, bytes]:
    """A request of raw bytes; without `wait` the connection is closed before there is an answer."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    answer = await reader.read() if wait else b"HTTP/1.1 0 \r\n\r\n"
    writer.close()
    first, _, rest = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]), rest


async def interrupted(running: Running, expected: dict[str, str], count: int) -> Counter:
    """SIGTERM when a quarter of so many streams have begun: what became of all of them.

    Returns:
        Streams that were `open` at the signal; those that `finished` with their whole text, were `refused` with 503, or
        came `later` than the end; and those that began and were `lost`.
    """
    found: Counter[str] = Counter()

    async def one(api: openai.AsyncOpenAI, prompt: str) -> str:
        settings = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True}
        try:
            answer = await api.completions.create(**settings)
        except openai.InternalServerError as error:
            return "refused" if error.status_code == 503 else "lost"
        except openai.APIConnectionError:
            return "later"
        found["begun"] += 1
        text = ""
        try:
            async for chunk in answer:
                text += chunk.choices[0].text
                if "open" not in found and found["begun"] >= count // 4:
                    running.process.send_signal(signal.SIGTERM)
                    found["open"] = found["begun"] - found["finished"]
        except openai.APIError:
            return "lost"
        return "finished" if text == expected[prompt] else "lost"

    async def counted(api: openai.AsyncOpenAI, prompt: str) -> None:
        found[await one(api, prompt)] += 1

    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0, timeout=600) as api:
        await asyncio.gather(*(counted(api, prompt) for prompt in list(expected)[:count]))
    return found


def measure(streams: int, requests: int) -> list[Row]:
    """Runs all three parts against one server."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "tiny")
        with server(Path(folder)) as running:
            texts = prompts(streams)
            start = time.perf_counter()
            alone = asyncio.run(singles(running.url, texts))
            single = time.perf_counter() - start
            tokens = running.metrics()["qtale_new_tokens_total"]
            start = time.perf_counter()
            found = asyncio.run(together(running.url, texts))
            seconds = time.perf_counter() - start
            lost = sum(text != alone[prompt] for text, prompt in zip(found, texts, strict=True))
            rate, one = f"{streams} streams at once", "one after the other"
            rows += [
                Row(one, tokens / single, "tokens/s"),
                Row(rate, tokens / seconds, "tokens/s", one, single / seconds),
                Row(f"{streams} streams at once: other text than alone", lost, "requests"),
            ]
            start = time.perf_counter()
            kinds, lost_kinds = asyncio.run(mixed(running.url, alone, requests))
            seconds = time.perf_counter() - start
            slots, kv_bytes = running.leaked()
            now = running.metrics()
            rows += [Row(f"{requests} requests: {kind}", kinds[kind], "requests") for kind in KINDS]
            rows += [
                Row(f"{requests} requests: all", requests / seconds, "requests/s"),
                Row(f"{requests} requests: lost", sum(lost_kinds.values()), "requests"),
                Row(f"{requests} requests: leaked rows", slots, "rows"),
                Row(f"{requests} requests: leaked KV pages", kv_bytes, "bytes"),
                Row("executed ratio", now["qtale_executed_ratio"], "of all layers"),
                Row("requests that lost their row for want of pages", now["qtale_interruptions_total"], "times"),
            ]
            became = asyncio.run(interrupted(running, alone, streams))
            code = running.process.wait(120)
            rows += [
                Row(f"SIGTERM among {streams} streams: {name}", became[name], "requests")
                for name in ("open", "finished", "refused", "later", "lost")
            ]
            rows.append(Row(f"SIGTERM among {streams} streams: exit code", code, "code"))
    return rows


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--streams", type=int, default=200, help="streams at once (default 200)")
    arguments.add_argument("--requests", type=int, default=2000, help="mixed requests (default 2000)")
    found = arguments.parse_args()
    report("serve", measure(found.streams, found.requests), found.output)


if __name__ == "__main__":
    main()
