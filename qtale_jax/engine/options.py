"""What an engine is made with, and what comes with every request."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import ArrayLike, Float32

from qtale_jax.errors import InputError
from qtale_jax.inference.pages import PAGE
from qtale_jax.inference.policies import layer_thresholds
from qtale_jax.models.specification import ModelSpecification


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch: rows, most tokens of one, pages, their slots, tokens of a chunk and of a part of a prompt."""

    rows: int
    context: int
    pages: int
    page: int
    chunk: int
    width: int


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine. All shapes follow from them, so nothing is compiled after the first requests.

    Attributes:
        rows: requests that run at the same time.
        queue: requests that wait for a row; more are refused.
        context: most tokens of a request, prompt and new ones; None: the model's context.
        pool: pages of the KV cache, as a share of those with which all rows could keep every token of their context in
            every layer. Below 1 it may run out: the request that came last then gives its row up, and runs again when
            there is room.
        chunk: tokens that the rows decode between the times that others join and leave.
        width: tokens of prompts that run in between.
        page: slots of a page of the cache.
        kv_cache: form of cached keys and values, see `Model.generate`.
    """

    rows: int = 16
    queue: int = 256
    context: int | None = None
    pool: float = 1.0
    chunk: int = 8
    width: int = 128
    page: int = PAGE
    kv_cache: Literal["float", "int8"] = "float"

    def __post_init__(self):
        for name in ("rows", "chunk", "width", "page"):
            if getattr(self, name) < 1:
                raise InputError(f"engine: {name}={getattr(self, name)}; allowed: 1 or more")
        if self.queue < 0:
            raise InputError(f"engine: queue={self.queue}; allowed: 0 or more")
        if not 0 < self.pool <= 1:
            raise InputError(f"engine: pool={self.pool:g}; allowed: above 0, up to 1")
        if self.kv_cache not in ("float", "int8"):
            raise InputError(f"engine: kv_cache={self.kv_cache!r}; allowed: 'float' or 'int8'")

    def shape(self, spec: ModelSpecification) -> Shape:
        """The sizes for a model.

        Raises:
            InputError: a context beyond the model's, or without room for a prompt of one token and a new one.
        """
        limit = spec.architecture.max_length
        context = limit if self.context is None else self.context
        if not 2 <= context <= limit:
            raise InputError(f"engine: context={context}; allowed: 2 to {limit}, the model's context")
        # The request that came first always has to be able to finish.
        one = spec.architecture.num_layers * -(-context // self.page)
        pages = max(one, round(self.pool * one * self.rows))
        return Shape(self.rows, context, pages, self.page, self.chunk, min(self.width, context))


@dataclass(frozen=True)
class RequestOptions:
    """How a prompt is continued.

    Attributes:
        max_new_tokens: most tokens that are added.
        temperature: 0 for greedy.
        top_p: nucleus mass.
        seed: of sampling.
        theta: threshold of the routers, one or one per routed layer; None: the model's own.
        stop: strings that end the continuation and are not part of it; they may begin and end within tokens.
        ignore_eos: end tokens do not end the continuation, and like all special ones have no text; what is measured
            over a fixed number of tokens needs that.
        continues: its text goes on from that of the prompt; False: it is a text of its own, an answer, and where words
            are tokens with a space before them the first one loses it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    theta: ArrayLike | Sequence[float] | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    continues: bool = True

    def check(self) -> None:
        """Checks what does not depend on the model.

        Raises:
            InputError: names the option, what was found and what is allowed.
        """
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}; allowed: 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature:g}; allowed: 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p:g}; allowed: above 0, up to 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed}; allowed: 0 to {2**32 - 1}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(f"stop={self.stop!r}; allowed: strings of one character or more")

    def thresholds(self, spec: ModelSpecification) -> Float32[np.ndarray, " r"]:
        """Theta of each routed layer of a model.

        Raises:
            InputError: the model is dense, or as `layer_thresholds`.
        """
        if self.theta is None:
            return np.asarray(spec.thresholds, np.float32)
        if spec.routing is None:
            raise InputError("theta: a dense model has no threshold; allowed: none")
        return np.asarray(layer_thresholds(self.theta, len(spec.routed_layers)), np.float32)
