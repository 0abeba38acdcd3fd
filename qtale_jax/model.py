"""The public model: what a notebook loads, asks, and saves again."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from qtale_jax.artifact import LoadedModel, StoredModel, load_model, save_model, weight_bytes
from qtale_jax.data.stops import end_ids
from qtale_jax.data.tokens import decode, encode, encode_pairs
from qtale_jax.engine.text import RunningText
from qtale_jax.errors import InputError
from qtale_jax.evaluation.likelihood import Row, likelihoods, padded_length
from qtale_jax.inference.generation import Generated, empty_caches, generate
from qtale_jax.inference.policies import inference_policy, layer_thresholds
from qtale_jax.inference.rows import end_tokens
from qtale_jax.inference.streaming import Options, Progress, joined, stream
from qtale_jax.models.cache import cache_bytes
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.describe import describe
from qtale_jax.models.forward import Output, Routing, forward
from qtale_jax.models.policy import Policy
from qtale_jax.models.specification import Kernels, ModelSpecification

_forward = jax.jit(forward, static_argnames=("spec", "compute_dtype", "remat"))

KV_CACHES = {"float": None, "int8": jnp.dtype(jnp.int8)}
"""Forms of the KV cache and their types; None: the type of activations."""

COMPUTE_DTYPES = ("float32", "bfloat16")
"""Types of activations."""

ENGINES = ("skip", "masked")
"""Ways to generate: computing what executes, or everything (the reference)."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A continuation: its text and tokens, the executed share of all layers over prompt and new tokens, its KV bytes.

    With the skipping engine `kv_bytes` are those of the pages that the continuation has at its end.
    """

    text: str
    tokens: list[int]
    executed_ratio: float
    kv_bytes: int


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation in nats, and whether greedy decoding would produce it."""

    log_likelihood: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class TextRouting:
    """What the tokens of a text execute: words (length,), execute (length, layers), probability (length, routed)."""

    words: list[str]
    execute: np.ndarray
    probability: np.ndarray

    @property
    def executed_ratio(self) -> float:
        """Executed share of all tokens and layers."""
        return float(self.execute.mean())

    def __repr__(self) -> str:
        tokens, layers = self.execute.shape
        return f"TextRouting({tokens} tokens × {layers} layers, {self.executed_ratio:.3f} executed)"

    def _repr_html_(self) -> str:
        from qtale_jax.reporting.notebook import routing_html
        from qtale_jax.reporting.results import ExecutionMap

        content = {
            "tokens": self.words,
            "execute": self.execute.tolist(),
            "probability": self.probability.tolist(),
            "always_on_layers": self.execute.shape[1] - self.probability.shape[1],
        }
        return routing_html(ExecutionMap.model_validate(content))


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model. Immutable: `with_threshold` gives another one that shares the arrays."""

    spec: ModelSpecification
    params: Parameters
    tokenizer: Any
    provenance: dict[str, Any]
    compute_dtype: str = "float32"

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a continuation: the tokenizer's end token, and those that the checkpoint came with."""
        return end_ids(self._tokenizer(), self.provenance)

    def forward(self, tokens: ArrayLike, lengths: ArrayLike | None = None, policy: Policy | None = None) -> Output:
        """Logits and routing of right-padded (batch, length) rows under `policy`, by default the model's thresholds."""
        policy = inference_policy(self.spec) if policy is None else policy
        return _forward(
            self.spec.structure,
            self.params,
            jnp.asarray(tokens, jnp.int32),
            lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32),
            policy=policy,
            compute_dtype=jnp.dtype(self.compute_dtype),
        )

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        kv_cache: Literal["float", "int8"] = "float",
        engine: Literal["skip", "masked"] = "skip",
    ) -> list[Generation]:
        """Continues each prompt; greedy at temperature 0, otherwise nucleus sampling.

        A prompt and the text of its continuation, one after the other, are the whole text.

        `kv_cache` is the form of cached keys and values: the type of activations, or int8 with one float32 scale per
        token and KV head, close to half of the bytes of bfloat16. `engine` is "skip", which computes and keeps only
        what executes, or "masked", the reference that computes everything and gives the same tokens.

        Raises:
            InputError: no tokenizer, prompts that are not a list, max_new_tokens < 1, a temperature that is negative or
                not finite, top_p outside (0, 1], an unknown kv_cache or engine, or prompt plus continuation longer than
                the context.
        """
        if engine not in ENGINES:
            raise InputError(f"generate: engine={engine!r}; allowed: {' or '.join(map(repr, ENGINES))}")
        if not _texts("generate", prompts):
            return []
        if engine == "skip":
            ids, chunks = self._stream(prompts, max_new_tokens, temperature, top_p, seed, kv_cache)
            out = joined(list(chunks))
            execute, size = out.execute, out.row_bytes
        else:
            ids, out, size = self._masked(prompts, max_new_tokens, temperature, top_p, seed, kv_cache)
            execute = out.new_execute
        found = []
        for row, prompt in enumerate(ids):
            count = int(out.counts[row])
            new = out.tokens[row, :count].tolist()
            # The last token is never run, so it has executed nothing and is not counted.
            taken = [out.prompt_execute[row, : len(prompt)], execute[row, : max(count - 1, 0)]]
            running = self._running(prompt)
            text = running.add(new).text + running.end()
            found.append(Generation(text, new, float(np.concatenate(taken).mean()), int(size[row])))
        return found

    def stream(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        kv_cache: Literal["float", "int8"] = "float",
        chunk: int = 16,
    ) -> Iterator[list[str]]:
        """As `generate` with the skipping engine: yields what every `chunk` tokens add to the text of each prompt.

        Raises:
            InputError: as `generate`, or chunk < 1.
        """
        if chunk < 1:
            raise InputError(f"stream: chunk={chunk}; allowed: 1 or more")
        if not _texts("stream", prompts):
            return iter(())
        ids, chunks = self._stream(prompts, max_new_tokens, temperature, top_p, seed, kv_cache, chunk)
        return self._pieces(ids, chunks)

    def _pieces(self, prompts: list[list[int]], chunks: Iterator[Progress]) -> Iterator[list[str]]:
        texts = [self._running(prompt) for prompt in prompts]
        for chunk in chunks:
            pieces = [
                text.add(tokens[:count].tolist()).text
                for text, tokens, count in zip(texts, chunk.tokens, chunk.counts, strict=True)
            ]
            if chunk.finished:
                pieces = [piece + text.end() for piece, text in zip(pieces, texts, strict=True)]
            yield pieces

    def _running(self, prompt: Sequence[int]) -> RunningText:
        """The text that goes on from a prompt."""
        ends = self.end_ids
        return RunningText(lambda ids: decode(self.tokenizer, ids, ends), after=prompt)

    def _stream(
        self, prompts, max_new_tokens, temperature, top_p, seed, kv_cache, chunk=32
    ) -> tuple[list[list[int]], Iterator[Progress]]:
        ids, tokens = self._encoded(prompts, max_new_tokens, temperature, top_p, kv_cache)
        return ids, stream(
            self.spec.structure,
            self.params,
            tokens,
            np.asarray([len(prompt) for prompt in ids], np.int32),
            inference_policy(self.spec),
            jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop_ids=self.end_ids,
            options=Options(chunk=chunk, compute_dtype=jnp.dtype(self.compute_dtype), cache_dtype=KV_CACHES[kv_cache]),
        )

    def _masked(
        self, prompts, max_new_tokens, temperature, top_p, seed, kv_cache
    ) -> tuple[list[list[int]], Generated, list[int]]:
        ids, tokens = self._encoded(prompts, max_new_tokens, temperature, top_p, kv_cache)
        dtype = jnp.dtype(self.compute_dtype)
        out = generate(
            self.spec.structure,
            self.params,
            jnp.asarray(tokens),
            jnp.asarray([len(prompt) for prompt in ids], jnp.int32),
            inference_policy(self.spec),
            jax.random.key(seed),
            jnp.float32(temperature),
            jnp.float32(top_p),
            end_tokens(self.end_ids),
            max_new_tokens=max_new_tokens,
            compute_dtype=dtype,
            cache_dtype=KV_CACHES[kv_cache],
        )
        slots = tokens.shape[1] + max_new_tokens
        one = jax.eval_shape(lambda: empty_caches(self.spec, 1, slots, KV_CACHES[kv_cache] or dtype))
        return ids, jax.device_get(out), [cache_bytes(one)] * len(ids)

    def _encoded(self, prompts, max_new_tokens, temperature, top_p, kv_cache) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of the prompts, alone and right-padded, once all arguments are known to be possible."""
        if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
            raise InputError("generate needs max_new_tokens >= 1, a finite temperature >= 0 and 0 < top_p <= 1")
        if kv_cache not in KV_CACHES:
            raise InputError(f"generate: kv_cache={kv_cache!r}; allowed: {' or '.join(map(repr, KV_CACHES))}")
        ids = encode(self._tokenizer(), prompts)
        longest, limit = max(map(len, ids)), self.spec.architecture.max_length
        if min(map(len, ids)) == 0:
            raise InputError("generate: an empty prompt needs a tokenizer with a beginning-of-sequence token")
        if longest + max_new_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {limit}"
            )
        tokens = np.zeros((len(ids), padded_length(longest)), np.int32)
        for row, prompt in enumerate(ids):
            tokens[row, : len(prompt)] = prompt
        return ids, tokens

    def score(self, pairs: Sequence[tuple[str, str]], batch_size: int = 16) -> list[Score]:
        """Scores each (context, continuation).

        Raises:
            InputError: no tokenizer, a pair longer than the context, or batch_size < 1.
        """
        if batch_size < 1:
            raise InputError(f"score: batch_size={batch_size}; allowed: 1 or more")
        if not pairs:
            return []
        rows = [Row(*tokens) for tokens in encode_pairs(self._tokenizer(), pairs)]
        if any(row.start >= len(row.ids) for row in rows):
            raise InputError(
                "score: a pair needs a token to score and one before it; a context or continuation is empty"
            )
        found = likelihoods(
            self.spec,
            self.params,
            rows,
            inference_policy(self.spec),
            batch_size=min(batch_size, len(rows)),
            compute_dtype=jnp.dtype(self.compute_dtype),
        )
        return [Score(float(v), bool(g)) for v, g in zip(found.log_likelihood, found.is_greedy, strict=True)]

    def routing(self, text: str) -> TextRouting:
        """Shows what each token of `text` executes.

        Raises:
            InputError: no tokenizer, or a text longer than the context.
        """
        ids, limit = encode(self._tokenizer(), [text])[0], self.spec.architecture.max_length
        if len(ids) > limit:
            raise InputError(f"routing: a text of {len(ids)} tokens exceeds the context of {limit}")
        # Padded to a length class, so that texts of many lengths share a few programs; padding changes no decision.
        tokens = np.zeros((1, padded_length(len(ids))), np.int32)
        tokens[0, : len(ids)] = ids
        routing: Routing = self.forward(tokens, lengths=np.asarray([len(ids)], np.int32)).routing
        words = self.tokenizer.convert_ids_to_tokens(ids)
        execute, probability = (np.asarray(each[0, : len(ids)]) for each in (routing.execute, routing.probability))
        return TextRouting(words, execute, probability)

    def with_threshold(self, theta: ArrayLike | Sequence[float]) -> "Model":
        """The same model with one theta for all routed layers, or one per routed layer.

        Raises:
            InputError: the model is dense, the number of thetas is not that of routed layers, or one is outside [0, 1].
        """
        if self.spec.routing is None:
            raise InputError("a dense model has no threshold")
        values = layer_thresholds(theta, len(self.spec.routed_layers))
        thresholds = {**self.spec.routing.thresholds, str(self.spec.bits): values}
        routing = self.spec.routing.model_copy(update={"thresholds": thresholds})
        return dataclasses.replace(self, spec=self.spec.model_copy(update={"routing": routing}))

    def with_kernels(self, kernels: Kernels) -> "Model":
        """The same model with another choice of kernels, see `ModelSpecification`; numbers stay but for rounding.

        Raises:
            InputError: an unknown choice.
        """
        if kernels not in get_args(Kernels):
            raise InputError(f"kernels={kernels!r}; allowed: {', '.join(map(repr, get_args(Kernels)))}")
        return dataclasses.replace(self, spec=self.spec.model_copy(update={"kernels": kernels}))

    def __repr__(self) -> str:
        facts = describe(self.spec)
        if "theta" in facts:
            facts["theta"] = f"theta {facts['theta']}"
        return f"Model({'; '.join(facts.values())})"

    def _repr_html_(self) -> str:
        from qtale_jax.reporting.notebook import facts_html

        sizes = weight_bytes(self.params)
        parts = ", ".join(f"{part} {size:,}" for part, size in sizes.items() if size and part != "total")
        facts = {**describe(self.spec), "bytes": f"{sizes['total']:,} ({parts})"}
        parent = self.provenance.get("parent") or {}
        made = {"stage": self.provenance.get("stage"), "of": parent.get("path"), "seed": self.provenance.get("seed")}
        if known := [f"{name} {value}" for name, value in made.items() if value is not None]:
            facts["made by"] = ", ".join(known).replace("stage ", "")
        return facts_html("Model", facts)

    def save(self, path: str | Path) -> None:
        """Writes a model directory that `load` reads back.

        Raises:
            InputError: `path` exists.
        """
        save_model(path, self.spec, self.params, tokenizer=self.tokenizer, provenance=self.provenance)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("the model directory has no tokenizer")
        return self.tokenizer


def _texts(what: str, prompts: Sequence[str]) -> Sequence[str]:
    """The prompts, if they are texts; a single text would be taken for a list of its characters."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"{what}: prompts={prompts!r:.60}; allowed: a list of texts")
    return prompts


def load(path: str | Path, *, compute_dtype: str = "float32") -> Model:
    """Loads a model directory, or a folder in Hugging Face layout; one that `convert --to-hf` wrote keeps its routers.

    Args:
        path: the folder.
        compute_dtype: "float32" or "bfloat16", the type of activations.

    Raises:
        InputError: missing or damaged, or another type.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise InputError(f"load: compute_dtype={compute_dtype!r}; allowed: {' or '.join(map(repr, COMPUTE_DTYPES))}")
    folder = Path(path)
    if _is_huggingface(folder):
        from qtale_jax.models.huggingface import load_huggingface

        loaded = load_huggingface(folder)
    else:
        loaded: LoadedModel = load_model(folder)
    return Model(loaded.spec, loaded.params, loaded.tokenizer, loaded.provenance, compute_dtype)


def read_headers(path: str | Path) -> tuple[ModelSpecification, Any]:
    """Specification and tokenizer of what `load` would load, which is checked, and of which no weights are read.

    Raises:
        InputError: missing or damaged, or without a tokenizer.
    """
    folder = Path(path)
    if _is_huggingface(folder):
        from qtale_jax.models.huggingface import read_huggingface

        found = read_huggingface(folder)
    else:
        found = StoredModel(folder)
    if found.tokenizer is None:
        raise InputError(f"{folder}: the model directory has no tokenizer")
    return found.spec, found.tokenizer


def _is_huggingface(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "model.json").exists()
