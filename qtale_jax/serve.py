"""`python -m qtale_jax.serve CONFIG [key=value ...]`: answers requests over HTTP, in the form of the OpenAI API."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config
from qtale_jax.config.serving import ServeConfig
from qtale_jax.errors import InputError

if TYPE_CHECKING:
    from qtale_jax.engine.options import EngineOptions

NEEDED = ("prometheus_client", "starlette", "uvicorn")
"""Packages of the extra `serve`."""


def dry_run(config: Config) -> None:
    """Prints the model, the address and the sizes, and the memory that the KV cache would take."""
    import jax.numpy as jnp

    from qtale_jax import paths
    from qtale_jax.inference.pages import page_bytes
    from qtale_jax.model import read_headers
    from qtale_jax.models.describe import describe
    from qtale_jax.reporting.dry_run import bytes_text, print_dry_run

    _check_packages()
    from qtale_jax.serving.server import address, bound_socket

    settings = config.serve
    source = Path(settings.model or paths.newest(config))
    spec, tokenizer = read_headers(source)
    shape = _engine_options(settings).shape(spec)
    dtype = jnp.dtype("int8" if settings.kv_cache == "int8" else config.train.compute_dtype)
    size = bytes_text(shape.pages * page_bytes(spec.architecture, dtype, shape.page))
    template = chat_template(settings, tokenizer)
    chat = template is not None or bool(getattr(tokenizer, "chat_template", None))
    with bound_socket(settings.host, settings.port) as listener:
        where = address(listener) if settings.port else f"http://{settings.host}, any free port"
    facts = {
        "model": str(source),
        **describe(spec),
        "name": settings.name or source.name,
        "address": where,
        "requests": f"{shape.rows} at a time, {settings.queue} wait, of up to {shape.context} tokens",
        "KV cache": f"{size} in {shape.pages:,} pages of {shape.page} tokens of a layer",
        "chat": "yes" if chat else "no: the tokenizer has no template, and serve.chat_template is not given",
    }
    print_dry_run("serve", facts, [])


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    config = parse("serve", STAGES["serve"], argv, dry_run)
    _check_packages()
    from qtale_jax import paths
    from qtale_jax.engine.engine import Engine
    from qtale_jax.model import load
    from qtale_jax.serving.server import bound_socket, serve
    from qtale_jax.serving.service import Service

    settings = config.serve
    source = Path(settings.model or paths.newest(config))
    with bound_socket(settings.host, settings.port) as listener:
        model = load(source, compute_dtype=config.train.compute_dtype).with_kernels(settings.kernels)
        engine = Engine(model, _engine_options(settings))
        template = chat_template(settings, model.tokenizer)
        engine.warm_up()
        service = Service(engine, settings.name or source.name, settings, template)
        return serve(service, listener, settings.grace)


def chat_template(settings: ServeConfig, tokenizer) -> str | None:
    """The template that `serve.chat_template` names; None: the tokenizer's own, if any.

    Raises:
        InputError: the file cannot be read, or is no template for a conversation.
    """
    if settings.chat_template is None:
        return None
    try:
        text = Path(settings.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"serve.chat_template={settings.chat_template}: {reason.lower()}; allowed: a file") from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=text, tokenize=False)
    except Exception as error:  # Jinja and templates raise many kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"serve.chat_template={settings.chat_template}: {first}; allowed: a Jinja template") from error
    return text


def _engine_options(settings: ServeConfig) -> "EngineOptions":
    from qtale_jax.engine.options import EngineOptions

    return EngineOptions(
        rows=settings.rows,
        queue=settings.queue,
        context=settings.context,
        pool=settings.pool,
        chunk=settings.chunk,
        width=settings.width,
        kv_cache=settings.kv_cache,
    )


def _check_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'serve needs {", ".join(missing)}; install with: pip install "qtale-jax[serve]"')


if __name__ == "__main__":
    run(main)
