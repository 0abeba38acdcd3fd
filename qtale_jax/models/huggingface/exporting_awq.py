"""Writing 4-bit models in AutoAWQ's layout: what fits into it, and its tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from qtale_jax.errors import InputError
from qtale_jax.models.huggingface.config import Config
from qtale_jax.models.huggingface.files import NewTensor
from qtale_jax.models.huggingface.names import Tensor, tensors
from qtale_jax.models.huggingface.packing import NIBBLES, pack_awq
from qtale_jax.models.specification import ModelSpecification, TensorFormat
from qtale_jax.quantization.storage import Stored, recover

FLOAT16 = np.dtype(np.float16)


def check_fits(spec: ModelSpecification, where: str) -> TensorFormat:
    """Checks that AutoAWQ's layout can hold the linears of a model, and returns the format of one of them.

    Args:
        spec: the model.
        where: its name, for messages.

    Raises:
        InputError: linears that are not all 4-bit, of one group size, with inputs in their own order and activations
            that are not rounded; adapters that are not merged; outputs that do not fill words.
    """
    if spec.quantization is None:
        raise InputError(f"{where}: the model is not quantized; AWQ's layout is for 4-bit linears, quantize it first")
    if spec.lora is not None:
        raise InputError(f"{where}: its adapters cannot be merged into integers; merge them, then quantize")
    linears = [tensor for tensor in tensors(spec.architecture) if tensor.is_linear]
    formats = {tensor.key: spec.quantization.formats.get(tensor.key) for tensor in linears}
    for key, format in formats.items():
        if format is None or format.bits != 4:
            found = "in floating point" if format is None else f"stored in {format.bits} bits"
            raise InputError(f"{where}: linear {key!r} is {found}; AWQ's layout allows: 4 bits for all linears")
        if format.permuted:
            raise InputError(
                f"{where}: the inputs of linear {key!r} are permuted; AWQ's layout allows: their own order"
            )
        if format.activation_bits != 16:
            raise InputError(f"{where}: linear {key!r} rounds activations to 8 bits; AWQ's layout allows: 16")
    known = [format for format in formats.values() if format is not None]
    if len(sizes := sorted({format.group_size for format in known})) > 1:
        raise InputError(f"{where}: group sizes {sizes}; AWQ's layout allows: one for all linears")
    for tensor in linears:
        if (outputs := tensor.shape[0]) % NIBBLES:
            raise InputError(
                f"{where}: linear {tensor.key!r} has {outputs} outputs; AWQ's layout allows: multiples of {NIBBLES} "
                "(without --quantized the restored weights are written)"
            )
    return known[0]


def quantization_config(format: TensorFormat) -> Config:
    """What config.json says about AutoAWQ's layout."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": format.group_size,
        "zero_point": True,
        "modules_to_not_convert": None,
    }


def packed_tensors(tensor: Tensor, stored: Stored, format: TensorFormat, where: str) -> tuple[list[NewTensor], int]:
    """The three tensors that stand for a linear's weight, and how many of its scales float16 changes.

    Integers and zero points are kept; a symmetric matrix gets zero points of 8, the middle.

    Args:
        tensor: the weight.
        stored: its arrays here.
        format: what they mean.
        where: the model, for messages.

    Raises:
        InputError: a scale is too large for float16.
    """
    outputs, inputs = tensor.shape
    groups, module = format.groups(inputs), tensor.module
    scales, changed = to_float16(np.asarray(stored["scales"]), f"{where}: a scale of linear {tensor.key!r}")

    def integers(part: str) -> np.ndarray:
        rounded = recover(stored, (inputs, outputs), format)
        if part == "values":
            return pack_awq(np.asarray(rounded.values))
        zeros = np.zeros((groups, outputs), np.int8) if rounded.zero_points is None else np.asarray(rounded.zero_points)
        return pack_awq(zeros)

    def new(part: str, dtype: Any, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> NewTensor:
        return NewTensor(f"{module}.{part}", np.dtype(dtype), shape, read)

    words = outputs // NIBBLES
    return [
        new("qweight", np.int32, (inputs, words), partial(integers, "values")),
        new("qzeros", np.int32, (groups, words), partial(integers, "zero_points")),
        new("scales", FLOAT16, scales.shape, lambda: scales),
    ], changed


def to_float16(values: np.ndarray, what: str) -> tuple[np.ndarray, int]:
    """Floating-point values in float16, and how many of them changed.

    Raises:
        InputError: one is too large; `what` names it.
    """
    wide = values.astype(np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(FLOAT16)
    lost = np.isinf(narrow) & np.isfinite(wide)
    if lost.any():
        largest = float(np.abs(wide[lost]).max())
        raise InputError(f"{what} is {largest:g}; float16, which AWQ's layout stores, allows: up to 65504")
    return narrow, int(np.count_nonzero(narrow.astype(np.float32) != wide))
