"""The decoder of all families, defined in Flax NNX: blocks with optional routers, adapters and quantized linears.

The modules say what parameters exist, which logical axes they have and what one block computes. `models.forward` runs
them as pure functions over a nested dict of arrays.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from qtale_jax.models.attention import Attention, attend
from qtale_jax.models.cache import LayerCache
from qtale_jax.models.context import Context
from qtale_jax.models.layers import Embedding, Linear, RMSNorm
from qtale_jax.models.router import Router
from qtale_jax.models.specification import LINEARS, Architecture, Kernels, ModelSpecification

Parameters = dict[str, Any]
"""Nested dict of arrays; layer indices are ints, all other keys strings."""

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
"""By `Architecture.activation`."""


class FeedForward(nnx.Module):
    """Gated MLP: down(activation(gate(x)) * up(x)); SwiGLU or, with the tanh form of GELU, GeGLU."""

    def __init__(self, architecture: Architecture, make_linear):
        self.gate: Linear = make_linear("gate", ("embed", "mlp"))
        self.up: Linear = make_linear("up", ("embed", "mlp"))
        self.down: Linear = make_linear("down", ("mlp", "embed"))
        self.activation = architecture.activation

    def activate(self, x: Float[Array, "b t d"], keys: tuple[PRNGKeyArray | None, ...]) -> Float[Array, "b t m"]:
        """The input of `down`."""
        return ACTIVATIONS[self.activation](self.gate(x, keys[0])) * self.up(x, keys[1])

    def __call__(self, x: Float[Array, "b t d"], keys: tuple[PRNGKeyArray | None, ...]) -> Float[Array, "b t d"]:
        """Applies the MLP; `keys` turn on the dropout of adapters on gate, up and down."""
        return self.down(self.activate(x, keys), keys[2])


class Block(nnx.Module):
    """One transformer block, h + attention(norm(h)), then + mlp(norm(.)); with a router if the layer is routed.

    With `post_norms` of the architecture what is added to the residual stream is normalised, too.
    """

    def __init__(self, spec: ModelSpecification, layer: int, *, rngs: nnx.Rngs):
        architecture, routing, lora = spec.architecture, spec.routing, spec.lora

        def make_linear(name: str, axes: tuple[str, str]) -> Linear:
            adapted = lora is not None and name in lora.targets
            # The two projections that write to the residual stream start smaller the deeper the model (GPT-2).
            scale = (2 * architecture.num_layers) ** -0.5 if name in ("output", "down") else 1.0
            return Linear(
                architecture.linear_shape(name),
                axes=axes,
                dtype=jnp.dtype(spec.dtype),
                rngs=rngs,
                scale=scale,
                format=spec.quantization.format(layer, name) if spec.quantization else None,
                bias=name in architecture.biases,
                rank=lora.rank if lora and adapted else 0,
                dropout=lora.dropout if lora and adapted else 0.0,
                kernels=spec.kernels,
            )

        self.attention_norm = hidden_norm(architecture)
        self.attention = Attention(architecture, make_linear)
        self.mlp_norm = hidden_norm(architecture)
        self.mlp = FeedForward(architecture, make_linear)
        if architecture.post_norms:
            self.attention_post_norm = hidden_norm(architecture)
            self.mlp_post_norm = hidden_norm(architecture)
        self.routed = routing is not None and layer >= routing.always_on_layers
        if routing is not None and self.routed and routing.router == "learned":
            self.router = Router(
                architecture.hidden_size,
                routing.router_hidden,
                architecture.norm_eps,
                rngs=rngs,
                format=spec.quantization.format(layer, "router") if spec.quantization else None,
            )
        self.eviction = routing is not None and routing.eviction
        self.kernels: Kernels = spec.kernels

    def __call__(
        self,
        hidden: Float[Array, "b t d"],
        context: Context,
        execute: Bool[Array, "b t"],
        gate: Float[Array, "b t"] | None = None,
        cache: LayerCache | None = None,
        dropout_key: PRNGKeyArray | None = None,
        eviction_gradient: bool = True,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Runs the block on every token and keeps its result where `execute` holds: masked execution.

        `gate` equals `execute` in value; with it, y = gate * block(x) + (1 - gate) * x and gradients reach the router
        (with `eviction_gradient` also through attention).
        """
        drop = (None,) * len(LINEARS) if dropout_key is None else tuple(jax.random.split(dropout_key, len(LINEARS)))
        key_gate = gate if eviction_gradient else None
        attended, cache = self._attend(hidden, context, execute, key_gate, cache, drop[:3])
        out = self.after_attention(hidden, attended, drop[3:])
        if gate is None:
            return jnp.where(execute[:, :, None], out, hidden), cache
        weight = gate.astype(out.dtype)[:, :, None]
        return weight * out + (1 - weight) * hidden, cache

    def after_attention(
        self,
        hidden: Float[Array, "b t d"],
        attended: Float[Array, "b t o"],
        keys: tuple[PRNGKeyArray | None, ...] = (None,) * 4,
    ) -> Float[Array, "b t d"]:
        """The block's result, from its input and the input of the output projection.

        `keys` turn on the dropout of adapters on output, gate, up and down.
        """
        out = self._with_attention(hidden, attended, keys[0])
        return out + self._post_norm("mlp_post_norm", self.mlp(self.mlp_norm(out), keys[1:]))

    def _with_attention(self, hidden, attended, key):
        return hidden + self._post_norm("attention_post_norm", self.attention.output(attended, key))

    def _post_norm(self, name: str, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return getattr(self, name)(x) if self.attention.architecture.post_norms else x

    def _attend(self, hidden, context, execute, gate, cache, drop):
        """The input of the output projection, and the cache with this call's keys and values."""
        query, key, value = self.attention.project(self.attention_norm(hidden), context.tables, drop)
        stays = execute if self.eviction else jnp.ones_like(execute)
        key_gate = None
        if cache is not None:
            cache = cache.insert(context.positions, key, value, stays)
            key, value, stays = cache.key.astype(query.dtype), cache.value.astype(query.dtype), cache.kept
        elif self.eviction and gate is not None:
            key_gate = jnp.where(context.own, 1.0, gate[:, None, :])
        architecture = self.attention.architecture
        attended = attend(
            query,
            key,
            value,
            context.causal,
            stays[:, None, :] | context.own,
            key_gate,
            scale=architecture.score_scale,
            softcap=architecture.attention_softcap,
        )
        return attended.reshape(*hidden.shape[:2], -1), cache

    def linear_inputs(
        self, hidden: Float[Array, "b t d"], context: Context, execute: Bool[Array, "b t"]
    ) -> dict[str, Float[Array, "b t _"]]:
        """What the linears multiply, by the first linear that reads it: query (key, value), output, gate (up), down.

        Quantizers look at these. Keys and values of tokens that do not execute are evicted, as in a forward pass.
        """
        none = (None,) * 3
        attended, _ = self._attend(hidden, context, execute, None, None, none)
        between = self.mlp_norm(self._with_attention(hidden, attended, None))
        return {
            "query": self.attention_norm(hidden),
            "output": attended,
            "gate": between,
            "down": self.mlp.activate(between, none),
        }


def hidden_norm(architecture: Architecture) -> RMSNorm:
    """A norm over the residual stream's width."""
    return RMSNorm(architecture.hidden_size, architecture.norm_eps, architecture.norm_offset)


class Decoder(nnx.Module):
    """Embedding, blocks, final norm, head: the definition of a whole model with one set of arrays per layer."""

    def __init__(self, spec: ModelSpecification, *, rngs: nnx.Rngs, layers: Iterable[int] | None = None):
        """`layers` are the blocks to build: all, unless others follow."""
        architecture, dtype = spec.architecture, jnp.dtype(spec.dtype)
        formats = spec.quantization.formats if spec.quantization else {}
        table = (architecture.vocab_size, architecture.hidden_size)
        stored = formats.get("embedding")
        self.embedding = Embedding(*table, dtype=dtype, rngs=rngs, format=stored, kernels=spec.kernels)
        wanted = range(architecture.num_layers) if layers is None else layers
        self.layers = nnx.List([Block(spec, layer, rngs=rngs) for layer in wanted])
        self.final_norm = hidden_norm(architecture)
        if not architecture.tied_head:
            shape = (architecture.hidden_size, architecture.vocab_size)
            stored = formats.get("head")
            axes = ("embed", "vocab")
            self.head = Linear(shape, axes=axes, dtype=dtype, rngs=rngs, format=stored, kernels=spec.kernels)


def skeleton(spec: ModelSpecification) -> Decoder:
    """The decoder with abstract arrays: shapes, types and logical axes, no memory."""
    return _skeleton(spec.structure)  # models that differ in thresholds share it


@functools.lru_cache(maxsize=64)
def _skeleton(spec: ModelSpecification) -> Decoder:
    """One block of each kind is traced, which takes a tenth of a second, and copied to the layers that are like it."""
    kinds = [_kind(spec, layer) for layer in range(spec.architecture.num_layers)]
    firsts = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    model = nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0), layers=firsts.values()))
    blocks = dict(zip(firsts, model.layers, strict=True))
    model.layers = nnx.List([nnx.clone(blocks[kind]) for kind in kinds])
    return model


def _kind(spec: ModelSpecification, layer: int) -> tuple:
    """Layers of one kind have blocks of the same parameters."""
    names = (*LINEARS, "router")
    formats = tuple(spec.quantization.format(layer, name) for name in names) if spec.quantization else ()
    return spec.routing is not None and layer >= spec.routing.always_on_layers, formats


def abstract_parameters(spec: ModelSpecification) -> Parameters:
    """Nested dict of `jax.ShapeDtypeStruct`, one entry per layer."""
    return jax.tree.map(lambda leaf: leaf, _abstract_parameters(spec.structure))  # callers change the dicts


@functools.lru_cache(maxsize=64)
def _abstract_parameters(spec: ModelSpecification) -> Parameters:
    return nnx.to_pure_dict(nnx.state(_skeleton(spec)))


def logical_axes(spec: ModelSpecification) -> Parameters:
    """Nested dict like the parameters whose leaves are tuples of logical axis names."""
    flat = nnx.to_flat_state(nnx.state(skeleton(spec)))
    return traverse_util.unflatten_dict({path: leaf.get_metadata("axes") for path, leaf in flat})


def initialize(spec: ModelSpecification, key: PRNGKeyArray) -> Parameters:
    """Random parameters, one entry per layer; deterministic in `key`.

    Raises:
        ValueError: the specification is quantized; quantized models come from quantization, not from chance.
    """
    if spec.quantization is not None:
        raise ValueError("a quantized model cannot be initialised at random")
    return nnx.to_pure_dict(nnx.state(Decoder(spec, rngs=nnx.Rngs(key))))
