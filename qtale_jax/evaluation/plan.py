"""What an evaluation would run, before it does."""

from typing import Any

from qtale_jax.config.schema import Config
from qtale_jax.data.published import origin
from qtale_jax.data.records import Choice
from qtale_jax.evaluation.evaluate import choice_rows, evaluated_records, likelihood_rows
from qtale_jax.evaluation.harness.files import check_files


def facts(config: Config, tokenizer: Any) -> dict[str, str]:
    """Examples per task and the rows that they make, in words.

    Raises:
        InputError: bad data.
    """
    if config.harness.tasks:
        return _harness(config)
    records = evaluated_records(config)
    choices = [record for record in records if isinstance(record, Choice)]
    rows = []
    if config.evaluate.perplexity or not choices:
        rows += likelihood_rows(records, tokenizer, config, config.evaluate.max_examples)
    if choices:
        rows += choice_rows(choices, tokenizer)[0]
    tasks = dict.fromkeys(choice.task for choice in choices)
    batches = -(-len(rows) // config.evaluate.batch_size)
    found = {"examples": f"{len(records):,} of the {config.evaluate.split} split"}
    if tasks:
        found["tasks"] = ", ".join(tasks)
    if config.data.kind == "published":
        found["data"] = origin(config.evaluate.tasks or config.data.tasks, config.data.path, config.data.source)
    if config.evaluate.rouge:
        found["responses to write"] = f"of at most {config.evaluate.max_new_tokens} tokens, for ROUGE"
    tokens = sum(len(row.ids) for row in rows)
    found["rows"] = f"{len(rows):,} with {tokens:,} tokens, about {batches:,} batches of {config.evaluate.batch_size}"
    return found


def _harness(config: Config) -> dict[str, str]:
    """The harness's tasks by name: reading registered ones would download their data."""
    check_files(config.harness)
    settings = config.harness
    found = {"harness tasks": ", ".join(settings.tasks)}
    if settings.limit is not None:
        found["limit"] = f"{settings.limit:,} documents of each"
    return found
