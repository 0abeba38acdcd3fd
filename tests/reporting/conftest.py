"""A small experiment as the evaluation and training stages write it, with numbers that hang together."""

import json
import math
import random
from pathlib import Path

import pytest

from qtale_jax.reporting.results import Evaluation

LAYERS, ALWAYS_ON = 10, 2
TASKS = ("max", "min", "sort", "boolean", "reverse", "count", "parity")
FORMATS = (("none", 16, None), ("rtn", 4, -1), ("rtn", 3, -1), ("rtn", 2, -1))
POINTS = (("threshold .5", 0.5), ("ratio 0.50", 0.5), ("ratio 0.60", 0.6), ("ratio 0.70", 0.7))
SAMPLES = (
    ("max", "max 7 3 9 1 5 ="),
    ("sort", "sort d a c b e : a b c d"),
    ("boolean", "not ( true and false ) or"),
    ("reverse", "reverse k l m n o : o n m"),
)
LOSS = {("dense", 16): 0.2, ("dense", 4): 0.5, ("dense", 3): 2.4, ("dense", 2): 11.0}
LOSS |= {("dllm", 16): 1.3, ("dllm", 4): 2.6, ("dllm", 3): 7.4, ("dllm", 2): 27.0}
LOSS |= {("qtale", 16): 1.9, ("qtale", 4): 2.2, ("qtale", 3): 4.1, ("qtale", 2): 17.0}


def _histogram(draw: random.Random, spread: float) -> tuple[dict, float]:
    edges = [-12 + 0.5 * index for index in range(49)]
    counts, total = [0] * 48, 0.0
    for _ in range(4000):
        gap = max(-11.9, min(11.9, draw.choice((-1, 1)) * draw.gauss(spread, 0.35 * spread + 0.4)))
        counts[int((gap + 12) / 0.5)] += 1
        total += abs(gap)
    return {"edges": edges, "counts": counts}, total / 4000


def _maps(draw: random.Random, routing: str, share: float) -> list[dict]:
    maps = []
    for task, text in SAMPLES:
        tokens = text.split()
        probability = [
            [
                round(1 / (1 + math.exp(-draw.gauss(0, 5 if routing == "dllm" else 1.4))), 4)
                for _ in range(LAYERS - ALWAYS_ON)
            ]
            for _ in tokens
        ]
        order = sorted(p for row in probability for p in row)
        theta = order[int((1 - share) * len(order))]
        execute = [[True] * ALWAYS_ON + [index < 2 or p >= theta for p in row] for index, row in enumerate(probability)]
        maps.append(
            {
                "tokens": tokens,
                "execute": execute,
                "probability": probability,
                "always_on_layers": ALWAYS_ON,
                "task": task,
            }
        )
    return maps


def evaluation(model: str, fmt: tuple, point: tuple[str, float], seed: int, accuracy: bool = True) -> dict:
    """One evaluation file of the experiment."""
    quantizer, bits, group = fmt
    dense = model == "dense"
    draw = random.Random(f"{model}{bits}{point[0]}{seed}")
    ratio = 1.0 if dense else point[1] + draw.uniform(-0.012, 0.012)
    loss = LOSS[model, bits] * (1.0 if dense else 0.5 / ratio) + draw.gauss(0, 0.25)
    scores = {task: max(0.0, min(1.0, 1 - loss * (0.4 + 0.2 * index) / 100)) for index, task in enumerate(TASKS)}
    scores["mean"] = sum(scores.values()) / len(TASKS)
    linears = 327_680 * bits // 8 if quantizer == "rtn" else 327_680 * 4
    parts = {
        "embedding": 12_800,
        "linears": linears,
        "scales": 0 if quantizer == "none" else 36_352,
        "norms": 5_376,
        "head": 12_800,
    }
    parts["routers"] = 0 if dense else 290_880
    parts["total"] = sum(parts.values())
    histogram, gap = _histogram(draw, 5.8 if model == "dllm" else 2.0)
    shares = [1.0] * ALWAYS_ON + [
        max(0.02, min(0.98, ratio + 0.3 * math.sin(3 * index + 0.3 * seed + len(model))))
        for index in range(LAYERS - ALWAYS_ON)
    ]
    return {
        "row": {
            "model": model,
            "routing": model,
            "quantizer": quantizer,
            "bits": bits,
            "group_size": group,
            "theta": None if dense else round(0.5 + 0.6 * (0.5 - point[1]), 3),
            "executed_ratio": ratio,
            "accuracy": scores if accuracy else None,
            "standard_error": 0.0045,
            "nats_per_token": 0.01 + loss / 40 if accuracy else 1.4 + loss / 100,
            "weight_bytes": parts["total"],
            "flops_per_token": int(2 * 327_680 * ratio + 25_600 + (0 if dense else 145_000)),
            "seed": seed,
        },
        "point": point[0],
        "bytes": parts,
        "executed_per_layer": [1.0] * LAYERS if dense else shares,
        "executed_ratio_scored": 1.0 if dense else 0.9 * ratio,
        "gap_histogram": None if dense else histogram,
        "logit_gap_mean": None if dense else gap,
        "flip_rate": None if dense else (0.052 if model == "dllm" else 0.174) + draw.uniform(-0.004, 0.004),
        "maps": [] if dense else _maps(draw, model, ratio),
    }


def _variant(model: str, routing: str, fmt: tuple, point: tuple[str, float], seed: int, gain: float) -> Evaluation:
    """An evaluation of a model with a free name: `gain` points better than the routing that it resembles."""
    like = routing if routing in ("dense", "dllm") else "qtale"
    content = evaluation(like, fmt, point, seed)
    row = content["row"] | {"model": model, "routing": routing}
    draw = random.Random(f"{model}{point[0]}{seed}")
    row["accuracy"] = {
        task: max(0.0, min(1.0, share + (gain + draw.gauss(0, 0.3)) / 100)) for task, share in row["accuracy"].items()
    }
    row["nats_per_token"] += draw.uniform(0, 0.01)
    if routing == "dense":
        row["executed_ratio"] = point[1]
    else:
        row["executed_ratio"] += draw.uniform(-0.004, 0.004)
    return Evaluation.model_validate(content | {"row": row, "maps": []})


def study_evaluations() -> list[Evaluation]:
    """Five routings, free names, dropped layers, thetas at full precision, and a sweep; three seeds, the base one."""
    routed = {
        "dllm": "dllm",
        "dllm_55": "dllm",
        "dllm_60": "dllm",
        "dllm_qat": "dllm",
        "mod": "mod",
        "random": "random",
    }
    routed |= {"qtale": "qtale", "qtale_plus": "qtale"} | {f"qtale@{value}": "qtale" for value in (0.03, 0.1, 0.3)}
    found = [_variant("dense", "dense", fmt, ("", 1.0), 0, 0.0) for fmt in FORMATS]
    for seed in (0, 1, 2):
        for fmt in FORMATS:
            for model, ratio, gain in (
                ("dense_qat", 1.0, 0.4),
                ("drop_even", 0.5, -4.0),
                ("drop_influence", 0.5, -3.0),
            ):
                found.append(_variant(model, "dense", fmt, ("", ratio), seed, gain))
            for number, (model, routing) in enumerate(routed.items()):
                points = [("ratio 0.50", 0.5), ("ratio 0.70", 0.7)]
                if fmt[0] == "none" and model in ("dllm", "qtale", "qtale_plus"):
                    reach = 0.02 if model == "dllm" else 0.5
                    points += [(f"threshold {theta:.2f}", 0.5 + reach * (0.5 - theta)) for theta in (0.1, 0.3, 0.5)]
                found += [_variant(model, routing, fmt, point, seed, number / 4 - 1) for point in points]
    return found


def training_log(model: str, seed: int, steps: int = 400) -> list[dict]:
    """One training run."""
    draw = random.Random(f"{model}{seed}")
    lines = []
    for step in range(20, steps + 1, 20):
        done = step / steps
        line = {
            "step": step,
            "cross_entropy": 0.05 + math.exp(-4 * done) + draw.uniform(0, 0.03),
            "learning_rate": 1e-3 * (1 - done),
        }
        if model != "base":
            saturated = model == "dllm"
            line |= {
                "executed_ratio": 0.5 + 0.39 * math.exp(-5 * done) + draw.uniform(-0.01, 0.01),
                "flip_rate": (0.05 if saturated else 0.17) + 0.15 * math.exp(-4 * done) + draw.uniform(-0.005, 0.005),
                "logit_gap_q50": (6.0 if saturated else 2.2) * (1 - math.exp(-3 * done)) + draw.uniform(0, 0.1),
            }
        lines.append(line)
    return lines


def write_experiment(folder: Path, seeds: tuple[int, ...] = (0, 1, 2), accuracy: bool = True) -> None:
    """Writes evaluations and logs of dense, D-LLM and QTALE below `folder`."""
    evaluations = [("dense", fmt, ("dense", 1.0), 0) for fmt in FORMATS]
    evaluations += [
        (model, fmt, point, seed)
        for model in ("dllm", "qtale")
        for fmt in FORMATS
        for point in POINTS
        for seed in seeds
    ]
    (folder / "evaluation").mkdir(parents=True)
    for number, (model, fmt, point, seed) in enumerate(evaluations):
        path = folder / "evaluation" / model / f"seed{seed}" / f"{number:03d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(evaluation(model, fmt, point, seed, accuracy)))
    for model, seed in [("base", 0), *((model, seed) for model in ("dllm", "qtale") for seed in seeds)]:
        path = folder / f"{model}-seed{seed}" / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in training_log(model, seed)))


@pytest.fixture(scope="session")
def experiment(tmp_path_factory) -> Path:
    """A finished experiment: 3 methods, 4 formats, 4 points, 3 seeds (dense: 1). Read only."""
    folder = tmp_path_factory.mktemp("reporting") / "run"
    write_experiment(folder)
    return folder


@pytest.fixture(scope="session")
def text_experiment(tmp_path_factory) -> Path:
    """The same without accuracies, one seed: nats per token only. Read only."""
    folder = tmp_path_factory.mktemp("reporting") / "text"
    write_experiment(folder, seeds=(0,), accuracy=False)
    return folder


@pytest.fixture(scope="session")
def study() -> list[Evaluation]:
    """The evaluations of a study over many methods. Read only."""
    return study_evaluations()
