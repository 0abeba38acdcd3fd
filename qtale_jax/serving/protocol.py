"""Requests as clients write them: the fields of OpenAI's API that mean something here, `theta` and `ignore_eos`."""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qtale_jax.engine.engine import Engine
from qtale_jax.engine.options import RequestOptions
from qtale_jax.serving.errors import APIError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
}
"""Fields of the API that are not there, and the values with which they would do nothing: those are accepted."""

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Number = Annotated[float, Field(ge=0, le=1)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
MOST_PROMPTS = 64
"""Prompts of one request."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Part):
    """What a stream has beside text.

    `include_obfuscation` allows padding, which is never sent here: it changes nothing.
    """

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Body(_Part):
    """What both kinds of requests have.

    `theta` is ours: the routers' threshold, one for all layers or one per routed layer; default: the model's own.
    `ignore_eos`, which other servers have, too: end tokens do not end the text.
    """

    default_new_tokens: ClassVar[int | None] = None
    continues: ClassVar[bool] = True

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    theta: Number | list[Number] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in NEUTRAL.items():
            # 0 == False in Python, and not in JSON.
            if name in values and not any(
                values[name] == value and isinstance(values[name], bool) == isinstance(value, bool) for value in neutral
            ):
                allowed = " or ".join("null" if value is None else repr(value) for value in neutral)
                raise ValueError(f"{name} is not supported; allowed: {allowed}")
        return {name: value for name, value in values.items() if name not in NEUTRAL}

    def options(self, prompt_tokens: int, context: int, most: int | None) -> RequestOptions:
        """How a prompt is to be continued.

        Args:
            prompt_tokens: of the prompt.
            context: most tokens of a request.
            most: most new tokens that may be asked for; None: what the context leaves.

        Raises:
            APIError: more new tokens than that are asked for.
        """
        left = max(context - prompt_tokens, 1)
        key, asked = self._asked()
        if asked is None:
            asked = min(limit for limit in (left, self.default_new_tokens, most) if limit is not None)
        elif most is not None and asked > most:
            raise APIError(400, f"{key}={asked}; allowed: up to {most}", param=key)
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return RequestOptions(
            max_new_tokens=asked,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(32) if self.seed is None else self.seed % 2**32,
            theta=self.theta,
            stop=stop,
            ignore_eos=bool(self.ignore_eos),
            continues=self.continues,
        )

    def _asked(self) -> tuple[str, int | None]:
        """The key that says how many new tokens are asked for, and what it says."""
        return "max_tokens", self.max_tokens

    def prompts(self, engine: Engine, template: str | None) -> Sequence[list[int]]:
        """Token ids of each prompt.

        Raises:
            InputError: the tokenizer, or the template, refuses one.
        """
        raise NotImplementedError


class CompletionBody(Body):
    """A request for `/v1/completions`."""

    default_new_tokens: ClassVar[int | None] = 16

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )

    def prompts(self, engine: Engine, template: str | None) -> Sequence[list[int]]:
        """Token ids of each prompt; see `Body`."""
        if isinstance(self.prompt, str):
            return [engine.encode(self.prompt)]
        if token_ids := [token for token in self.prompt if isinstance(token, int)]:
            return [token_ids]
        return [engine.encode(one) if isinstance(one, str) else one for one in self.prompt if not isinstance(one, int)]


class TextPart(_Part):
    """A part of a message."""

    type: Annotated[str, Field(pattern="^text$")]
    text: str


class ChatMessage(BaseModel):
    """A turn; what else it says is the template's business."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    role: str
    content: str | list[TextPart] | None = None


class ChatBody(Body):
    """A request for `/v1/chat/completions`."""

    continues: ClassVar[bool] = False

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)

    def _asked(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return super()._asked()
        return "max_completion_tokens", self.max_completion_tokens

    def prompts(self, engine: Engine, template: str | None) -> Sequence[list[int]]:
        """Token ids of the conversation; see `Body`."""
        turns = []
        for message in self.messages:
            content = message.content
            text = content if isinstance(content, str) else "".join(part.text for part in content or [])
            turns.append({**message.model_dump(exclude={"content"}), "content": text})
        return [engine.encode_chat(turns, template)]
