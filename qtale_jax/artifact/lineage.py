"""What a model made by a stage says about where it comes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtale_jax.artifact.directory import fingerprint

INHERITED = ("seed", "quantizer", "huggingface")
"""Facts that stay true of what is made of a model: its seed, its quantizer, the checkpoint it was converted from."""


def lineage(stage: str, parent: str | Path, inherited: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Provenance of a model that `stage` made of the model directory `parent`, whose provenance is `inherited`.

    `facts` are the stage's own and replace inherited ones of the same name.

    Raises:
        InputError: `parent` is no longer a whole model directory.
    """
    kept = {name: inherited[name] for name in INHERITED if name in inherited}
    return {**kept, "stage": stage, "parent": {"path": str(parent), "fingerprint": fingerprint(parent)}, **facts}
