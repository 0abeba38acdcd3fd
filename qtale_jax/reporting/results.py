"""Evaluation files: their schema, how they are read and checked, and the public `results.json`."""

import json
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qtale_jax.errors import InputError, nearest

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Amount = Annotated[int | float, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class ResultRow(BaseModel):
    """One model, at one quantizer, threshold and seed: a row of `results.json` with exactly these keys.

    `accuracy` holds fractions (not percent) per task and their `mean`; `standard_error` belongs to that mean, or to
    `nats_per_token` where `accuracy` is null. `executed_ratio` is the share of layers run, counted from the decisions
    taken; `weight_bytes` counts the arrays held; `flops_per_token` follows from both.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    routing: Literal["dense", "dllm", "qtale", "mod", "random"]
    quantizer: str
    bits: int
    group_size: int | None
    theta: float | None
    executed_ratio: Share
    accuracy: dict[str, Share] | None
    standard_error: Annotated[float, Field(ge=0.0)] | None
    nats_per_token: Annotated[float, Field(ge=0.0)] | None
    weight_bytes: Amount
    flops_per_token: Amount
    seed: int

    @model_validator(mode="after")
    def _check(self):
        if self.accuracy is not None and "mean" not in self.accuracy:
            raise ValueError("accuracy needs the key 'mean'")
        if self.accuracy is None and self.nats_per_token is None:
            raise ValueError("accuracy and nats_per_token are both null; one of them is needed")
        return self


RESULT_KEYS = tuple(ResultRow.model_fields)


class Histogram(_Record):
    """Counts between consecutive edges; here of logit gaps."""

    edges: tuple[float, ...]
    counts: tuple[Amount, ...]

    @model_validator(mode="after")
    def _check(self):
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} counts need {len(self.counts) + 1} edges, found {len(self.edges)}")
        if any(right <= left for left, right in pairwise(self.edges)):
            raise ValueError("edges must increase")
        return self

    def density(self) -> list[float]:
        """Share of all counts per unit of the edges, bin by bin; sums to one over the range."""
        total = sum(self.counts)
        return [
            count / total / (right - left)
            for count, (left, right) in zip(self.counts, pairwise(self.edges), strict=True)
        ]

    def occupied(self) -> tuple[float, float]:
        """The range without the outer bins that hold under a twentieth of an average bin."""
        least = sum(self.counts) / len(self.counts) / 20
        filled = [index for index, count in enumerate(self.counts) if count >= least]
        return self.edges[filled[0]], self.edges[filled[-1] + 1]


class ExecutionMap(_Record):
    """What each layer did with each token of one example.

    `execute` is (tokens, layers); `probability` is (tokens, routed layers): the first `always_on_layers` layers have no
    router.
    """

    tokens: tuple[str, ...]
    execute: tuple[tuple[bool, ...], ...]
    probability: tuple[tuple[Share, ...], ...]
    always_on_layers: int = Field(ge=0)
    task: str | None = None

    @model_validator(mode="after")
    def _check(self):
        if not self.tokens or not len(self.tokens) == len(self.execute) == len(self.probability):
            raise ValueError(
                f"{len(self.tokens)} tokens, {len(self.execute)} rows of execute and {len(self.probability)} of "
                "probability; allowed: the same number, at least one"
            )
        layers = len(self.execute[0])
        if any(len(row) != layers for row in self.execute):
            raise ValueError("rows of execute differ in length")
        if any(len(row) != layers - self.always_on_layers for row in self.probability):
            raise ValueError(
                f"rows of probability need {layers} - {self.always_on_layers} entries, one per routed layer"
            )
        return self

    @property
    def executed_ratio(self) -> float:
        """Share of the (token, layer) pairs that were executed, always-on layers included."""
        return sum(map(sum, self.execute)) / (len(self.execute) * len(self.execute[0]))


class WrittenResponses(_Record):
    """ROUGE of what the model wrote after each prompt: F-measures, how many prompts, how many were too long."""

    rouge1: Share
    rouge2: Share
    rougeL: Share
    examples: int = Field(gt=0)
    dropped: int = Field(ge=0)
    executed_ratio: Share


class Evaluation(_Record):
    """One file of the evaluation stage: a row and what the plots need beside it."""

    row: ResultRow
    point: str = ""
    bytes: dict[str, Amount] = {}
    executed_per_layer: tuple[Share, ...] = ()
    executed_ratio_scored: Share | None = None
    gap_histogram: Histogram | None = None
    logit_gap_mean: float | None = None
    flip_rate: Share | None = None
    written: WrittenResponses | None = None
    maps: tuple[ExecutionMap, ...] = ()
    source: str = ""


def _explain(error: ValidationError, schema: Mapping[str, object]) -> str:
    """The first validation error as `key: what is wrong, found ...`."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "file"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(str(first['loc'][-1]), schema)}; allowed: {', '.join(schema)}"
    if first["type"] == "missing":
        return f"missing key {key}"
    message = first["msg"].removeprefix("Value error, ")
    found = first.get("input")
    shown = f", found {found!r}" if isinstance(found, str | int | float | bool) or found is None else ""
    return f"{key}: {message[:1].lower()}{message[1:]}{shown}"


def read_evaluation(path: Path) -> Evaluation:
    """Reads one evaluation file.

    Raises:
        InputError: the file is missing, is not JSON, or a key is missing, unknown or has a wrong value.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); evaluate this model again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found a JSON {type(content).__name__}, allowed: an object with the key 'row'")
    try:
        return Evaluation.model_validate({**content, "source": str(path)})
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, ResultRow.model_fields)}") from error


def evaluation_files(folder: Path) -> list[Path]:
    """Every evaluation file under `folder`, at any depth, in the order of their names."""
    return sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))


def read_evaluations(folder: Path, wanted: Collection[Path] | None = None) -> list[Evaluation]:
    """Reads the evaluation files under `folder`, in the order of their names: those `wanted`, or all.

    Raises:
        InputError: there is none, one is malformed, or two of them measure the same thing.
    """
    paths = [path for path in evaluation_files(folder) if wanted is None or path in wanted]
    if not paths:
        raise InputError(
            f"{folder}: no evaluation found (*.json); run qtale_jax.evaluate or qtale_jax.experiment first"
        )
    evaluations = [read_evaluation(path) for path in paths]
    seen: dict[tuple, str] = {}
    for evaluation in evaluations:
        row = evaluation.row
        key = (row.model, row.quantizer, row.bits, row.group_size, evaluation.point, row.seed)
        if key in seen:
            raise InputError(
                f"{evaluation.source}: the same row.model, quantizer, bits, group_size, point and seed as {seen[key]}; "
                "remove one or give it another row.model"
            )
        seen[key] = evaluation.source
    return evaluations


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it when whole, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; a report is an ordinary one
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_results(path: Path, rows: Iterable[ResultRow]) -> None:
    """Writes `results.json`: a list of rows with the keys of `ResultRow`, one row per line."""
    lines = ",\n".join("  " + json.dumps(row.model_dump(mode="json"), ensure_ascii=False) for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


def read_results(path: Path) -> list[ResultRow]:
    """Reads `results.json` back.

    Raises:
        InputError: the file is missing or does not hold such a list.
    """
    try:
        return [ResultRow.model_validate(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, ResultRow.model_fields)}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a JSON list of result rows ({error})") from error
