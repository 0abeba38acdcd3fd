"""A function of the chosen tokens of each row, in the smallest of a few sizes that holds them, and its gradient.

Differentiated as it is, `lax.switch` would keep what the backward pass of every branch needs, and copies of the weights
with it. Here all branches keep theirs in the same arrays, as large as the largest branch needs them, and weights stay
where they are. Nor is anything scattered: what gathers in one direction puts back in the other.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float

from qtale_jax.models.compaction import Take
from qtale_jax.models.skipping import Selection

KEPT = "kept for the backward pass of chosen tokens"
"""Name (`checkpoint_name`) of the arrays that go from the forward to the backward pass.

A policy of `jax.checkpoint` that saves some values inside of a branch would save them once for every branch. It should
save these instead, and another `jax.checkpoint` around the function say which these are.
"""

Function = Callable[[Take, Any, Float[Array, "b c d"], Float[Array, "b c"], Any], Float[Array, "b c d"]]


@dataclass(frozen=True, eq=False)
class _Pullback:
    """What of a branch's pullback is not an array.

    Attributes:
        tree: its structure.
        shared: for each of its leaves the index among the shared arrays, None for an array of the branch's own.
        shapes: of the latter.
    """

    tree: Any
    shared: tuple[int | None, ...]
    shapes: tuple[tuple[int, ...], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class _Kept:
    """What the backward pass needs.

    Attributes:
        selection: the chosen tokens.
        shared: leaves of what belongs to no token.
        own: arrays that the branch's pullback needs besides, padded to those of the largest branch.
        pullbacks: of all branches.
        moving: which leaves of (shared, hidden, gate) the gradient is of.
        tree: structure of what is shared.
    """

    selection: Selection
    shared: list[Array]
    own: list[Array]
    pullbacks: tuple[_Pullback, ...] = field(metadata={"static": True})
    moving: tuple[bool, ...] = field(metadata={"static": True})
    tree: Any = field(metadata={"static": True})


def _compacted(
    function: Function,
    selection: Selection,
    shared: Any,
    hidden: Float[Array, "b t d"],
    gate: Float[Array, "b t"],
    rest: Any,
) -> Float[Array, "b t d"]:
    """The residual stream with the chosen tokens replaced by what `function` makes of them.

    Args:
        function: (take, shared, hidden, gate, rest) -> hidden, the second and the third of the taken tokens only.
        selection: the chosen tokens.
        shared: arrays that belong to no token, such as weights.
        hidden: residual stream.
        gate: a number for each token.
        rest: arrays that no gradient is taken of; `function` takes from them what it needs.
    """
    compaction = selection.compaction

    def run(size: int) -> Array:
        take = functools.partial(compaction.gather, size=size)
        return compaction.spread(function(take, shared, take(hidden), take(gate), rest), hidden)

    return jax.lax.switch(selection.index, [functools.partial(run, size) for size in selection.sizes])


compacted = jax.custom_vjp(_compacted, nondiff_argnums=(0,))
"""`_compacted` with its own gradient."""


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


def _forward(function: Function, *arguments: Any) -> tuple[Array, _Kept]:
    moving = tuple(primal.perturbed for primal in jax.tree.leaves(arguments[1:4], is_leaf=_is_primal))
    values = jax.tree.map(lambda primal: primal.value, arguments, is_leaf=_is_primal)
    selection, shared, hidden, gate, rest = values
    sizes, compaction = selection.sizes, selection.compaction
    leaves, tree = jax.tree.flatten(shared)
    pullbacks: dict[int, _Pullback] = {}

    def run(size: int, leaves: list[Array], hidden: Array, gate: Array) -> tuple[Array, list[Array]]:
        take = functools.partial(compaction.gather, size=size)
        given = [*leaves, take(hidden), take(gate)]

        def of_moving(moved: list[Array]) -> Array:
            left = iter(moved)
            *rejoined, here, its_gate = [next(left) if moves else x for x, moves in zip(given, moving, strict=True)]
            return function(take, jax.tree.unflatten(tree, rejoined), here, its_gate, rest)

        out, pullback = jax.vjp(of_moving, [x for x, moves in zip(given, moving, strict=True) if moves])
        needed, structure = jax.tree.flatten(pullback)
        # Inputs that a pullback needs are among its leaves as they are. (Otherwise they would be copied, no worse.)
        places = {id(leaf): place for place, leaf in enumerate(leaves)}
        where = tuple(places.get(id(leaf)) for leaf in needed)
        own = [leaf for leaf, place in zip(needed, where, strict=True) if place is None]
        pullbacks[size] = _Pullback(structure, where, tuple(leaf.shape for leaf in own))
        return compaction.spread(out, hidden), own

    largest = jax.eval_shape(functools.partial(run, sizes[-1]), leaves, hidden, gate)[1]

    def branch(size: int, *inputs: Any) -> tuple[Array, list[Array]]:
        out, own = run(size, *inputs)
        return out, [_padded(leaf, like.shape) for leaf, like in zip(own, largest, strict=True)]

    branches = [functools.partial(branch, size) for size in sizes]
    out, own = jax.lax.switch(selection.index, branches, leaves, hidden, gate)
    own = [checkpoint_name(leaf, KEPT) for leaf in own]
    return out, _Kept(selection, leaves, own, tuple(pullbacks[size] for size in sizes), moving, tree)


def _padded(x: Array, shape: tuple[int, ...]) -> Array:
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, large - small) for small, large in zip(x.shape, shape, strict=True)])


def _backward(function: Function, kept: _Kept, slope: Float[Array, "b t d"]) -> tuple[Any, ...]:
    del function
    compaction = kept.selection.compaction

    def run(size: int, pullback: _Pullback, shared: list[Array], own: list[Array], slope: Array) -> list[Array | None]:
        left = iter([leaf[tuple(map(slice, shape))] for leaf, shape in zip(own, pullback.shapes, strict=True)])
        needed = [next(left) if place is None else shared[place] for place in pullback.shared]
        # Tokens that only fill up have gone nowhere.
        reached = jnp.where(compaction.chosen[:, :, None], slope, jnp.zeros((), slope.dtype))
        (moved,) = jax.tree.unflatten(pullback.tree, needed)(compaction.gather(reached, size))
        found = iter(moved)
        *of_shared, of_hidden, of_gate = [next(found) if moves else None for moves in kept.moving]
        if of_hidden is not None:  # all other tokens have passed as they were
            of_hidden = compaction.spread(of_hidden, slope)
        if of_gate is not None:
            of_gate = compaction.spread(of_gate, jnp.zeros((), of_gate.dtype))
        return [*of_shared, of_hidden, of_gate]

    branches = [functools.partial(run, *parts) for parts in zip(kept.selection.sizes, kept.pullbacks, strict=True)]
    *of_shared, of_hidden, of_gate = jax.lax.switch(kept.selection.index, branches, kept.shared, kept.own, slope)
    return None, jax.tree.unflatten(kept.tree, of_shared), of_hidden, of_gate, None


compacted.defvjp(_forward, _backward, symbolic_zeros=True)
