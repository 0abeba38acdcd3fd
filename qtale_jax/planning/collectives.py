"""Collectives of a compiled program: how many run, how many bytes and which arrays they give, from its HLO text."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
"""HLO opcodes; an asynchronous pair counts once, by its `-start`. So do the parts of a collective that a compiler for
TPUs has put into several fusions, to compute in the meantime: they have one channel."""

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "f16": 16}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CONSTANT = re.compile(r"^\s+%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_LIMIT = re.compile(r"^\s+ROOT .* compare\(\S* ?%?[\w.\-]+, (?:\S+ )?%?([\w.\-]+)\), direction=LT")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Result:
    """An array that a collective gives: bf16[4096,1024] for example, and its bytes on one device."""

    array: str
    bytes: int


@dataclass
class _Computation:
    """Collectives of a computation, and the computations that it runs, each with how often.

    Attributes:
        collectives: opcode, channel, results.
        calls: name, and how often; a string: as often as the condition of that name allows.
        constants: integers in it.
        trips: of a condition `counter < constant`, the constant; counters of JAX's loops start at 0.
    """

    collectives: list[tuple[str, str | None, tuple[Result, ...]]] = field(default_factory=list)
    calls: list[tuple[str, int | str]] = field(default_factory=list)
    constants: dict[str, int] = field(default_factory=dict)
    trips: int = 1


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Counts the collectives of one run of a program.

    Loops count as often as they run where the compiler knows it, otherwise once; all branches count.

    Returns:
        By opcode: `count`, and `bytes` of the results on one device.
    """
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for kind, results, times in _run(hlo):
        found[kind]["count"] += times
        found[kind]["bytes"] += times * sum(result.bytes for result in results)
    return {kind: found[kind] for kind in KINDS if kind in found}


def gathered(hlo: str) -> list[dict[str, Any]]:
    """The arrays that all-gathers put together, the largest first: `array`, `bytes` of one, `count` of all."""
    counts: Counter[Result] = Counter()
    for kind, results, times in _run(hlo):
        if kind == "all-gather":
            for result in results:
                counts[result] += times
    largest = sorted(counts.items(), key=lambda entry: (-entry[0].bytes, entry[0].array))
    return [{"array": result.array, "bytes": result.bytes, "count": count} for result, count in largest]


def _run(hlo: str) -> Iterator[tuple[str, tuple[Result, ...], int]]:
    """Yields the collectives that a program runs: opcode, results, how often."""
    computations, entry = _parse(hlo)
    runs: Counter[tuple[str, int]] = Counter()  # of each collective, by computation and place in it

    def visit(name: str, times: int) -> None:
        computation = computations.get(name, _Computation())
        for place in range(len(computation.collectives)):
            runs[name, place] += times
        for called, each in computation.calls:
            trips = each if isinstance(each, int) else computations.get(each, _Computation()).trips
            visit(called, times * trips)

    visit(entry, 1)
    logical: dict[Any, tuple[str, tuple[Result, ...], int]] = {}
    for (name, place), times in runs.items():
        kind, channel, results = computations[name].collectives[place]
        key = (name, place) if channel is None else (kind, channel)
        if key not in logical or logical[key][2] < times:
            logical[key] = kind, results, times
    return iter(logical.values())


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(), ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            _read(instruction[1], current)
            if constant := _CONSTANT.match(line):
                current.constants[constant[1]] = int(constant[2])
            elif limit := _LIMIT.match(line):
                current.trips = current.constants.get(limit[1], 1)
    return computations, entry


def _read(text: str, computation: _Computation) -> None:
    """Adds one instruction, `shape opcode(operands), attributes`."""
    shape, opcode, rest = _split(text)
    kind = opcode.removesuffix("-start")
    if kind in KINDS:
        channel = _CHANNEL.search(rest)
        computation.collectives.append((kind, channel[1] if channel else None, _results(shape, opcode)))
        return  # what it applies is the sum of two numbers
    if opcode in ("async-update", "async-done"):
        return  # of what its start has run
    times: int | str = 1
    if opcode == "while":
        trips, condition = _TRIPS.search(rest), _CONDITION.search(rest)
        times = int(trips[1]) if trips else condition[1] if condition else 1
    computation.calls += [(name, times) for name in _CALLED.findall(rest)]
    for branches in _BRANCHES.findall(rest):
        computation.calls += [(name.strip().removeprefix("%"), 1) for name in branches.split(",")]


def _split(text: str) -> tuple[str, str, str]:
    """(shape, opcode, the rest); the shape of several results is in parentheses."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and depth == 0:
            opcode, _, rest = text[index + 1 :].partition("(")
            return text[:index], opcode, rest
    return text, "", ""


def _results(shape: str, opcode: str) -> tuple[Result, ...]:
    """The arrays of a result; of some asynchronous starts it has the operands first, as many, and what synchronises."""
    arrays = [Result(found[0], _bytes(found[1], found[2])) for found in _SHAPE.finditer(shape)]
    if opcode in ("all-gather-start", "collective-permute-start"):
        arrays = [result for result in arrays if result.array != "u32[]"]
        arrays = arrays[len(arrays) // 2 :]
    return tuple(arrays)


def _bytes(kind: str, dimensions: str) -> int:
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind) or (int(digits[0]) if digits else 8)
    return math.ceil(bits * math.prod(int(size) for size in dimensions.split(",") if size) / 8)
