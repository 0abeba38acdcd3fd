"""Quantizing one layer: its router, then its linears in the order in which a block runs them."""

from typing import Any

import jax

from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.lora import map_linears, with_weight
from qtale_jax.models.specification import ModelSpecification, TensorFormat
from qtale_jax.quantization.matrix import Problem, quantize_matrix
from qtale_jax.quantization.prefix import Counts, Prefix
from qtale_jax.quantization.report import LayerReport, LinearReport
from qtale_jax.quantization.scaling import PART, READERS, scale_inputs
from qtale_jax.quantization.statistics import Statistics
from qtale_jax.quantization.storage import Stored, array_bytes, lay_out, unstore

_lay_out = jax.jit(lay_out, static_argnames=("format",))
_unstore = jax.jit(unstore, static_argnames=("shape", "format"))


def quantize_layer(
    spec: ModelSpecification,
    index: int,
    layer: Parameters,
    formats: dict[str, TensorFormat],
    config: QuantizeConfig,
    prefix: Prefix | None,
) -> tuple[Parameters, LayerReport]:
    """Quantizes a layer and moves the calibration rows, if there are any, behind it.

    GPTQ and MagR see, for each group of linears that share an input, what the linears before them in the same layer
    give after quantization. AWQ looks for its scales in the layer as it is, since a scale changes two linears.

    Args:
        spec: the model in floating point.
        index: of the layer.
        layer: its parameters; not changed.
        formats: of the matrices of all layers, `QuantizationSpecification.formats`.
        config: method and settings.
        prefix: calibration rows before this layer; None for methods that see no activations.

    Returns:
        The stored layer and what was done to it.

    Raises:
        InputError: a matrix is not finite.
    """
    work = _Work(spec, index, layer, formats, config, prefix)
    work.router()
    counts = Counts(0, 0)
    if prefix is not None:
        counts = prefix.decide(index, work.restored)
    if config.method == "awq" and prefix is not None:
        work.scaled()
    else:
        work.in_order()
    if prefix is not None:
        prefix.advance(index, work.restored)
    before, after = (sum(map(array_bytes, jax.tree.leaves(tree))) for tree in (layer, work.stored))
    return work.stored, LayerReport(index, work.reports, before, after, counts.executed, counts.filled)


def restore_layer(
    spec: ModelSpecification, index: int, stored: Parameters, formats: dict[str, TensorFormat]
) -> Parameters:
    """The floating-point layer that a stored one computes with, its restored matrices in float32."""

    def one(name: str, linear: Parameters) -> Parameters:
        if "quantized" not in linear:
            return linear
        shape = spec.architecture.linear_shape(name)
        kernel = _unstore(linear["quantized"], shape=shape, format=formats[f"{index}/{name}"])
        return with_weight(linear, {"kernel": kernel})

    layer = map_linears(one, stored)
    if f"{index}/router" in formats:
        layer["router"] = _restored_router(spec, stored["router"], formats[f"{index}/router"])
    return layer


def _restored_router(spec: ModelSpecification, router: Parameters, format: TensorFormat) -> Parameters:
    assert spec.routing is not None
    shape = (spec.architecture.hidden_size, spec.routing.router_hidden)
    hidden = router["hidden"]
    kernel = _unstore(hidden["quantized"], shape=shape, format=format)
    return {**router, "hidden": {"kernel": kernel, "bias": hidden["bias"]}}


class _Work:
    """A layer on the bench: `restored` computes with what is done so far, `stored` will be written."""

    def __init__(self, spec, index, layer, formats, config, prefix):
        self.spec: ModelSpecification = spec
        self.index: int = index
        self.config: QuantizeConfig = config
        self.prefix: Prefix | None = prefix
        self.formats = {name.split("/")[1]: form for name, form in formats.items() if name.startswith(f"{index}/")}
        self.restored: dict[str, Any] = {part: dict(tree) for part, tree in layer.items()}
        self.stored: dict[str, Any] = {part: dict(tree) for part, tree in layer.items()}
        self.reports: dict[str, LinearReport] = {}

    def router(self) -> None:
        """Rounds the router first, so that the tokens which count are those that the stored router will pick."""
        if "router" not in self.formats:
            return
        hidden = self.stored["router"]["hidden"]
        stored = self._quantize("router", hidden["kernel"], None)
        self.stored["router"]["hidden"] = {"quantized": stored, "bias": hidden["bias"]}
        self.restored["router"] = _restored_router(self.spec, self.stored["router"], self.formats["router"])

    def in_order(self) -> None:
        """Quantizes group after group, each on what the groups before it give."""
        for reader, names in READERS.items():
            if not any(name in self.formats for name in names):
                continue
            statistics = last = None
            if self.prefix is not None:
                statistics = self.prefix.statistics(self.index, self.restored, reader)
                if self.config.method.startswith("magr") and self.config.magr.last_sample_only:
                    last = self.prefix.statistics(self.index, self.restored, reader, last_sample_only=True)
            for name in names:
                self._linear(name, statistics, last_sample=last)

    def scaled(self) -> None:
        """AWQ: scales for the whole layer, then every linear."""
        assert self.prefix is not None
        prefix, layer = self.prefix, self.restored
        linears = {name: form for name, form in self.formats.items() if name in PART}
        scaled, statistics, before = scale_inputs(
            layer,
            self.spec.architecture,
            linears,
            lambda reader: prefix.statistics(self.index, layer, reader),
            self.config.awq.grid,
        )
        for part in ("attention", "mlp", "attention_norm", "mlp_norm"):
            self.restored[part], self.stored[part] = dict(scaled[part]), dict(scaled[part])
        for reader, names in READERS.items():
            for name in names:
                self._linear(name, statistics[reader], before.get(name))

    def _linear(
        self,
        name: str,
        statistics: Statistics | None,
        rounding_error: float | None = None,
        last_sample: Statistics | None = None,
    ) -> None:
        if name not in self.formats:
            return
        part, form = PART[name], self.formats[name]
        linear = self.restored[part][name]
        kernel = linear["kernel"]
        stored = self._quantize(name, kernel, statistics, rounding_error, last_sample)
        self.stored[part][name] = with_weight(linear, {"quantized": stored})
        self.restored[part][name] = with_weight(linear, {"kernel": _unstore(stored, shape=kernel.shape, format=form)})

    def _quantize(
        self,
        name: str,
        kernel: jax.Array,
        statistics: Statistics | None,
        rounding_error: float | None = None,
        last_sample: Statistics | None = None,
    ) -> Stored:
        form = self.formats[name]
        problem = Problem(f"layer {self.index}, linear {name!r}", kernel, form, statistics, rounding_error)
        rounded, self.reports[name] = quantize_matrix(problem, self.config, last_sample)
        return _lay_out(rounded, format=form)
