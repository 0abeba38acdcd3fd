"""Which model is planned for: its specification, from a name, a config.json, a model directory or the configuration."""

from pathlib import Path

from qtale_jax.artifact import read_model_json
from qtale_jax.config.schema import Config
from qtale_jax.data.tokens import load_tokenizer
from qtale_jax.errors import InputError, nearest
from qtale_jax.models.huggingface.config import architecture_from as huggingface_architecture
from qtale_jax.models.huggingface.config import read_json
from qtale_jax.models.sizes import SIZES
from qtale_jax.models.specification import Architecture, ModelSpecification
from qtale_jax.parallel.axes import RULES
from qtale_jax.training.start import architecture_from, check_quantized


def planned_model(config: Config) -> tuple[str, ModelSpecification]:
    """The model that training would start from, and what to call it; no weights are read.

    Raises:
        InputError: neither a known name nor a model.
    """
    if config.plan.model is None and config.model.path is None:
        tokenizer = load_tokenizer(config.model.tokenizer)
        architecture = architecture_from(config.model.architecture, len(tokenizer))
        return "model.architecture", ModelSpecification(architecture=architecture, dtype=config.model.dtype)
    name = config.plan.model or config.model.path
    assert name is not None, "one of them is given"
    if config.plan.model in SIZES:
        return name, ModelSpecification(architecture=SIZES[name], dtype=config.model.dtype)
    path = Path(name)
    if (path / "model.json").is_file():
        spec = read_model_json(path).spec.model_copy(update={"lora": None})
        check_quantized(config, spec)
        return name, spec
    file = path if path.name == "config.json" else path / "config.json"
    if not file.is_file():
        key = "model.path" if config.plan.model is None else "plan.model"
        raise InputError(
            f"{key}={name}: found neither model.json nor config.json there; allowed: a folder with one of them, or "
            f"plan.model={', '.join(SIZES)}{nearest(name, SIZES)}"
        )
    architecture = huggingface_architecture(read_json(file), str(file))
    return name, ModelSpecification(architecture=architecture, dtype=config.model.dtype)


def check_divides(spec: ModelSpecification, sizes: dict[str, int], length: int) -> None:
    """Refuses a mesh whose axes do not divide what they shard, where training would.

    Args:
        spec: the model.
        sizes: of the mesh axes, by name.
        length: tokens of a row.

    Raises:
        InputError: names the axis and what it does not divide.
    """
    shape = spec.architecture
    sharded = {
        "activation_heads": (("query heads", shape.num_heads), ("key and value heads", shape.num_kv_heads)),
        "mlp": (("inputs of down", shape.intermediate_size),),
        "activation_vocab": (("tokens of the vocabulary", shape.vocab_size),),
        "length": (("tokens of data.length", length),),
    }
    for logical, counts in sharded.items():
        entry = RULES[logical]
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        for axis in axes:
            for what, count in counts:
                if count % sizes[axis]:
                    raise InputError(f"mesh.{axis}={sizes[axis]} does not divide the {count:,} {what} of the model")


def local_architecture(architecture: Architecture, tensor: int) -> Architecture:
    """What one device of a tensor-parallel group computes, as an architecture of its own."""
    return architecture.model_copy(
        update={
            "num_heads": architecture.num_heads // tensor,
            "num_kv_heads": architecture.num_kv_heads // tensor,
            "intermediate_size": architecture.intermediate_size // tensor,
            "vocab_size": architecture.vocab_size // tensor,
        }
    )
