"""Hugging Face checkpoints: reading them into model directories, and writing model directories back."""

from qtale_jax.models.huggingface.exporting import to_huggingface, would_write
from qtale_jax.models.huggingface.importing import Checkpoint, from_huggingface, load_huggingface, read_huggingface

__all__ = ["Checkpoint", "from_huggingface", "load_huggingface", "read_huggingface", "to_huggingface", "would_write"]
