"""What a model is, in words: the same lines in dry runs, in notebooks and on model cards."""

from collections.abc import Sequence

from qtale_jax.models.specification import ModelSpecification, TensorFormat

_METHODS = {"dllm": "D-LLM", "qtale": "QTALE", "mod": "Mixture-of-Depths", "random": "random routes"}


def describe(spec: ModelSpecification) -> dict[str, str]:
    """Architecture, routing, theta and weights of a model, each on one line."""
    found = {"architecture": architecture_text(spec), "routing": routing_text(spec)}
    if spec.routing is not None:
        found["theta"] = theta_text(spec.thresholds)
    return found | {"weights": weights_text(spec)}


def architecture_text(spec: ModelSpecification) -> str:
    """`llama, 10 layers of width 64, MLP 128, 4 heads, vocabulary 64, context 64`."""
    shape = spec.architecture
    kv = "" if shape.num_kv_heads == shape.num_heads else f" and {shape.num_kv_heads} for keys and values"
    text = (
        f"{shape.family}, {shape.num_layers} layers of width {shape.hidden_size}, MLP {shape.intermediate_size}, "
        f"{shape.num_heads} heads{kv}, vocabulary {shape.vocab_size:,}, context {shape.max_length:,}"
    )
    if shape.sliding_window is not None:
        local = sum(shape.is_local(layer) for layer in range(shape.num_layers))
        some = "" if local == shape.num_layers else f" in {local} layers"
        text += f", a window of {shape.sliding_window:,} tokens{some}"
    dropped = len(spec.dropped_layers)
    return f"{text}; {dropped} of {dropped + shape.num_layers} layers were taken out" if dropped else text


def routing_text(spec: ModelSpecification) -> str:
    """`QTALE, routers in layers 2 to 9, the first 2 tokens execute all`, or that there is none."""
    routing = spec.routing
    if routing is None:
        return "none: every token executes every layer"
    first, last = spec.routed_layers[0], spec.routed_layers[-1]
    where = f"layer {first}" if first == last else f"layers {first} to {last}"
    tokens = f", the first {routing.always_on_tokens} tokens execute all" if routing.always_on_tokens else ""
    return f"{_METHODS[routing.method]}, routers in {where}{tokens}"


def theta_text(thresholds: Sequence[float]) -> str:
    """`0.41`, or `0.3 to 0.5, one per layer`."""
    low, high = min(thresholds), max(thresholds)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, one per layer"


def weights_text(spec: ModelSpecification) -> str:
    """`float32`, or `3-bit rtn, symmetric, one scale per output channel; 8-bit head; the rest float32`."""
    if spec.quantization is None:
        return spec.dtype
    main = spec.quantization.main_format
    others = sum(format != main for format in spec.quantization.linears.values())
    parts = [f"{main.bits}-bit {spec.quantization.method}, {format_text(main)}"]
    parts += [f"{others} linears in other formats"] if others else []
    for name in ("embedding", "head"):
        if name in spec.quantization.formats:
            parts.append(f"{spec.quantization.formats[name].bits}-bit {name}")
    if any(name.endswith("/router") for name in spec.quantization.formats):
        parts.append("8-bit routers")
    return f"{'; '.join(parts)}; the rest {spec.dtype}"


def format_text(format: TensorFormat) -> str:
    """`asymmetric, groups of 128`, and what else is out of the ordinary."""
    parts = ["symmetric" if format.symmetric else "asymmetric"]
    parts.append("one scale per output channel" if format.group_size == -1 else f"groups of {format.group_size}")
    parts += ["8-bit activations"] if format.activation_bits == 8 else []
    return ", ".join(parts)
