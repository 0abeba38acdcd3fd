"""The token rows that quantizers look at, and what is recorded of them."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtale_jax.config.schema import Config
from qtale_jax.data.rows import build_rows
from qtale_jax.data.tokens import examples
from qtale_jax.errors import InputError
from qtale_jax.models.specification import ModelSpecification


@dataclass(frozen=True)
class CalibrationRows:
    """Rows (rows, length) int32 with segment ids (0: padding), and the number of examples in them."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    examples: int

    def describe(self, config: Config) -> dict[str, Any]:
        """What model.json says of them: source, counts, and a hash of the very tokens."""
        digest = hashlib.sha256()
        for rows in (self.tokens, self.segment_ids):
            digest.update(np.ascontiguousarray(rows, np.int32).tobytes())
        return {
            "data": {"kind": config.data.kind, "path": config.data.path, "split": "calibration"},
            "seed": config.seed,
            "examples": self.examples,
            "rows": list(self.tokens.shape),
            "tokens": int((self.segment_ids > 0).sum()),
            "sha256": digest.hexdigest(),
        }


def calibration_rows(config: Config, spec: ModelSpecification, tokenizer: Any) -> CalibrationRows:
    """The first `quantize.statistics.examples` examples of the calibration split, packed or padded as in training.

    Raises:
        InputError: no tokenizer, too few examples, or rows longer than the model's context.
    """
    asked = config.quantize.statistics.examples
    if tokenizer is None:
        raise InputError(
            f"quantize.method={config.quantize.method!r} needs calibration data, and the model directory "
            "has no tokenizer to read it with; allowed: quantize.method=rtn"
        )
    found, _ = examples(config, tokenizer, "calibration")
    if len(found) < asked:
        raise InputError(
            f"quantize.statistics.examples={asked}, but the calibration split has only {len(found)} examples of at "
            f"most data.length={config.data.length} tokens; raise data.held_out or lower it"
        )
    rows = build_rows(found[:asked], config.data.length, config.data.packing)
    used = int(rows["segment_ids"].any(axis=0).sum())  # columns that are padding in every row tell nothing
    if used > spec.architecture.max_length:
        raise InputError(
            f"data.length={config.data.length}: calibration rows of {used} tokens are longer than the model's context "
            f"of {spec.architecture.max_length}"
        )
    return CalibrationRows(rows["tokens"][:, :used], rows["segment_ids"][:, :used], asked)
