"""The text model in checkpoints that take images too: its config.json and its tensors, without those of images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtale_jax.errors import InputError

if TYPE_CHECKING:
    from qtale_jax.models.huggingface.files import StoredTensor

TEXT_MODELS = {"gemma3": "gemma3_text"}
"""`model_type` of the checkpoint, and of the text model in it."""

PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
"""How names of the text model's tensors start there, and in a text checkpoint: as released, and as some save them."""

IMAGE_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)

SHARED = (
    "tie_word_embeddings",
    "quantization_config",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
)
"""Keys of the whole config.json that are about the text model, too; they win over its own."""


@dataclass(frozen=True)
class LeftOut:
    """Tensors of a checkpoint that are not part of its text model."""

    tensors: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.tensors:,} tensors for images ({self.bytes:,} bytes)"


def text_config(config: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The config.json that the text model would have alone.

    Args:
        config: the parsed file.
        where: its name, for messages.

    Returns:
        The text model's config, and what messages call it; both as they are for a checkpoint of text alone.

    Raises:
        InputError: `text_config` is missing, no object, or that of another model.
    """
    kind = TEXT_MODELS.get(str(config.get("model_type")))
    if kind is None:
        return config, where
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise InputError(f"{where}: text_config={text!r:.80} is not an object; a {config['model_type']!r} has one")
    if text.get("model_type", kind) != kind:
        raise InputError(
            f"{where}: text_config.model_type={text['model_type']!r} is not supported; supported: {kind!r}"
        )
    shared = {key: config[key] for key in SHARED if config.get(key) is not None}
    return {**text, "model_type": kind, **shared}, f"{where}: text_config"


def text_tensors(
    config: dict[str, Any], stored: "dict[str, StoredTensor]"
) -> "tuple[dict[str, StoredTensor], LeftOut | None]":
    """The tensors of the text model, under the names that they have in a text checkpoint.

    Args:
        config: the parsed config.json of the whole.
        stored: what is in the files.

    Returns:
        The tensors, and what was left out, if anything was. Names that neither belong to images nor start with one of
        `PREFIXES` stay.

    Raises:
        InputError: two tensors that would have one name.
    """
    if config.get("model_type") not in TEXT_MODELS:
        return stored, None
    images = [tensor for name, tensor in stored.items() if name.startswith(IMAGE_PREFIXES)]
    found: "dict[str, StoredTensor]" = {}
    for name, tensor in stored.items():
        if name.startswith(IMAGE_PREFIXES):
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        short = PREFIXES.get(prefix, "") + name.removeprefix(prefix)
        if short in found:
            raise InputError(f"{tensor.file}: {name} is there twice, under two prefixes")
        found[short] = tensor
    return found, LeftOut(len(images), sum(tensor.nbytes for tensor in images)) if images else None
