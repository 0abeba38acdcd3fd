"""The section of the server."""

from typing import Literal

from pydantic import Field

from qtale_jax.config.section import Positive, Section
from qtale_jax.models.specification import Kernels


class ServeConfig(Section):
    """An OpenAI-compatible server for one model directory (extra `serve`)."""

    model: str | None = Field(default=None, description="model directory to read; default: the newest of this run")
    name: str | None = Field(default=None, description="the model's name in requests; default: that of its directory")
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0: all of this machine")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: any that is free")
    rows: Positive = Field(default=16, description="requests that run at the same time")
    queue: int = Field(default=256, ge=0, description="requests that wait for a row; more are refused (429)")
    context: int | None = Field(
        default=None, ge=2, description="most tokens of a request, prompt and new ones; default: the model's context"
    )
    max_new_tokens: Positive | None = Field(
        default=None, description="most new tokens that a request may ask for; default: what the context leaves"
    )
    pool: float = Field(
        default=1.0, gt=0, le=1, description="KV memory, as a share of all rows keeping every token in every layer"
    )
    kv_cache: Literal["float", "int8"] = Field(
        default="float", description="cached keys and values: float, as activations; int8, rounded per token and head"
    )
    kernels: Kernels = Field(
        default="auto",
        description="products with stored weights and attention: xla; pallas, where it fits, on TPUs and GPUs; "
        "auto: pallas on a single GPU, xla elsewhere",
    )
    chunk: Positive = Field(default=8, description="tokens that rows add between the times that others join and leave")
    width: Positive = Field(default=128, description="tokens of prompts that run in between")
    timeout: float = Field(default=300.0, gt=0, description="seconds that a request may take, waiting included (504)")
    grace: float = Field(default=30.0, ge=0, description="seconds that accepted requests have after SIGTERM")
    max_body_bytes: Positive = Field(
        default=2**20, description="most bytes of a request; longer ones are refused (413)"
    )
    chat_template: str | None = Field(default=None, description="file with a Jinja template; default: the tokenizer's")
