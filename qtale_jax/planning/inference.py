"""What prefill and decode take on one device, which is where the engine runs: weights, KV cache, arithmetic, time.

A layer keeps the tokens that executed it, in pages, and a decode step reads the layers that some row executes. Rows and
layers are taken to decide independently, each routed layer with the share that makes the executed ratio.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtale_jax.artifact import weight_bytes
from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError
from qtale_jax.inference.growth import Growth
from qtale_jax.inference.joining import empty_rows
from qtale_jax.inference.pages import PAGE, empty_pages
from qtale_jax.inference.policies import inference_policy
from qtale_jax.inference.streaming import PREFILL_STEPS, ROOM, Options
from qtale_jax.models.cost import flops_per_token, layer_flops
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.specification import LINEARS, ModelSpecification, QuantizationSpecification
from qtale_jax.planning.devices import Topology
from qtale_jax.planning.roofline import Estimate, gaps, roofline
from qtale_jax.planning.tiles import padding
from qtale_jax.quantization import groupwise
from qtale_jax.quantization.formats import formats_of
from qtale_jax.quantization.pipeline import quantizer_of
from qtale_jax.quantization.storage import array_bytes
from qtale_jax.training.aim import routed_share


def deployed(config: Config, spec: ModelSpecification) -> ModelSpecification:
    """The model that inference runs: adapters merged, the linears in the format of the quantize section.

    Raises:
        InputError: a group size that does not divide, or rules that match nothing.
    """
    merged = spec.model_copy(update={"lora": None})
    if config.quantize.bits == 16 or spec.quantization is not None:
        return merged
    quantization = QuantizationSpecification(
        method=quantizer_of(config.quantize), formats=formats_of(merged, config.quantize)
    )
    return merged.model_copy(update={"quantization": quantization})


@dataclass(frozen=True)
class InferenceEstimate(Estimate):
    """Prefill or decode of some rows on one device.

    Attributes:
        step: "prefill" or "decode".
        rows: that run at the same time.
        left_out: bytes of weights that are there but that the program is not given: the head, in prefill.
    """

    step: str
    rows: int
    left_out: int

    @property
    def arguments(self) -> int:
        """As the compiler counts them."""
        return super().arguments - self.left_out


class InferencePlanner:
    """Estimates for one deployed model with rows of one length."""

    def __init__(self, config: Config, spec: ModelSpecification, topology: Topology):
        """Takes the configuration, the deployed model and the kind of device.

        Raises:
            InputError: rows are longer than the model's context.
        """
        self.config, self.topology = config, topology
        self.spec = spec.model_copy(update={"kernels": config.generate.kernels})
        self.context = config.plan.context or config.data.length
        if self.context > spec.architecture.max_length:
            raise InputError(
                f"plan.context={self.context} is longer than the model's context, {spec.architecture.max_length} tokens"
            )
        cache = jnp.int8 if config.generate.kv_cache == "int8" else None
        self.options = Options(compute_dtype=jnp.dtype(config.train.compute_dtype), cache_dtype=cache)
        self.width = min(self.context, self.options.width)
        self.shares = layer_shares(config, spec)
        self.kept = [self._kept(layer) for layer in range(spec.architecture.num_layers)]
        self.weights = weight_bytes(abstract_parameters(spec))

    def _kept(self, layer: int) -> float:
        """Tokens of a full row that a layer keeps."""
        routing = self.spec.routing
        if routing is None or not routing.eviction:
            return float(self.context)
        first = min(routing.always_on_tokens, self.context)
        return first + self.shares[layer] * (self.context - first)

    def decode(self, rows: int) -> InferenceEstimate:
        """One new token in each row, when the rows are nearly full."""
        per_token = flops_per_token(self.spec, self.shares, self.kept)
        work = roofline(
            self.topology,
            flops=rows * per_token,
            moved=self._weights_read(rows) + self._keys_read(rows),
            integer_flops=rows * self._integer_flops(),
        )
        return InferenceEstimate(self._memory("decode", rows, 1), work, rows, "decode", rows, 0)

    def prefill(self, rows: int) -> InferenceEstimate:
        """A prompt that fills every row, in parts of the engine's width."""
        tokens = rows * self.context
        turns = -(-self.context // self.width)
        half = [kept / 2 for kept in self.kept]
        work = roofline(
            self.topology,
            flops=tokens * flops_per_token(self.spec, self.shares, half) - (tokens - rows) * self._head_flops(),
            moved=turns * (self._weights_read(rows * self.width) + self._keys_read(rows) / 2),
            integer_flops=tokens * self._integer_flops(),
        )
        left = {name: tree for name, tree in abstract_parameters(self.spec).items() if name in ("final_norm", "head")}
        left_out = _bytes(left) + self._padding(left)
        return InferenceEstimate(self._memory("prefill", rows, self.width), work, tokens, "prefill", rows, left_out)

    def pages(self, step: str, rows: int) -> int:
        """Size of the pool when a step is at its largest."""
        return self._pages(rows) if step == "decode" else self._prefill_pages(rows)

    def arguments(self, step: str, rows: int) -> dict[str, Any]:
        """What the engine gives to the program of a step, on shapes, when the pool is at its largest."""
        architecture, options = self.spec.architecture, self.options
        pages = self.pages(step, rows)
        cache = functools.partial(
            empty_pages, architecture, rows, self.slots, pages, options.stored_dtype, options.page
        )
        found = {
            "weights": abstract_parameters(self.spec),
            "KV cache": jax.eval_shape(cache),
            "policy": jax.eval_shape(lambda: inference_policy(self.spec)),
        }
        integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        if step == "decode":
            return found | {"rows": jax.eval_shape(lambda: empty_rows(rows))}
        last = jax.ShapeDtypeStruct((rows, architecture.hidden_size), options.compute_dtype)
        tokens = {"tokens": integers((rows, self.width)), "start": integers(()), "last": last}
        return found | {**tokens, "lengths": integers((rows,)), "rows": integers((rows,))}

    def _memory(self, step: str, rows: int, width: int) -> dict[str, int]:
        arguments = self.arguments(step, rows)
        sizes = {name: _bytes(tree) for name, tree in arguments.items()}
        found = {
            "weights": sizes.pop("weights"),
            "KV cache": sizes.pop("KV cache"),
            "activations": self._workspace(rows, width),
            "rows": sum(sizes.values()),
            "padding": self._padding(arguments),
        }
        if self.topology.device.is_tpu:
            found["gaps"] = gaps(found)
        return {name: size for name, size in found.items() if size}

    def _padding(self, arguments: Any) -> int:
        return padding(jax.tree.leaves(arguments)) if self.topology.device.is_tpu else 0

    @property
    def slots(self) -> int:
        """Tokens that the tables of a row have room for."""
        return -(-max(self.context, -(-self.context // self.width) * self.width) // ROOM) * ROOM

    def _growth(self, rows: int) -> Growth:
        return self.options.growth(self.spec.architecture, rows, self.slots)

    def _pages(self, rows: int) -> int:
        return self._growth(rows).size(rows * sum(math.ceil(kept / PAGE) for kept in self.kept))

    def _prefill_pages(self, rows: int) -> int:
        """As the engine takes them: before a part of the prompt runs, nobody knows what will skip."""
        growth = self._growth(rows)
        before = max(0.0, (self.context - self.width) / self.context)
        counts = np.asarray([[math.ceil(kept * before)] * rows for kept in self.kept], np.int32)
        used = int(np.sum(-(-counts // PAGE)))
        return growth.size(used + growth.missing(counts, np.full(rows, self.width, np.int32)), PREFILL_STEPS)

    def _keys_read(self, rows: int) -> float:
        """Bytes of cached keys and values that a step reads: all that the layers keep which a row executes."""
        per_token = self._growth(rows).bytes_per_page / PAGE
        return rows * per_token * sum(kept * share for kept, share in zip(self.kept, self.shares, strict=True))

    def _weights_read(self, tokens: int) -> float:
        """Bytes of weights that `tokens` independent tokens need: a layer is read if one of them executes it."""
        layers, shape, total = abstract_parameters(self.spec)["layers"], self.spec.architecture, 0.0
        for layer, share in enumerate(self.shares):
            always = _bytes(layers[layer].get("router", {}))
            if self.spec.routing is not None and not self.spec.routing.eviction:
                always += sum(_bytes(layers[layer]["attention"][name]) for name in ("key", "value"))
            total += always + (1 - (1 - share) ** tokens) * (_bytes(layers[layer]) - always)
        head = self.weights["embedding" if shape.tied_head else "head"]
        rows = 0 if shape.tied_head else min(tokens, shape.vocab_size) * self.weights["embedding"] / shape.vocab_size
        return total + head + rows

    def _head_flops(self) -> float:
        return 2.0 * self.spec.architecture.hidden_size * self.spec.architecture.vocab_size

    def _integer_flops(self) -> float:
        """FLOPs per token that are integer products."""
        quantization = self.spec.quantization
        if quantization is None or quantization.main_format.activation_bits != 8:
            return 0.0
        return sum(self.shares) * layer_flops(self.spec, 0.0)

    @property
    def _widens(self) -> bool:
        """Whether few rows are multiplied by integers of 16 bits, without their zero points.

        The compiler for TPUs writes these to memory: those of an MLP's gate and up, which it works on at the same time.
        The kernels do not, other compilers neither.
        """
        quantization, kernels = self.spec.quantization, self.spec.kernels
        if quantization is None or quantization.main_format.symmetric or quantization.main_format.activation_bits == 8:
            return False
        return self.topology.device.is_tpu and kernels != "pallas"

    def _workspace(self, rows: int, width: int) -> int:
        """What a layer needs besides: a matrix restored for many rows, scores, the MLP's width, what is to be kept."""
        shape, size = self.spec.architecture, jnp.dtype(self.options.compute_dtype).itemsize
        tokens = rows * width
        keys = 2 * shape.num_kv_heads * shape.head_dim
        restored, numbers = 0, {name: math.prod(shape.linear_shape(name)) for name in LINEARS}
        if self.spec.quantization is not None and tokens > groupwise.FEW_ROWS:
            restored = max(numbers.values()) * size
        elif self._widens:
            restored = sum(numbers[name] for name in ("gate", "up")) * 2
        scores = 2 * 4 * tokens * shape.num_heads * width
        hidden = tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size) * max(size, 4)
        fresh = shape.num_layers * tokens * keys * size
        return restored + scores + hidden + 2 * fresh + 4 * rows * shape.vocab_size


def layer_shares(config: Config, spec: ModelSpecification) -> list[float]:
    """The share of tokens that execute each layer when the model runs at `routing.target`."""
    layers = spec.architecture.num_layers
    if spec.routing is None:
        return [1.0] * layers
    always_on = spec.routing.always_on_layers
    share = float(routed_share(config.routing.target, layers, always_on, spec.routing.counting))
    return [1.0] * always_on + [share] * (layers - always_on)


def _bytes(tree) -> int:
    return sum(map(array_bytes, jax.tree.leaves(tree)))
