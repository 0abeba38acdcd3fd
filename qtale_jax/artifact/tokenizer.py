"""Tokenizer files beside a model, in Hugging Face's format; nothing is ever looked up on a network."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qtale_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer.model")
"""A directory with one of these has a tokenizer."""


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer in a model directory or a Hugging Face directory; None if there is none.

    Raises:
        InputError: the files are there but cannot be read.
    """
    if not any((Path(path) / name).is_file() for name in FILES):
        return None
    from transformers import AutoTokenizer  # takes seconds to import: only where a tokenizer is needed

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds for damaged files
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: the tokenizer files cannot be read: {first[:300]}") from error


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", directory: str | Path) -> None:
    """Writes the tokenizer's files into an existing directory."""
    tokenizer.save_pretrained(str(directory))
    file = Path(directory) / "tokenizer_config.json"
    if file.is_file():
        # transformers 5 records how the tokenizer was opened; that says nothing about the tokenizer.
        settings = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", vocab_size: int, where: str) -> None:
    """Refuses a tokenizer that knows more tokens than the embedding has rows.

    Raises:
        InputError: with both numbers.
    """
    if len(tokenizer) > vocab_size:
        found = f"the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is {vocab_size}"
        raise InputError(f"{where}: {found}")
