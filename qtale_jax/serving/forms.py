"""Answers as clients read them: the objects of completions and of chat, whole and in pieces."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qtale_jax.engine.requests import Completion

DONE = b"data: [DONE]\n\n"
"""The end of a stream."""


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(completions: Sequence[Completion]) -> dict[str, Any]:
    """Tokens as OpenAI counts them; beside them the executed share of all layers, and bytes of the KV cache at the end.

    The share is that of all prompts and new tokens together.
    """
    prompt, new = sum(one.prompt_tokens for one in completions), sum(len(one.tokens) for one in completions)
    executed, layers = sum(one.executed_layers for one in completions), sum(one.layers for one in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "executed_ratio": round(executed / layers, 6) if layers else 0.0,
        "kv_bytes": sum(one.kv_bytes for one in completions),
    }


@dataclass(frozen=True)
class Form:
    """One answer of either kind: its id, its time, the model that it names."""

    model: str
    chat: bool
    id: str
    created: int

    @classmethod
    def new(cls, model: str, chat: bool) -> "Form":
        """One for an answer that begins now."""
        return cls(model, chat, f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time()))

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for index, one in enumerate(completions):
            text: dict[str, Any] = {"text": one.text}
            if self.chat:
                text = {"message": {"role": "assistant", "content": one.text, "refusal": None}}
            choices.append({"index": index, **text, "logprobs": None, "finish_reason": one.finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._document(kind, choices) | {"usage": usage(completions)}

    def piece(self, index: int, text: str, finish_reason: str | None = None, first: bool = False) -> bytes:
        """An event with what is new in a choice; the first one of a chat names the role."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
            content = {"delta": delta}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        return event(self._document("chat.completion.chunk" if self.chat else "text_completion", [choice]))

    def usage(self, completions: Sequence[Completion]) -> bytes:
        """The event with the usage, which has no choices."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(self._document(kind, []) | {"usage": usage(completions)})
