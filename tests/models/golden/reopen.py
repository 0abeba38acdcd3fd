"""Opens the golden checkpoints, converted and exported again, in transformers; compares logits with the recorded ones.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/models/golden/reopen.py [NAME ...]

Prints the largest differences of the export in transformers, and of the model here; exits with 1 above 1e-4.
"""

import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from qtale_jax.artifact import load_model
from qtale_jax.models.forward import forward
from qtale_jax.models.huggingface import from_huggingface, to_huggingface

HERE = Path(__file__).parent


@torch.no_grad()
def differences(name: str, folder: Path) -> tuple[str, float, float]:
    """The class that opens the export, its largest difference of logits, and that of the model here."""
    with np.load(HERE / name / "expected.npz") as data:
        tokens, logits = data["tokens"], data["logits"]
    from_huggingface(HERE / name, folder / "model")
    to_huggingface(folder / "model", folder / "exported")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder / "exported", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{name}: {info}")
    reopened = theirs.eval()(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()
    model = load_model(folder / "model")
    ours = np.asarray(forward(model.spec, model.params, jnp.asarray(tokens)).logits)
    return type(theirs).__name__, float(np.abs(reopened - logits).max()), float(np.abs(ours - logits).max())


def main() -> None:
    torch.set_num_threads(1)
    worst = 0.0
    for name in sys.argv[1:] or sorted(path.parent.name for path in HERE.glob("*/expected.npz")):
        with tempfile.TemporaryDirectory() as folder:
            opened, reopened, ours = differences(name, Path(folder))
        worst = max(worst, reopened, ours)
        print(f"{name}: {opened}, exported {reopened:.1e}, here {ours:.1e}")
    raise SystemExit(int(worst > 1e-4))


if __name__ == "__main__":
    main()
