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
from qtale_jax.artifact.growing import check_target
from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.specification import ModelSpecification, QuantizationSpecification, TensorFormat
from qtale_jax.quantization.calibration_rows import CalibrationRows, calibration_rows
from qtale_jax.quantization.formats import formats_of
from qtale_jax.quantization.layer import quantize_layer, restore_layer
from qtale_jax.quantization.memory import release_freed
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

    def check(self, target: str | Path) -> None:
        """Checks that `target` can be written, before anything is computed.

        Raises:
            InputError: it exists, or holds the beginning of another run.
        """
        check_target(target, self._identity(self.quantized_spec))

    def carry_out(self, target: str | Path, say: Say = lambda report, before: None) -> list[LayerReport]:
        """Writes the quantized model to `target`.

        Raises:
            InputError: `target` exists, holds the beginning of another run, or a weight is not finite; in the last
                case nothing is left of what was written.
        """
        spec, settings = self.quantized_spec, self.config.quantize
        growing = GrowingModel(target, spec, self._identity(spec))
        prefix, reports = self._prefix(spec), []
        finished = growing.finished()
        for index in range(spec.architecture.num_layers):
            if index in finished:
                report = _report(finished[index])
                if prefix is not None:
                    restored = restore_layer(self.spec, index, growing.layer(index), self.formats)
                    prefix.decide(index, restored)
                    prefix.advance(index, restored)
            else:
                source = self.stored.layer(index)
                try:
                    layer, report = quantize_layer(self.spec, index, source, self.formats, settings, prefix)
                except InputError:  # the same command would come to the same end
                    growing.discard()
                    raise
                growing.add_layer(index, layer, asdict(report))
                del source, layer  # not to be held beside the next ones
                release_freed()
            reports.append(report)
            say(report, index in finished)
        prefix = None  # its hidden states are not needed beside what is written now
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

    def _prefix(self, spec: ModelSpecification) -> Prefix | None:
        if self.rows is None:
            return None
        dtype = jnp.dtype(self.config.train.compute_dtype)
        settings = self.config.quantize.statistics
        prefix = Prefix(self.spec, self.rows.tokens, self.rows.segment_ids, settings, dtype, spec.thresholds)
        prefix.start(self._quantized("embedding"), self.formats.get("embedding"))
        return prefix

    def _ends(self, spec: ModelSpecification) -> Flat:
        """Embedding, head and final norm; what stays in floating point is read when it is written."""
        rest: Flat = {}
        for part in ("embedding", "head", "final_norm"):
            if part in self.formats:
                quantized = self._quantized(part)["quantized"]
                rest |= {f"{part}/quantized/{name}": leaf for name, leaf in quantized.items()}
            else:
                for name, leaf in self.stored.abstract.items():
                    if name.startswith(f"{part}/"):
                        rest[name] = Deferred(leaf.shape, leaf.dtype, lambda name=name: self._array(name))
        return rest

    def _quantized(self, part: str) -> Parameters:
        """Embedding or head as the quantized model has it."""
        found = {part: self.stored.part(part)}
        formats = {name: format for name, format in self.formats.items() if name == part}
        return (found | quantize_ends(found, formats))[part]

    def _array(self, name: str):
        return jax.device_get(self.stored.read([name])[name])


def _report(note: dict[str, Any]) -> LayerReport:
    return LayerReport(**{**note, "linears": {name: LinearReport(**entry) for name, entry in note["linears"].items()}})
