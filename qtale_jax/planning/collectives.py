"""Collectives of a compiled program: how many run, and how many bytes they give, read from its HLO text."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
"""HLO opcodes; an asynchronous pair counts once, by its `-start`."""

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "f16": 16}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass
class _Computation:
    """Collectives of a computation, and the computations that it runs, each with how often."""

    collectives: list[tuple[str, int]] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Counts the collectives of one run of a program.

    Loops count as often as they run where the compiler knows it, otherwise once; all branches count.

    Returns:
        By opcode: `count`, and `bytes` of the results on one device.
    """
    computations, entry = _parse(hlo)
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})

    def add(name: str, times: int) -> None:
        computation = computations.get(name, _Computation())
        for kind, size in computation.collectives:
            found[kind]["count"] += times
            found[kind]["bytes"] += times * size
        for called, each in computation.calls:
            add(called, times * each)

    add(entry, 1)
    return {kind: found[kind] for kind in KINDS if kind in found}


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(), ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            _read(instruction[1], current)
    return computations, entry


def _read(text: str, computation: _Computation) -> None:
    """Adds one instruction, `shape opcode(operands), attributes`."""
    shape, opcode, rest = _split(text)
    kind = opcode.removesuffix("-start")
    if kind in KINDS:
        computation.collectives.append((kind, _result_bytes(shape, asynchronous=kind != opcode)))
        return  # what it applies is the sum of two numbers
    if opcode in ("async-update", "async-done"):
        return  # of what its start has run
    trips = _TRIPS.search(rest)
    times = int(trips[1]) if opcode == "while" and trips else 1
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


def _result_bytes(shape: str, asynchronous: bool) -> int:
    """Bytes of a result; an asynchronous start also gives its operands, before the results and about as many."""
    sizes = [_bytes(kind, dimensions) for kind, dimensions in _SHAPE.findall(shape)]
    if asynchronous and len(sizes) > 1:
        return max(sizes)
    return sum(sizes)


def _bytes(kind: str, dimensions: str) -> int:
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind) or (int(digits[0]) if digits else 8)
    return math.ceil(bits * math.prod(int(size) for size in dimensions.split(",") if size) / 8)
