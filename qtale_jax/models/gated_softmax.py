"""Softmax attention over keys that carry a gate, with its gradient in closed form.

A gate is 1 for a key that was kept and 0 for one that was evicted, and has a gradient: what the output would gain from
the key. Derived by hand, the backward pass keeps one array of the size of the scores instead of several.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

HIDDEN = -1e30
"""Score of an invisible key: finite, so that a row that sees nothing (padding) gives numbers instead of NaN."""

Kept = tuple[Array, ...]


@jax.custom_vjp
def gated_softmax(
    scores: Float[Array, "b k g t s"],
    value: Float[Array, "b s k d"],
    gate: Float[Array, "b t s"],
    causal: Bool[Array, "b t s"],
    kept: Bool[Array, "b t s"],
) -> Float[Array, "b t k g d"]:
    """sum_s w_s v_s with w = e g / sum(e g) and e = exp(min(score - top, 0)) over the causal keys.

    `top` is the largest score of a key that is causal and kept. In value this is the softmax over those keys. The e of
    an evicted key is what its weight would have been, capped at that of the strongest visible key, which bounds the
    gradient of its gate.

    Args:
        scores: float32.
        value: values of the keys, in any floating type, which the result has too.
        gate: 1 where `kept`, 0 elsewhere; float32.
        causal: keys that a query could see if every token executed.
        kept: keys that were not evicted.
    """
    return _forward(scores, value, gate, causal, kept)[0]


def _forward(scores, value, gate, causal, kept) -> tuple[Array, Kept]:
    visible = (causal & kept)[:, None, None]
    top = jnp.max(jnp.where(visible, scores, HIDDEN), axis=-1, keepdims=True)
    mass = jnp.exp(jnp.minimum(jnp.where(causal[:, None, None], scores, HIDDEN) - top, 0.0))
    total = _by_query(jnp.sum(mass * gate[:, None, None], axis=-1))
    out = jnp.einsum("bkgts,bskd->btkgd", _typed(mass, gate, value), value, preferred_element_type=jnp.float32) / total
    return out.astype(value.dtype), (mass, total, out, value, gate)


def _backward(kept: Kept, slope: Float[Array, "b t k g d"]) -> tuple[Array | None, ...]:
    """With u = slope / sum(e g): d / d(e g)_s = u (v_s - out), d / d score = e g of it, d / d gate = e of it."""
    mass, total, out, value, gate = kept
    share = slope.astype(jnp.float32) / total
    along = jnp.moveaxis(jnp.sum(share * out, axis=-1, keepdims=True), 1, 3)
    share = share.astype(value.dtype)
    gains = jnp.einsum("btkgd,bskd->bkgts", share, value, preferred_element_type=jnp.float32)
    per_key = mass * (gains - along)
    of_value = jnp.einsum("bkgts,btkgd->bskd", _typed(mass, gate, value), share, preferred_element_type=jnp.float32)
    of_gate = jnp.sum(per_key, axis=(1, 2))
    return per_key * gate[:, None, None], of_value.astype(value.dtype), of_gate, None, None


def _by_query(x: Float[Array, "b k g t"]) -> Float[Array, "b t k g 1"]:
    return jnp.moveaxis(x, 3, 1)[..., None]


def _typed(mass: Array, gate: Array, value: Array) -> Float[Array, "b k g t s"]:
    return (mass * gate[:, None, None]).astype(value.dtype)


gated_softmax.defvjp(_forward, _backward)
