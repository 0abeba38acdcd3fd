"""Quantizing a model directory into another one, with one layer in memory at a time.

Layers are read, quantized and written one after the other, and every finished layer is kept: a process that is killed
goes on with the layer that it was at. On the way there the calibration rows run through the finished layers again,
which costs a forward pass and gives the same numbers bit for bit.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qtale_jax.artifact import Deferred, GrowingModel, StoredModel, fingerprint, lineage, versions
from qtale_jax.artifact.arrays import Flat
from qtale_jax.config.schema import Config
from qtale_jax.models.specification import ModelSpecification, QuantizationSpecification, TensorFormat
from qtale_jax.quantization.calibration_rows import CalibrationRows, calibration_rows
from qtale_jax.quantization.formats import formats_of
from qtale_jax.quantization.layer import quantize_layer, restore_layer
from qtale_jax.quantization.pipeline import check_source, quantize_ends, quantizer_of
from qtale_jax.quantization.prefix import Prefix
from qtale_jax.quantization.report import LayerReport, LinearReport

Say = Callable[[LayerReport, bool], None]
"""Called with every finished layer and whether an earlier process finished it."""


class QuantizationRun:
    """A quantization that has been checked and can be planned, then carried out."""

    def __init__(self, source: str | Path, config: Config):
        """Opens the model and reads the calibration data.

        Args:
            source: model directory in floating point.
            config: `quantize`, and `data` if the method sees activations.

        Raises:
            InputError: anything wrong with the model, the formats or the data.
        """
        self.source, self.config = Path(source), config
        self.stored = StoredModel(source)
        self.spec: ModelSpecification = self.stored.spec
        check_source(self.spec)
        self.formats: dict[str, TensorFormat] = formats_of(self.spec, config.quantize)
        self.rows: CalibrationRows | None = None
        if config.quantize.sees_activations:
            self.rows = calibration_rows(config, self.spec, self.stored.tokenizer)

    @property
    def quantized_spec(self) -> ModelSpecification:
        """What the model will be."""
        noted = self.rows.describe(self.config) if self.rows else {}
        quantization = QuantizationSpecification(
            method=quantizer_of(self.config.quantize), formats=self.formats, calibration=noted
        )
        return self.spec.model_copy(update={"quantization": quantization})

    def carry_out(self, target: str | Path, say: Say = lambda report, before: None) -> list[LayerReport]:
        """Writes the quantized model to `target`.

        Raises:
            InputError: `target` exists, holds the beginning of another run, or a weight is not finite.
        """
        spec, settings = self.quantized_spec, self.config.quantize
        growing = GrowingModel(target, spec, self._identity(spec))
        prefix, reports = self._prefix(), []
        finished = growing.finished()
        for index in range(spec.architecture.num_layers):
            if index in finished:
                report = _report(finished[index])
                if prefix is not None:
                    restored = restore_layer(self.spec, index, growing.layer(index), self.formats)
                    prefix.decide(index, restored)
                    prefix.advance(index, restored)
            else:
                layer, report = quantize_layer(
                    self.spec, index, self.stored.layer(index), self.formats, settings, prefix
                )
                growing.add_layer(index, layer, asdict(report))
            reports.append(report)
            say(report, index in finished)
        provenance = lineage(
            "quantize",
            self.source,
            self.stored.provenance,
            quantizer=self._settings(),
            layers=[asdict(report) for report in reports],
        )
        growing.finish(self._ends(spec), tokenizer=self.stored.tokenizer, provenance=provenance)
        return reports

    def _identity(self, spec: ModelSpecification) -> dict[str, Any]:
        return {
            "source": fingerprint(self.source),
            "quantize": self._settings(),
            "compute_dtype": self.config.train.compute_dtype,
            "specification": spec.model_dump(mode="json"),
            "versions": versions(),
        }

    def _settings(self) -> dict[str, Any]:
        return self.config.quantize.model_dump(mode="json", exclude={"model", "output"})

    def _prefix(self) -> Prefix | None:
        if self.rows is None:
            return None
        dtype = jnp.dtype(self.config.train.compute_dtype)
        prefix = Prefix(self.spec, self.rows.tokens, self.rows.segment_ids, self.config.quantize.statistics, dtype)
        prefix.start(self.stored.part("embedding"))
        return prefix

    def _ends(self, spec: ModelSpecification) -> Flat:
        """Embedding, head and final norm; what stays in floating point is read when it is written."""
        rest: Flat = {}
        for part in ("embedding", "head", "final_norm"):
            if part in self.formats:
                quantized = quantize_ends({part: self.stored.part(part)}, {part: self.formats[part]})
                rest |= {f"{part}/quantized/{name}": leaf for name, leaf in quantized[part]["quantized"].items()}
            else:
                for name, leaf in self.stored.abstract.items():
                    if name.startswith(f"{part}/"):
                        rest[name] = Deferred(leaf.shape, leaf.dtype, lambda name=name: self._array(name))
        return rest

    def _array(self, name: str):
        return jax.device_get(self.stored.read([name])[name])


def _report(note: dict[str, Any]) -> LayerReport:
    return LayerReport(**{**note, "linears": {name: LinearReport(**entry) for name, entry in note["linears"].items()}})
