"""The model directory: the one artifact that every stage reads and writes.

    model.json            format, versions, specification, provenance, size and checksum of every array file
    arrays/part-00000/... parameters as Orbax checkpoints of half a gigabyte each, one entry per layer
    tokenizer.json ...    tokenizer files of Hugging Face's format

A directory is written under a temporary name and renamed when whole, so a reader never sees half of one.
"""

from qtale_jax.artifact.arrays import Deferred, saving_context
from qtale_jax.artifact.atomic import new_directory, refuse_existing
from qtale_jax.artifact.directory import LoadedModel, StoredModel, fingerprint, load_model, save_model
from qtale_jax.artifact.document import FORMAT, ModelDocument, read_model_json, versions
from qtale_jax.artifact.growing import GrowingModel
from qtale_jax.artifact.lineage import lineage
from qtale_jax.artifact.sizes import weight_bytes
from qtale_jax.artifact.tokenizer import load_tokenizer, save_tokenizer

__all__ = [
    "FORMAT",
    "Deferred",
    "GrowingModel",
    "LoadedModel",
    "ModelDocument",
    "StoredModel",
    "fingerprint",
    "lineage",
    "load_model",
    "load_tokenizer",
    "new_directory",
    "read_model_json",
    "refuse_existing",
    "save_model",
    "save_tokenizer",
    "saving_context",
    "versions",
    "weight_bytes",
]
