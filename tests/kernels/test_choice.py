"""Where the kernels for GPUs are taken; the devices are invented."""

import types

import jax
import pytest

from qtale_jax.kernels import choice


def gpus(*capabilities: str):
    return [types.SimpleNamespace(compute_capability=capability) for capability in capabilities]


@pytest.mark.parametrize(
    ("kernels", "devices", "expected"),
    [
        ("auto", gpus("9.0"), True),
        ("auto", gpus("8.0"), True),
        ("auto", gpus("7.5"), False),
        ("auto", gpus("9.0", "9.0"), False),
        ("pallas", gpus("9.0", "9.0"), True),
        ("pallas", gpus("9.0", "7.0"), False),
        ("xla", gpus("9.0"), False),
        ("interpreted", gpus("9.0"), False),
    ],
)
def test_gpus(monkeypatch, kernels, devices, expected):
    choice._capabilities.cache_clear()
    monkeypatch.setattr(jax, "devices", lambda backend: devices)
    assert choice.runs_gpu_kernels(kernels) == expected
    monkeypatch.undo()
    choice._capabilities.cache_clear()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
@pytest.mark.parametrize("kernels", ["auto", "pallas"])
def test_without_one(kernels):
    assert not choice.runs_gpu_kernels(kernels)
