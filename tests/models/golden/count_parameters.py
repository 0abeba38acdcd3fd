"""Counts the parameters of the published models in published_sizes.yaml, as transformers builds them, without memory.

    pip install torch==2.13.0 transformers==5.23.0 pyyaml
    python tests/models/golden/count_parameters.py [NAME ...]

Of a model that takes images too, those of its text model. Exits with 1 if a number is not the recorded one.
"""

import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

PUBLISHED = Path(__file__).parents[1] / "huggingface" / "published_sizes.yaml"


def count(config: dict) -> int:
    """Parameters of the model that a config.json describes; a tied head is counted once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    parts = [model.model.language_model, model.lm_head] if "text_config" in config else [model]
    model.tie_weights()
    return sum(parameter.numel() for parameter in torch.nn.ModuleList(parts).parameters())


def main() -> None:
    published = yaml.safe_load(PUBLISHED.read_text())
    wrong = 0
    for name in sys.argv[1:] or published:
        recorded, found = published[name]["parameters"], count(published[name]["config"])
        wrong += found != recorded
        print(f"{name}: {found}" + ("" if found == recorded else f", recorded {recorded}"), flush=True)
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
