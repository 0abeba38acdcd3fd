"""What the forward pass of a traced program keeps for its backward pass."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
from jax.extend.core import Var

from qtale_jax.planning.program import inside
from qtale_jax.quantization.storage import array_bytes

LOOPS = ("scan", "while", "cond", "shard_map")
"""Primitives whose programs are not simply run on their operands."""

SAME_NUMBERS = ("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze")
"""Primitives whose result compilers fuse into what reads it rather than write it to memory."""


def kept_bytes(function: Callable, argument: Any, *others: Any) -> int:
    """Bytes that the forward pass of `function` keeps for its backward pass, arguments not included.

    Args:
        function: of (argument, *others), giving a scalar loss and something else.
        argument: (abstract) arrays that the gradient is of.
        others: (abstract) arrays.
    """
    jaxpr = _pullback(function, argument, *others)
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = {out for out in jaxpr.outvars if isinstance(out, Var) and out not in given}
    return sum(_bytes(out) for out in kept)


def distinct_bytes(function: Callable, argument: Any, *others: Any) -> int:
    """The same as `kept_bytes`, but of what loops keep of each turn only what cannot be had by casting or reshaping.

    Of arrays with the same numbers the smallest counts, and none if the turn was given them. That is what a turn works
    with that is computed again: nothing has to be written for another program to read.
    """
    jaxpr = _pullback(function, argument, *others)
    given = [_Value(variable.aval) for variable in (*jaxpr.constvars, *jaxpr.invars)]
    kept = {id(value): value for value in _inlined(jaxpr, given) if value is not None}
    for value in given:
        kept.pop(id(value), None)
    loops: dict[int, list[_Value]] = {}
    found = 0
    for value in kept.values():
        if value.maker is not None and value.maker.primitive.name == "scan":
            loops.setdefault(id(value.maker), []).append(value)
        else:
            found += _bytes(value)
    return found + sum(map(_of_loop, loops.values()))


@dataclass(eq=False)
class _Value:
    """An array of a program without calls: the equation that made it, of what, and which of its results it is."""

    aval: Any
    maker: Any = None
    operands: Sequence["_Value | None"] = ()
    position: int = 0


def _pullback(function: Callable, argument: Any, *others: Any) -> Any:
    def pullback(argument: Any, *others: Any) -> Any:
        return jax.vjp(lambda argument: function(argument, *others), argument, has_aux=True)[1]

    return jax.make_jaxpr(pullback)(argument, *others).jaxpr


def _bytes(value: Any) -> int:
    return array_bytes(cast(jax.ShapeDtypeStruct, value.aval))


def _inlined(jaxpr: Any, given: Iterable[_Value]) -> list[_Value | None]:
    """The results of a program with its calls inlined; literals are None."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), given, strict=True))

    def read(variable: Any) -> _Value | None:
        return values[variable] if isinstance(variable, Var) else None

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        called = [] if equation.primitive.name in LOOPS else list(inside(equation.params))
        if len(called) == 1 and len(called[0].invars) == len(operands):
            constants = [_Value(variable.aval) for variable in called[0].constvars]
            passed = [
                value or _Value(variable.aval) for value, variable in zip(operands, called[0].invars, strict=True)
            ]
            results = _inlined(called[0], [*constants, *passed])
        else:
            results = [_Value(out.aval, equation, operands, index) for index, out in enumerate(equation.outvars)]
        values.update(
            (variable, value or _Value(variable.aval))
            for variable, value in zip(equation.outvars, results, strict=True)
        )
    return [read(variable) for variable in jaxpr.outvars]


def _of_loop(kept: list[_Value]) -> int:
    """Bytes of what a scan keeps, the same numbers counted once."""
    body = kept[0].maker.params["jaxpr"].jaxpr
    given = [_Value(variable.aval) for variable in (*body.constvars, *body.invars)]
    of_turn = _inlined(body, given)
    smallest: dict[int, int] = {id(value): 0 for value in given}
    for value in kept:
        source, size = of_turn[value.position], _bytes(value)
        while source is not None and source.maker is not None and source.maker.primitive.name in SAME_NUMBERS:
            source = source.operands[0]
        if source is not None:  # a literal is no array
            smallest[id(source)] = min(size, smallest.get(id(source), size))
    return sum(smallest.values())
