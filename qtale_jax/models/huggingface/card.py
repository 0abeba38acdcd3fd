"""README.md of an exported checkpoint: how to open it, what it is, where it comes from."""

from collections.abc import Mapping
from typing import Any

import yaml

from qtale_jax.models.describe import describe, theta_text
from qtale_jax.models.huggingface.multimodal import LeftOut
from qtale_jax.models.specification import ModelSpecification

TAGS = ("qtale-jax", "dynamic-depth")


def checkpoint_card(name: str, spec: ModelSpecification, provenance: Mapping[str, Any], packed: bool) -> str:
    """The card of a model directory that was written in Hugging Face layout.

    Args:
        name: of the folder, the heading.
        spec: of the model directory.
        provenance: of the model directory.
        packed: whether the integers of the linears were kept.
    """
    tags = [*TAGS, *([spec.routing.method] if spec.routing else []), *(["awq", "4-bit"] if packed else [])]
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name}\n"]
    opened = 'model = AutoModelForCausalLM.from_pretrained("FOLDER")  # transformers'
    if spec.routing is not None:
        opened += ": the dense model"
        parts.append(
            "A routed model: small routers decide for every token which layers it executes. transformers reads the "
            "folder as the dense model, in which every token executes every layer; `qtale_jax` reads the routers too.\n"
        )
        opened += '\nmodel = qtale_jax.load("FOLDER")  # with its routers'
    parts.append(f"```python\n{opened}\n```\n")
    parts += ["## What it is\n", _list(describe(spec))]
    if spec.quantization is not None and not packed:
        parts.append("The integers were restored: the weights here are the rounded ones, in floating point.\n")
    if spec.routing is not None and spec.routing.thresholds:
        rows = [f"| {bits} | {theta_text(values)} |" for bits, values in spec.routing.thresholds.items()]
        parts.append("## Threshold\n\nA token executes a routed layer if and only if p >= theta.\n")
        parts.append("\n".join(["| bits of the weights | theta |", "| ---: | --- |", *rows]) + "\n")
    parts += ["## Where it comes from\n", _list(origin(provenance))]
    return "\n".join(parts)


def origin(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Stage, parent, seed and original checkpoint of a model, as far as they are known."""
    parent, original = provenance.get("parent") or {}, provenance.get("huggingface") or {}
    found = {
        "stage": provenance.get("stage"),
        "made of": parent.get("path"),
        "fingerprint of that": parent.get("fingerprint"),
        "original checkpoint": original.get("name"),
        "left out of that": LeftOut(**original["left_out"]) if "left_out" in original else None,
        "seed": provenance.get("seed"),
        "steps": provenance.get("steps"),
    }
    return {name: str(value) for name, value in found.items() if value is not None} or {"stage": "not recorded"}


def _list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in facts.items()) + "\n"
