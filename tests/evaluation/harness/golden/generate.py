"""Makes expected.json: what lm-evaluation-harness's own Hugging Face backend gives for stories260k.

    pip install torch==2.13.0 "lm_eval[hf]==0.4.13" transformers==5.23.0
    python tests/evaluation/harness/golden/generate.py SHARED_DATA

SHARED_DATA has `stories260k` in Hugging Face layout, `csqa/*.jsonl` and `text/tinystories_train_sample.txt`. All is
computed in float32 on the CPU. The file holds, in nats rounded to 1e-5:

- `tasks`: of the first 200 rows of each task, acc, acc_norm and one [log-likelihood, is greedy] per choice, row by row.
- `rolling`: log-likelihoods of whole documents, some longer than the context of 512 tokens.
- `generation`: prompts, stop strings, and the greedy continuation of up to 70 tokens.
"""

import json
import sys
from pathlib import Path

import datasets
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

HERE = Path(__file__).parent
ROWS = HERE.parents[3] / "qtale_jax" / "evaluation" / "harness" / "rows.yaml"
TASKS = ("arc_easy", "arc_challenge", "openbook_qa", "piqa", "siqa")
LIMIT = 200
MAX_NEW_TOKENS = 70
STOPS = [["."], [" the "], ["ed to"], ["mom s", " big, "], ["never said"]]


def rows(file: Path) -> datasets.Dataset:
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    return datasets.Dataset.from_list([{key: row[key] for key in ("query", "choices", "gold")} for row in found])


def task(file: Path) -> ConfigurableTask:
    config = yaml.safe_load(ROWS.read_text()) | {"task": file.stem}
    config["custom_dataset"] = lambda **_: {"test": rows(file)}
    return ConfigurableTask(config=config)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, entry, index) for index, entry in enumerate(arguments)]


def main(data: Path) -> None:
    model = HFLM(pretrained=str(data / "stories260k"), device="cpu", dtype="float32", batch_size=16)
    found = simple_evaluate(
        model, tasks=[task(data / "csqa" / f"{name}.jsonl") for name in TASKS], limit=LIMIT, bootstrap_iters=0
    )
    assert found is not None
    expected: dict = {"tasks": {}}
    for name in TASKS:
        metrics, samples = found["results"][name], found["samples"][name]
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        expected["tasks"][name] = {
            "acc": metrics["acc,none"],
            "acc_norm": metrics["acc_norm,none"],
            "responses": [
                [[round(float(value), 5), int(greedy)] for value, greedy in sample["filtered_resps"]]
                for sample in samples
            ],
        }

    text = (data / "text" / "tinystories_train_sample.txt").read_text(encoding="utf-8", errors="ignore")
    stories = [story.strip() for story in text.split("<|endoftext|>")[1:41]]
    documents = [stories[0], "Once", *(" ".join(stories[i : i + n]) for i, n in ((1, 2), (4, 5)))]
    values = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in documents]))
    expected["rolling"] = [[document, round(value, 5)] for document, value in zip(documents, values, strict=True)]

    prompts = [" ".join(story.split()[: 5 + 2 * index]) for index, story in enumerate(stories[:10])]
    asked = [(prompt, STOPS[index % len(STOPS)]) for index, prompt in enumerate(prompts)]
    settings = {"do_sample": False, "max_gen_toks": MAX_NEW_TOKENS}
    texts = model.generate_until(requests("generate_until", [(p, {**settings, "until": list(u)}) for p, u in asked]))
    expected["generation"] = [[*entry, text] for entry, text in zip(asked, texts, strict=True)]

    lines = [f'"{key}": {json.dumps(value)}' for key, value in expected.items() if key != "tasks"]
    tasks = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in expected["tasks"].items())
    (HERE / "expected.json").write_text("{\n" + ",\n".join([f'"tasks": {{\n{tasks}\n}}', *lines]) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
