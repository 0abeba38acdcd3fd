"""Golden checkpoints, packed ones from an independent packer, and small tools to look into and to break checkpoints."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from qtale_jax import command, convert
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.huggingface import from_huggingface
from qtale_jax.models.huggingface.config import architecture_from
from qtale_jax.models.specification import ModelSpecification


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tiny checkpoints as transformers writes them, and what it computes with them (see golden/generate.py)."""
    return Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def converted(golden, tmp_path_factory) -> Path:
    """Model directories of the golden checkpoints."""
    root = tmp_path_factory.mktemp("converted")
    for expected in golden.glob("*/expected.npz"):
        name = expected.parent.name
        from_huggingface(golden / name, root / name)
    return root


@pytest.fixture
def checkpoint(golden, tmp_path) -> Path:
    """A copy of a golden checkpoint, to be broken."""
    return Path(shutil.copytree(golden / "llama2", tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def raw() -> Callable[[Path], dict]:
    """Every tensor of a checkpoint as (type, shape, bytes), independent of the library's own reader."""

    def read(directory: Path) -> dict:
        found = {}
        for file in sorted(directory.glob("model*.safetensors")):
            for name, tensor in safetensors.deserialize(file.read_bytes()):
                found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        return found

    return read


@pytest.fixture(scope="session")
def edit_config() -> Callable[..., None]:
    """Changes keys of a directory's config.json; a key set to ... is removed."""

    def edit(directory: Path, **changes) -> None:
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return edit


@pytest.fixture(scope="session")
def base_spec(golden) -> Callable[..., ModelSpecification]:
    """A specification with the architecture of a golden model; keywords are its other fields."""
    architecture = architecture_from(json.loads((golden / "llama3_1" / "config.json").read_text()), "config.json")
    return lambda **fields: ModelSpecification(architecture=architecture, **fields)


@pytest.fixture(scope="session")
def filled() -> Callable[[ModelSpecification], dict]:
    """Random parameters of any specification, quantized ones included."""

    def fill(spec: ModelSpecification) -> dict:
        generator = np.random.default_rng(0)

        def random(leaf):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.asarray((0.3 * generator.normal(size=leaf.shape)).astype(leaf.dtype))
            low, high = int(jnp.iinfo(leaf.dtype).min), int(jnp.iinfo(leaf.dtype).max)
            return jnp.asarray(generator.integers(low, high, leaf.shape, np.int64, endpoint=True).astype(leaf.dtype))

        return jax.tree.map(random, abstract_parameters(spec))

    return fill


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[..., str]:
    """Runs `convert` with arguments that it must refuse: exit code 2, one line, nothing written. Returns the line."""

    def run(*arguments: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            command.run(lambda: convert.main(list(map(str, arguments))))
        printed = capsys.readouterr()
        assert (caught.value.code, printed.out) == (2, "")
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return printed.err

    return run


SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
}

AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output c of eight is nibble AWQ_COLUMNS[c] of a word."""


def word(nibbles: Sequence[int]) -> int:
    """Eight nibbles, the first lowest, as the number that an int32 with these bits is."""
    bits = "".join(f"{nibble:04b}" for nibble in reversed(nibbles))
    return int(bits, 2) - 2**32 * int(bits[0])


def packed_rows(rows: Sequence[Sequence[int]], places: Sequence[int] = range(8)) -> np.ndarray:
    """Packs along the last axis; number c of eight goes to nibble places[c]."""
    found = []
    for row in rows:
        blocks = [row[start : start + 8] for start in range(0, len(row), 8)]
        found.append([word([block[places.index(k)] for k in range(8)]) for block in blocks])
    return np.array(found, np.int32)


@dataclass
class PackedCheckpoint:
    """A checkpoint in a 4-bit layout, and what it means.

    Attributes:
        directory: its files.
        dense: the same model with its weights restored, as an ordinary checkpoint of float32 tensors.
        integers: module -> (q, z, g_idx), q (inputs, outputs) and z (groups, outputs) in [0, 15].
        scales: module -> float16 (groups, outputs).
    """

    directory: Path
    dense: Path
    integers: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)
    scales: dict[str, np.ndarray] = field(default_factory=dict)


@pytest.fixture(scope="session")
def make_packed(tmp_path_factory) -> Callable[..., PackedCheckpoint]:
    """Writes a random checkpoint as AutoAWQ ("awq") or GPTQ ("gptq", "gptq_v2") would, bit by bit.

    `shuffled` scatters the groups of GPTQ, `symmetric` puts all zero points in the middle, modules whose name contains
    one of `kept` stay in floating point, `biases` adds biases of zeros.
    """

    def make(
        layout: str,
        group_size: int,
        kv_heads: int = 4,
        tied: bool = False,
        shuffled: bool = False,
        symmetric: bool = False,
        kept: tuple[str, ...] = (),
        biases: bool = False,
    ) -> PackedCheckpoint:
        generator = np.random.default_rng(7)
        root = tmp_path_factory.mktemp("packed")
        made = PackedCheckpoint(root / "packed", root / "dense")
        hidden, mlp, keys = SIZES["hidden_size"], SIZES["intermediate_size"], kv_heads * SIZES["head_dim"]
        modules = {"q": (hidden, hidden), "k": (hidden, keys), "v": (hidden, keys), "o": (hidden, hidden)}
        modules = {f"self_attn.{name}_proj": shape for name, shape in modules.items()}
        modules |= {"mlp.gate_proj": (hidden, mlp), "mlp.up_proj": (hidden, mlp), "mlp.down_proj": (mlp, hidden)}
        floats = {"model.embed_tokens.weight": 0.1 * generator.normal(size=(40, hidden))}
        packed, dense = {}, {}
        for layer in range(SIZES["num_hidden_layers"]):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                floats[f"model.layers.{layer}.{norm}.weight"] = 1 + 0.1 * generator.normal(size=hidden)
            for name, (inputs, outputs) in modules.items():
                module = f"model.layers.{layer}.{name}"
                if any(part in module for part in kept):
                    floats[f"{module}.weight"] = 0.1 * generator.normal(size=(outputs, inputs))
                    continue
                size = inputs if group_size == -1 else group_size
                q = generator.integers(0, 16, (inputs, outputs))
                z = generator.integers(0, 16, (inputs // size, outputs))
                z = np.full_like(z, 8) if symmetric else z
                s = generator.uniform(0.005, 0.03, z.shape).astype(np.float16)
                g_idx = np.arange(inputs) // size
                g_idx = generator.permutation(g_idx) if shuffled else g_idx
                weight = [(q[i] - z[g_idx[i]]) * s[g_idx[i]].astype(float) for i in range(inputs)]
                dense[f"{module}.weight"] = np.array(weight, np.float32).T
                made.integers[module], made.scales[module] = (q, z, g_idx), s
                packed[f"{module}.scales"] = s
                if layout == "awq":
                    packed[f"{module}.qweight"] = packed_rows(q.tolist(), AWQ_COLUMNS)
                    packed[f"{module}.qzeros"] = packed_rows(z.tolist(), AWQ_COLUMNS)
                else:
                    packed[f"{module}.qweight"] = packed_rows(q.T.tolist()).T
                    packed[f"{module}.qzeros"] = packed_rows(((z - (layout == "gptq")) % 16).tolist())
                    packed[f"{module}.g_idx"] = g_idx.astype(np.int32)
                if biases:
                    packed[f"{module}.bias"] = np.zeros(outputs, np.float16)
        floats["model.norm.weight"] = 1 + 0.1 * generator.normal(size=hidden)
        if not tied:
            floats["lm_head.weight"] = 0.2 * generator.normal(size=(40, hidden))
        floats = {name: array.astype(np.float16) for name, array in floats.items()}
        config = {"model_type": "llama", **SIZES, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
        settings: dict = {"quant_method": layout.split("_")[0], "bits": 4, "group_size": group_size}
        if layout == "awq":
            settings |= {"version": "gemm", "zero_point": True, "modules_to_not_convert": list(kept) or None}
        else:
            settings |= {"checkpoint_format": layout, "desc_act": shuffled, "sym": symmetric}
        contents = [(made.dense, config | {"dtype": "float32"}, floats | dense)]
        contents += [(made.directory, config | {"dtype": "float16", "quantization_config": settings}, floats | packed)]
        for directory, document, tensors in contents:
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(document))
            whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
            safetensors.numpy.save_file(whole, directory / "model.safetensors")
        return made

    return make


@pytest.fixture(scope="session")
def pack_rows() -> Callable[..., np.ndarray]:
    """Packs rows of numbers in [0, 15], in their own order or in AutoAWQ's."""
    return lambda rows, awq=False: packed_rows(rows, AWQ_COLUMNS if awq else range(8))


@pytest.fixture(scope="session")
def packed_copies(make_packed) -> Callable[[str, Path], Path]:
    """Copies a packed checkpoint of a layout, groups of 32, to be broken."""
    made = {layout: make_packed(layout, 32) for layout in ("awq", "gptq")}
    return lambda layout, target: Path(shutil.copytree(made[layout].directory, target))
