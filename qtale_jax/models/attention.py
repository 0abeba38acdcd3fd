"""Causal grouped-query attention in which skipped tokens leave no keys and values (KV eviction)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from qtale_jax.models.gated_softmax import HIDDEN, gated_softmax
from qtale_jax.models.layers import Linear, RMSNorm
from qtale_jax.models.rotary import rotate
from qtale_jax.models.specification import Architecture


def in_window(
    architecture: Architecture,
    causal: Bool[Array, "b t s"],
    queries: Int[Array, "b t"],
    keys: Int[Array, "b s"] | None = None,
) -> Bool[Array, "b t s"]:
    """The causal keys that are inside the sliding window, if there is one.

    Args:
        architecture: says how wide it is; which layers have it, the caller knows.
        causal: keys that a query sees without it.
        queries: their positions.
        keys: their positions; None: as in a cache, 0, 1, 2 and so on.
    """
    if architecture.sliding_window is None:
        return causal
    if keys is None:
        keys = jnp.arange(causal.shape[2], dtype=jnp.int32)[None, :]
    return causal & (queries[:, :, None] - keys[:, None, :] < architecture.sliding_window)


def softcapped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Values squeezed into (-cap, cap), cap tanh(x / cap); None: as they are."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention_scores(
    query: Float[Array, "b t k g d"],
    key: Float[Array, "b s k d"],
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "b k g t s"]:
    """Scores of all queries and keys before anything is masked, float32.

    Args:
        query: rotated queries, by the KV head that they read.
        key: rotated keys.
        scale: what products are multiplied by; None: d ** -0.5.
        softcap: what scaled products are capped at; None: nothing.
    """
    products = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32)
    return softcapped(products * (query.shape[-1] ** -0.5 if scale is None else scale), softcap)


def attend(
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s k d"],
    value: Float[Array, "b s k d"],
    causal: Bool[Array, "b t s"],
    kept: Bool[Array, "b t s"],
    key_gate: Float[Array, "b t s"] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "b t n d"]:
    """Softmax attention over the keys that are causal and kept; scores and softmax in float32.

    `causal` says which keys a query could see if every token executed, those inside the sliding window if there is one,
    `kept` which of them were not evicted. `scale` and `softcap` are those of `attention_scores`.
    `key_gate` has the value of `kept` and carries the straight-through gradient to the gates: the gradient for an
    evicted key is what its weight would have been, capped at the weight of the strongest visible key so that it stays
    bounded. (The D-LLM reference multiplies the causal softmax by the gate and renormalises: same value, unbounded.)
    """
    batch, length, heads, width = query.shape
    groups = key.shape[2]
    scores = attention_scores(query.reshape(batch, length, groups, heads // groups, width), key, scale, softcap)
    visible = (causal & kept)[:, None, None]
    if key_gate is None:
        weights = jax.nn.softmax(jnp.where(visible, scores, HIDDEN), axis=-1)
        out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
    else:
        out = gated_softmax(scores, value, key_gate, causal, kept)
    return out.reshape(batch, length, heads, width)


class Attention(nnx.Module):
    """Projections around `attend`, and the norms of queries and keys where the architecture has them."""

    def __init__(self, architecture: Architecture, make_linear):
        self.query = make_linear("query", ("embed", "heads"))
        self.key = make_linear("key", ("embed", "heads"))
        self.value = make_linear("value", ("embed", "heads"))
        self.output: Linear = make_linear("output", ("heads", "embed"))
        if architecture.query_key_norm:
            self.query_norm = RMSNorm(architecture.head_dim, architecture.norm_eps, architecture.norm_offset)
            self.key_norm = RMSNorm(architecture.head_dim, architecture.norm_eps, architecture.norm_offset)
        self.architecture = architecture

    def project(
        self, x: Float[Array, "b t m"], tables: tuple[Array, Array], keys: tuple[PRNGKeyArray | None, ...]
    ) -> tuple[Float[Array, "b t n d"], Float[Array, "b t k d"], Float[Array, "b t k d"]]:
        """Returns queries, keys and values, the first two rotated to their positions."""
        shape = (*x.shape[:2], -1, self.architecture.head_dim)
        query = rotate(self._normed("query_norm", self.query(x, keys[0]).reshape(shape)), tables)
        key = rotate(self._normed("key_norm", self.key(x, keys[1]).reshape(shape)), tables)
        return query, key, self.value(x, keys[2]).reshape(shape)

    def _normed(self, norm: str, heads: Float[Array, "b t n d"]) -> Float[Array, "b t n d"]:
        return getattr(self, norm)(heads) if self.architecture.query_key_norm else heads
