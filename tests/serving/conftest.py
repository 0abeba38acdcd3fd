"""A server in a thread, for a small model that chats."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax import Engine, EngineOptions, Model
from qtale_jax.config.serving import ServeConfig
from qtale_jax.data import reasoning
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification
from qtale_jax.serving.server import Server, address, bound_socket
from qtale_jax.serving.service import Service

TEMPLATE = "{{ bos_token }}{% for turn in messages %} {{ turn.content }}{% endfor %} ="


@dataclass
class Running:
    """A server, its thread, and where it is."""

    server: Server
    service: Service
    url: str
    thread: threading.Thread
    paused: bool = field(default=False)

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def is_idle(self, seconds: float = 60.0) -> bool:
        """Whether every row and every page comes back in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            now = self.engine.statistics()
            if not (now.running or now.waiting or now.kv_bytes or self.service._open):
                return True
            time.sleep(0.01)
        return False

    def end(self) -> None:
        """Does what SIGTERM does, and waits."""
        self.server.handle_exit(15, None)
        self.thread.join(60)
        assert not self.thread.is_alive()


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
    tokenizer = reasoning.tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = Model(spec, initialize(spec, jax.random.key(6)), tokenizer, {})
    seen = found.forward(jax.random.randint(jax.random.key(1), (8, 12), 0, 64, jnp.int32)).routing.probability
    return found.with_threshold(np.median(np.asarray(seen[:, 2:]), axis=(0, 1)).tolist())


@pytest.fixture(scope="session")
def start(model) -> Callable[..., Running]:
    """Starts a server of its own."""

    def run(grace: float = 30.0, **settings) -> Running:
        engine = Engine(model, EngineOptions(rows=3, queue=40, context=32, pool=0.4, chunk=4, width=4, page=4))
        engine.warm_up()
        service = Service(engine, "tiny", ServeConfig(**settings))
        listener = bound_socket("127.0.0.1", 0)
        server = Server(service, grace)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return Running(server, service, address(listener), thread)

    return run


@pytest.fixture(scope="module")
def running(start) -> Iterator[Running]:
    """A server that the tests of a module share."""
    found = start(max_body_bytes=4096, max_new_tokens=28)
    yield found
    found.end()
    found.service.worker.stop()
