"""QTALE-JAX: token-adaptive layer execution that survives quantization."""

__version__ = "0.1.0"
