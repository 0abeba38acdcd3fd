"""What a traced program computes, reads and keeps: counted from its equations, so that it is the program that runs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import jax
from jax.extend.core import Var

from qtale_jax.quantization.storage import array_bytes


@dataclass(frozen=True)
class Products:
    """The matrix products of a program: FLOPs (a multiply-add is two), bytes of their operands and results."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Products") -> "Products":
        return Products(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> "Products":
        """The same program, `count` times."""
        return Products(self.flops * count, self.bytes * count)


def products(function: Callable, *arguments: Any) -> Products:
    """Counts the products of `function`, traced on (abstract) arguments.

    Loops of known length count as often as they run, of several branches the largest counts, loops of unknown length
    count once. What is not a product is taken to be fused into one.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> Products:
    total = Products()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
            continue
        inside = [_count(part) for part in _inside(equation.params)]
        if not inside:
            continue
        if equation.primitive.name == "cond":
            total += max(inside, key=lambda part: (part.flops, part.bytes))
        else:
            total += sum(inside, Products()).times(equation.params.get("length", 1))
    return total


def _product(equation: Any) -> Products:
    left, right = (variable.aval for variable in equation.invars)
    out = equation.outvars[0].aval
    (contracted, _), _ = equation.params["dimension_numbers"]
    flops = 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
    return Products(flops, float(sum(map(array_bytes, (left, right, out)))))


def _inside(parameters: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs among the parameters of an equation."""
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def kept_bytes(function: Callable, argument: Any, *others: Any) -> int:
    """Bytes that the forward pass of `function` keeps for its backward pass, arguments not included.

    Args:
        function: of (argument, *others), giving a scalar loss and something else.
        argument: (abstract) arrays that the gradient is of.
        others: (abstract) arrays.
    """

    def pullback(argument: Any, *others: Any) -> Any:
        return jax.vjp(lambda argument: function(argument, *others), argument, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(pullback)(argument, *others).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    kept = {out for out in jaxpr.outvars if isinstance(out, Var) and out not in given}
    return sum(array_bytes(cast(jax.ShapeDtypeStruct, out.aval)) for out in kept)
