"""What the final norm and the head add to a step: cross-entropy and distillation, with few logits at a time.

Logits are the largest array of a step: 8 rows of 1,024 tokens over 128,256 words take 4 GB, and their gradient as
much. Under a frozen head nothing of them is needed but the gradient of the residual stream. So the positions are gone
through in blocks, each of which gives its loss and that gradient, and positions that count for nothing (prompts under
a loss on responses, padding) are gathered in blocks that are passed over.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qtale_jax.models.decoder import Parameters, logical_axes
from qtale_jax.models.forward import unembed
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.parallel.axes import constrain, shards
from qtale_jax.training import objective
from qtale_jax.training.optimizer import flatten, nest

BLOCK_TOKENS = 512
"""Tokens of a block on each device: their products take about as long as reading the head's weights (240 would do on a
TPU v5e, 300 on an H100, 570 on a v6e)."""
FEW_LOGITS = 1 << 20
"""Rows that have no more than this (4 MB) make theirs at once."""

Parts = dict[str, Float[Array, ""]]


@dataclass(frozen=True)
class Head:
    """How hidden states become a loss: cross-entropy + `distillation` KL(teacher || student); static under jit."""

    spec: ModelSpecification
    distillation: float = 0.0
    temperature: float = 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Positions:
    """What the head is told of each position.

    Attributes:
        targets: ids of the next tokens.
        weights: how much each counts, 0 for one that does not.
        teacher: the teacher's residual stream after the last layer, where the head distils.
    """

    targets: Int[Array, "b t"]
    weights: Float[Array, "b t"]
    teacher: Float[Array, "b t d"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """What is the same for all positions.

    Attributes:
        params: with the final norm and the head.
        total: the weights of the whole batch, by which sums are divided.
        teacher: parameters of the teacher, where the head distils; None: its final norm and head are those of `params`,
            as they are where the head does not train.
    """

    params: Parameters
    total: Float[Array, ""]
    teacher: Parameters | None = None


def in_blocks(length: int, vocabulary: int, trained: bool) -> bool:
    """Whether the logits of rows of this length are made in blocks; `trained`: the head has a gradient of its own."""
    return not trained and length * vocabulary > FEW_LOGITS


def needed(params: Parameters) -> Parameters:
    """The parameters without the layers."""
    return {name: part for name, part in params.items() if name != "layers"}


def losses(
    head: Head, hidden: Float[Array, "b t d"], given: Given, positions: Positions, trained: bool
) -> tuple[Float[Array, ""], Parts]:
    """Weighted mean of the losses, and its parts: `cross_entropy` and, where the head distils, `distillation`.

    Of the two only the mean has a gradient.

    Args:
        head: the loss.
        hidden: residual stream after the last layer.
        given: parameters and the divisor.
        positions: targets, weights, the teacher's hidden states.
        trained: whether a gradient of the head's own parameters is asked for. All logits are made at once then.
    """
    rows, length = hidden.shape[:2]
    if not in_blocks(length, head.spec.architecture.vocab_size, trained):
        return _at_once(head, hidden, given, positions)
    size = min(length, max(1, BLOCK_TOKENS * shards("batch") // rows))
    # Rows keep their tokens, so that nothing moves between devices; the counting ones come first.
    order = jnp.argsort(positions.weights == 0, axis=1, stable=True)

    def blocks(x: Array) -> Array:
        index = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
        x = jnp.take_along_axis(x, index, axis=1)
        x = jnp.pad(x, [(0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(rows, -1, size, *x.shape[2:]), 1, 0)

    teacher = None if given.teacher is None else _gathered(head.spec, given.teacher)
    given = Given(_gathered(head.spec, given.params), given.total, teacher)
    return _by_blocks(head, blocks(hidden), given, jax.tree.map(blocks, positions))


def _gathered(spec: ModelSpecification, params: Parameters) -> Parameters:
    """What fsdp divides is put together once, before the blocks, instead of for each of them."""
    axes, flat = flatten(needed(logical_axes(spec))), flatten(params)
    whole = {path: [None if name == "embed" else name for name in axes[path]] for path in flat}
    return nest({path: constrain(leaf, *whole[path]) for path, leaf in flat.items()})


def _at_once(
    head: Head, hidden: Float[Array, "b t d"], given: Given, positions: Positions
) -> tuple[Float[Array, ""], Parts]:
    logits = unembed(head.spec, given.params, hidden)
    mean = functools.partial(objective.weighted_mean, weights=positions.weights, total=given.total)
    parts = {"cross_entropy": mean(objective.token_cross_entropy(logits, positions.targets))}
    loss = parts["cross_entropy"]
    if head.distillation:
        assert positions.teacher is not None, "distillation has a teacher"
        params = given.params if given.teacher is None else given.teacher
        dense = jax.lax.stop_gradient(unembed(head.spec, params, positions.teacher))
        parts["distillation"] = mean(objective.distillation_loss(logits, dense, head.temperature))
        loss += head.distillation * parts["distillation"]
    return loss, parts


def _over_blocks(evaluate: Any, hidden: Float[Array, "n b c d"], positions: Positions) -> tuple[Any, Any]:
    """Adds up the first result of `evaluate` over the blocks that count, and stacks the second, 0 for the others."""
    one_block = jax.tree.map(lambda leaf: leaf[0], (hidden, positions))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(evaluate, *one_block))

    def step(total: Any, block: tuple[Array, Positions]) -> tuple[Any, Any]:
        counts = jnp.any(block[1].weights != 0)
        found, beside = jax.lax.cond(counts, evaluate, lambda *_: zeros, *block)
        return jax.tree.map(jnp.add, total, found), beside

    return jax.lax.scan(step, zeros[0], (hidden, positions))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_blocks(
    head: Head, hidden: Float[Array, "n b c d"], given: Given, positions: Positions
) -> tuple[Float[Array, ""], Parts]:
    return _over_blocks(lambda hidden, block: (_at_once(head, hidden, given, block), ()), hidden, positions)[0]


def _forward(head: Head, hidden: Array, given: Given, positions: Positions) -> tuple[tuple[Array, Parts], Array]:
    return _over_blocks(
        lambda hidden, block: jax.value_and_grad(lambda x: _at_once(head, x, given, block), has_aux=True)(hidden),
        hidden,
        positions,
    )


def _backward(head: Head, slopes: Array, slope: tuple[Array, Parts]) -> tuple[Array, None, None]:
    return (slope[0] * slopes.astype(jnp.float32)).astype(slopes.dtype), None, None


_by_blocks.defvjp(_forward, _backward)
