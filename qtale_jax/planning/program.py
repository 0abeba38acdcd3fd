"""What a traced program computes and reads: counted from its equations, so that it is the program that runs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

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
        parts = [_count(part) for part in inside(equation.params)]
        if not parts:
            continue
        if equation.primitive.name == "cond":
            total += max(parts, key=lambda part: (part.flops, part.bytes))
        else:
            total += sum(parts, Products()).times(equation.params.get("length", 1))
    return total


def _product(equation: Any) -> Products:
    left, right = (variable.aval for variable in equation.invars)
    out = equation.outvars[0].aval
    (contracted, _), _ = equation.params["dimension_numbers"]
    flops = 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
    return Products(flops, float(sum(map(array_bytes, (left, right, out)))))


def inside(parameters: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs among the parameters of an equation."""
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part
