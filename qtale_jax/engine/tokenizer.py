"""The tokenizer as an engine uses it: from several threads, and with errors that say what is wrong with a prompt."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from qtale_jax.data.tokens import decode, encode
from qtale_jax.errors import InputError

Message = Mapping[str, Any]
"""A turn of a conversation: role and content."""


class SharedTokenizer:
    """A tokenizer that several threads use."""

    def __init__(self, tokenizer: Any, ends: Sequence[int] = ()):
        """Shares a tokenizer; `ends` are tokens that end a continuation and have no text."""
        self._tokenizer, self._lock, self._ends = tokenizer, threading.Lock(), ends

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as `Model.generate` runs them.

        Raises:
            InputError: words outside a closed vocabulary, or no token at all.
        """
        with self._lock:
            ids = encode(self._tokenizer, [text])[0]
        if not ids:
            raise InputError("an empty prompt needs a tokenizer with a beginning-of-sequence token")
        return ids

    def encode_chat(self, messages: Sequence[Message], template: str | None = None) -> list[int]:
        """Ids of a conversation, up to where the answer begins; special tokens are those of the template.

        Args:
            messages: the turns.
            template: Jinja; default: the tokenizer's.

        Raises:
            InputError: there is no template, or it refuses the conversation.
        """
        if template is None and not getattr(self._tokenizer, "chat_template", None):
            raise InputError("the model's tokenizer has no chat template; allowed: plain completions, or a template")
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
                )
                ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # templates raise what they like; tokenizers a bare Exception
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"the chat template or the tokenizer refuses the conversation: {first}") from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and those that end a continuation."""
        with self._lock:
            return decode(self._tokenizer, ids, self._ends)
