"""Reading the 4-bit matrices of AutoAWQ and GPTQ checkpoints: what is supported, where they are, one at a time."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np

from qtale_jax.artifact import Deferred
from qtale_jax.errors import InputError, nearest
from qtale_jax.models.huggingface.config import Config
from qtale_jax.models.huggingface.files import StoredTensor
from qtale_jax.models.huggingface.names import Tensor
from qtale_jax.models.huggingface.packing import (
    NIBBLES,
    group_order,
    unpack_awq,
    unpack_gptq_weights,
    unpack_gptq_zeros,
)
from qtale_jax.models.specification import QuantizationSpecification, ScaleType, TensorFormat
from qtale_jax.quantization.rounding import Rounded
from qtale_jax.quantization.storage import Stored, abstract, lay_out

Method = Literal["awq", "gptq"]

WHAT = (
    "the linears of blocks in 4 bits, as AutoAWQ (version gemm) or GPTQ (checkpoint_format gptq or gptq_v2) pack them"
)
"""What quantized checkpoints may hold."""


@dataclass(frozen=True)
class Packing:
    """How the linears of a checkpoint are stored, by its quantization_config.

    Attributes:
        method: the layout.
        group_size: inputs per scale; -1 is one group over all inputs.
        added_to_zeros: what a reader adds to stored zero points, modulo 16.
    """

    method: Method
    group_size: int
    added_to_zeros: int = 0


def packing_from(config: Config, where: str) -> Packing | None:
    """What config.json says about quantization; None: nothing.

    Args:
        config: the parsed file.
        where: its name, for messages.

    Raises:
        InputError: a method, bit width or variant other than those of `WHAT`.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    where = f"{where}: quantization_config"
    if not isinstance(settings, dict):
        raise InputError(f"{where}={settings!r:.80} is not an object")
    method = settings.get("quant_method")
    if method not in ("awq", "gptq"):
        hint = nearest(str(method), ("awq", "gptq"))
        raise InputError(f"{where}: quant_method={method!r} is not supported; supported: 'awq', 'gptq'{hint}")
    _refuse(settings, where, "bits", 4)
    value = settings.get("group_size")
    if isinstance(value, bool) or not isinstance(value, int) or (value != -1 and value <= 0):
        raise InputError(f"{where}: group_size={value!r}; allowed: -1 (one group) or a positive integer")
    _refuse(settings, where, "pack_dtype", "int32", absent="int32")
    if method == "awq":
        _variant(settings, where, ("version", "checkpoint_format", "format"), ("gemm",))
        _refuse(settings, where, "zero_point", True, absent=True)
        if settings.get("backend") == "llm-awq":
            raise InputError(f"{where}: backend='llm-awq' packs differently and is not supported; supported: 'autoawq'")
        return Packing("awq", value)
    _refuse(settings, where, "is_marlin_format", False, absent=False)
    variant = _variant(settings, where, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    # Version 1 stores zero points less 1, a habit of the first implementation.
    return Packing("gptq", value, 1 if variant == "gptq" else 0)


def _refuse(settings: Config, where: str, key: str, allowed: Any, absent: Any = None) -> None:
    """Refuses all values of a key but one; null counts as absent."""
    value = settings.get(key)
    if (absent if value is None else value) != allowed:
        raise InputError(f"{where}: {key}={value!r} is not supported; supported: {json.dumps(allowed)}")


def _variant(settings: Config, where: str, keys: tuple[str, ...], allowed: tuple[str, ...]) -> str:
    """The layout among those of a method, the first if none is named; packers name it under different keys."""
    found = allowed[0]
    said = {key: settings[key] for key in keys if settings.get(key) is not None}
    for key, value in said.items():
        found = str(value).lower()
        if found not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise InputError(f"{where}: {key}={value!r} is not supported; supported: {choices}")
    if len({str(value).lower() for value in said.values()}) > 1:
        raise InputError(f"{where}: the layouts contradict each other: {said}")
    return found


@dataclass(frozen=True)
class PackedLinear:
    """A linear whose weight is packed.

    Attributes:
        packing: how.
        tensor: its weight, if it were not.
        shapes: name -> shape of what is there instead.
    """

    packing: Packing
    tensor: Tensor
    shapes: dict[str, tuple[int, ...]]


def packed_linears(
    packing: Packing | None, stored: dict[str, StoredTensor], wanted: Sequence[Tensor], where: str
) -> list[PackedLinear]:
    """The linears that a checkpoint holds in packed form: those without a weight in floating point.

    Args:
        packing: how; None if config.json says nothing.
        stored: what is in the files; biases that the model has not and that are zero are taken out.
        wanted: the tensors of the model, if it were not quantized.
        where: name of config.json.

    Raises:
        InputError: packed matrices elsewhere, or none although config.json says so; sizes that cannot be packed or do
            not fall into groups; a bias that is not zero.
    """
    packed = [name for name in stored if name.endswith(".qweight")]
    if packing is None:
        if packed:
            raise InputError(
                f"{where}: quantization_config is missing, but {packed[0]} is there; old GPTQ checkpoints have it in "
                'quantize_config.json (copy it and add "quant_method": "gptq")'
            )
        return []
    linears = {tensor.module: tensor for tensor in wanted if tensor.is_linear}
    for name in packed:
        if name.removesuffix(".qweight") not in linears:
            raise InputError(f"{stored[name].file}: {name} is not supported; supported: {WHAT}")
    if not packed:
        raise InputError(f"{where}: quantization_config says {packing.method!r}, but no linear is quantized")
    names = {tensor.name for tensor in wanted}
    _drop_zero_biases(stored, [module for module in linears if f"{module}.bias" not in names])
    found = [tensor for tensor in linears.values() if tensor.name not in stored]
    return [PackedLinear(packing, tensor, _shapes(packing, tensor, where)) for tensor in found]


def _drop_zero_biases(stored: dict[str, StoredTensor], modules: Sequence[str]) -> None:
    """Some packers give every linear a bias; one that the model does not have is zero."""
    for module in modules:
        bias = stored.pop(f"{module}.bias", None)
        if bias is not None and bias.map().any():
            raise InputError(f"{bias.file}: {module}.bias is not zero; this linear has no bias here")


def _shapes(packing: Packing, tensor: Tensor, where: str) -> dict[str, tuple[int, ...]]:
    outputs, inputs = tensor.shape
    module, groups = tensor.module, 1
    if packing.group_size != -1:
        groups, left = divmod(inputs, packing.group_size)
        if left:
            raise InputError(
                f"{where}: quantization_config: group_size={packing.group_size} does not divide the {inputs} inputs of "
                f"{module}; allowed: -1 (one group) or a divisor"
            )
    sizes = {"outputs": outputs} if packing.method == "awq" else {"inputs": inputs, "outputs": outputs}
    for what, size in sizes.items():
        if size % NIBBLES:
            raise InputError(f"{where}: {module} has {size} {what}; packed in 4 bits, it needs a multiple of {NIBBLES}")
    words = (inputs, outputs // NIBBLES) if packing.method == "awq" else (inputs // NIBBLES, outputs)
    shapes: dict[str, tuple[int, ...]] = {
        "qweight": words,
        "qzeros": (groups, outputs // NIBBLES),
        "scales": (groups, outputs),
    }
    if packing.method == "gptq":
        shapes["g_idx"] = (inputs,)
    return {f"{module}.{part}": shape for part, shape in shapes.items()}


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A linear in packed form, not yet read; see `open_matrix`.

    Attributes:
        packing: how it is stored.
        format: what it is here.
        shape: (inputs, outputs).
        qweight: its integers.
        zero_points: signed zero points (groups, outputs), int8; None if symmetric.
        scales: (groups, outputs).
        order: the input of each row once inputs are sorted by group; None: they are.
    """

    packing: Packing
    format: TensorFormat
    shape: tuple[int, int]
    qweight: StoredTensor
    zero_points: np.ndarray | None
    scales: StoredTensor
    order: np.ndarray | None

    def leaves(self) -> dict[str, Deferred]:
        """The arrays of the model for this matrix, read when their turn comes."""
        return {
            name: Deferred(leaf.shape, np.dtype(leaf.dtype), partial(_leaf, self, name))
            for name, leaf in abstract(self.shape, self.format).items()
        }


def open_matrix(linear: PackedLinear, stored: dict[str, StoredTensor]) -> PackedMatrix:
    """Finds out what a packed matrix is from its small tensors: zero points that are all 8 make it symmetric.

    Args:
        linear: where it is.
        stored: what is in the files; tensors have the shapes that `linear` says.

    Raises:
        InputError: groups of different sizes.
    """
    packing, tensor, module = linear.packing, linear.tensor, linear.tensor.module
    qzeros, scales = stored[f"{module}.qzeros"].map(), stored[f"{module}.scales"]
    order = None
    if packing.method == "awq":
        zero_points = unpack_awq(qzeros)
    else:
        zero_points = unpack_gptq_zeros(qzeros, packing.added_to_zeros)
        groups = stored[f"{module}.g_idx"]
        try:
            order = group_order(np.asarray(groups.map()), scales.shape[0])
        except ValueError as error:
            raise InputError(f"{groups.file}: {module}.g_idx {error}") from error
    format = TensorFormat(
        bits=4,
        group_size=packing.group_size,
        symmetric=not zero_points.any(),
        scale_dtype=cast(ScaleType, scales.dtype.name),
        permuted=order is not None,
    )
    shape, qweight = (tensor.shape[1], tensor.shape[0]), stored[f"{module}.qweight"]
    return PackedMatrix(packing, format, shape, qweight, None if format.symmetric else zero_points, scales, order)


def specification_of(matrices: dict[str, PackedMatrix]) -> QuantizationSpecification | None:
    """What was done to a checkpoint with these matrices, by name ("0/query"); None if there are none."""
    if not matrices:
        return None
    method = next(iter(matrices.values())).packing.method
    return QuantizationSpecification(method=method, formats={key: m.format for key, m in matrices.items()})


@functools.lru_cache(maxsize=1)
def _laid_out(matrix: PackedMatrix) -> Stored:
    """Remembers one matrix, whose arrays are asked for one after the other."""
    words = matrix.qweight.map()
    values = unpack_awq(words) if matrix.packing.method == "awq" else unpack_gptq_weights(words)
    if matrix.order is not None:
        values = values[matrix.order]
    rounded = Rounded(*cast(Any, (values, np.array(matrix.scales.map()), matrix.zero_points)))
    return lay_out(rounded, matrix.format, order=cast(Any, matrix.order))


def _leaf(matrix: PackedMatrix, name: str) -> np.ndarray:
    return np.asarray(_laid_out(matrix)[name])
