"""The model card of an experiment: README.md with Hugging Face's front matter, made of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qtale_jax.config.schema import Config
from qtale_jax.reporting.aggregate import Estimate, Summary
from qtale_jax.reporting.cells import ABSENT, Cell, Table, assemble, to_markdown
from qtale_jax.reporting.figures import quality_figures
from qtale_jax.reporting.labels import byte_unit, format_labels, model_label, place_label
from qtale_jax.reporting.tables import quality_tables

if TYPE_CHECKING:
    from qtale_jax.artifact import ModelDocument

TAGS = ("qtale-jax", "dynamic-depth", "quantization")


def read_models(output: Path) -> dict[str, "ModelDocument"]:
    """What the model directories of a run are, by their path below `output`."""
    from qtale_jax.artifact import read_model_json  # imports JAX, which `--help` of the report does without

    files = sorted([*output.glob("*/model.json"), *output.glob("*/*/model.json")])
    names = [file.parent.relative_to(output) for file in files]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return {str(name): read_model_json(output / name) for name in shown}


def build_card(
    config: Config, summaries: Sequence[Summary], models: Mapping[str, "ModelDocument"], command: str
) -> str:
    """The card.

    Args:
        config: the experiment's configuration.
        summaries: what was measured.
        models: its model directories, by name.
        command: that made the report.
    """
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(config, summaries), sort_keys=False, allow_unicode=True)}---\n",
        f"# {config.experiment.title}\n",
        "Models whose layers are chosen token by token, at several bit widths. Everything here was measured; "
        "`report.html` beside this file has the figures, `results.json` the numbers.\n",
        "```python\nimport qtale_jax\n\nmodel = qtale_jax.load(FOLDER)  # one of the model directories below\n```\n",
        *map(to_markdown, quality_tables(summaries)),
        *(f"![{title}](figures/{name})\n" for name, title in quality_figures(summaries).items()),
    ]
    tables = (threshold_table(summaries), quantization_table(summaries), provenance_table(models))
    parts += [to_markdown(table) for table in tables if table.rows]
    parts.append(f"## How this was made\n\n```\n{command}\n```\n")
    return "\n".join(parts)


def _front_matter(config: Config, summaries: Sequence[Summary]) -> dict[str, Any]:
    routings = sorted({summary.routing for summary in summaries} - {"dense"})
    return {
        "library_name": "qtale-jax",
        "pipeline_tag": "text-generation",
        "tags": [*TAGS, *routings],
        "model-index": [_index(config, summary, label) for summary, label in _labelled(summaries)],
    }


def _labelled(summaries: Sequence[Summary]) -> list[tuple[Summary, str]]:
    names = format_labels(summaries)
    return [(s, f"{model_label(s.model)}, {names[s.format]}, {place_label(s)}") for s in summaries]


def _index(config: Config, summary: Summary, name: str) -> dict[str, Any]:
    """What was measured of one model, as the Hub reads it; shares are fractions."""
    metrics = [("accuracy", f"accuracy, {task}", found) for task, found in summary.accuracy.items()]
    metrics += [("nats_per_token", "nats per token", summary.nats_per_token)]
    metrics += [("executed_ratio", "executed share of tokens and layers", summary.executed_ratio)]
    data, split = config.data, config.evaluate.split
    dataset = {"type": data.kind, "name": Path(data.path).name if data.path else data.kind, "split": split}
    return {
        "name": name,
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": dataset,
                "metrics": [_metric(kind, label, found) for kind, label, found in metrics if found is not None],
            }
        ],
    }


def _metric(kind: str, name: str, found: Estimate) -> dict[str, Any]:
    return {"type": kind, "name": name, "value": round(found.mean, 5)}


def threshold_table(summaries: Sequence[Summary]) -> Table:
    """Theta of every routed model per format, and the executed ratio it gives."""
    names = format_labels(summaries)
    rows: dict[tuple[str, str], dict[Any, Summary]] = {}
    for summary in summaries:
        if summary.theta is not None:
            rows.setdefault((summary.model, place_label(summary)), {})[summary.format] = summary

    def cell(summary: Summary | None) -> Cell:
        if summary is None or summary.theta is None:
            return ABSENT
        return Cell(f"{summary.theta.mean:.3f}", f"@ {summary.executed_ratio.mean:.2f}")

    return assemble(
        "Threshold @ executed ratio",
        ("method", "θ set for", *names.values()),
        [[(Cell(model_label(m)), Cell(place), *(cell(row.get(f)) for f in names)) for (m, place), row in rows.items()]],
        2,
        "θ, mean over layers and seeds, at the share of layers that was run. A token executes a layer if p ≥ θ.",
    )


def quantization_table(summaries: Sequence[Summary]) -> Table:
    """Quantizer, group and bytes of every format."""
    names = format_labels(summaries)
    size, unit = byte_unit(max(summary.weight_bytes for summary in summaries))
    rows = []
    for each, name in names.items():
        held = sorted(summary.weight_bytes / size for summary in summaries if summary.format == each)
        grouped = each.group_size is not None and each.group_size > 0
        group = f"{each.group_size} inputs" if grouped else "output channel"
        none = each.quantizer == "none"
        spread = f"{held[0]:.3f}" if f"{held[0]:.3f}" == f"{held[-1]:.3f}" else f"{held[0]:.3f} to {held[-1]:.3f}"
        rows.append(
            (Cell(name), ABSENT if none else Cell(each.quantizer), ABSENT if none else Cell(group), Cell(spread))
        )
    headers = ("format", "quantizer", "one scale per", f"weights, {unit}")
    note = "Bytes of all arrays held, scales and routers included; the range is over the models."
    return assemble("Quantization", headers, [rows], 3, note)


def provenance_table(models: Mapping[str, "ModelDocument"]) -> Table:
    """The model directories: what made them, of what, and how they are stored."""
    from qtale_jax.models.describe import theta_text, weights_text

    rows = []
    for name, document in models.items():
        found, spec = document.provenance, document.spec
        parent = (found.get("parent") or {}).get("path")
        original = (found.get("huggingface") or {}).get("name")
        source = " of ".join(filter(None, (Path(parent).name if parent else None, original))) or "nothing"
        rows.append(
            (
                Cell(name),
                Cell(str(found.get("stage", "–"))),
                Cell(source),
                Cell(weights_text(spec)),
                Cell(theta_text(spec.thresholds)) if spec.routing else ABSENT,
                Cell(str(found.get("seed", "–"))),
            )
        )
    headers = ("model directory", "stage", "made of", "weights", "θ", "seed")
    note = "`model.json` in each directory has the whole record: configuration, versions, calibration data, checksums."
    return assemble("Provenance", headers, [rows], 4, note)
