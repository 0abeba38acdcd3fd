"""ROUGE: what a model writes after each prompt, against the response that the data has."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qtale_jax.artifact import LoadedModel
from qtale_jax.config.schema import Config
from qtale_jax.data.records import Instruction, Record
from qtale_jax.data.stops import end_ids
from qtale_jax.data.tokens import encode
from qtale_jax.errors import InputError
from qtale_jax.evaluation.harness.generation import Request, continue_requests
from qtale_jax.models.policy import Policy

MEASURES = ("rouge1", "rouge2", "rougeL")
"""Overlap of words, of pairs of words, and the longest common subsequence (Lin, 2004)."""


def make_scorer() -> Any:
    """Scores pairs of texts by their stemmed words, with the rouge-score library.

    Raises:
        InputError: the library is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise InputError('evaluate.rouge needs the rouge-score library: pip install "qtale-jax[eval]"') from error
    return RougeScorer(MEASURES, use_stemmer=True)


def rouge(scorer: Any, references: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """Mean F-measures in [0, 1] over all texts."""
    found = [scorer.score(one, other) for one, other in zip(references, written, strict=True)]
    return {name: float(np.mean([scores[name].fmeasure for scores in found])) for name in MEASURES}


def prompts_that_fit(
    records: Sequence[Record], tokenizer: Any, context: int, config: Config
) -> list[tuple[Instruction, list[int]]]:
    """The instructions whose prompt leaves room for `evaluate.max_new_tokens` in the context, and its token ids.

    Raises:
        InputError: the data has no instructions, or none that fits.
    """
    instructions = [record for record in records if isinstance(record, Instruction)]
    if not instructions:
        raise InputError(
            "evaluate.rouge=true compares written responses, and the data has none; allowed: data.kind='instruction', "
            "or a published task with a prompt and a response"
        )
    # A space at the end would be a token of its own, which responses do not begin after.
    ids = encode(tokenizer, [record.prompt.rstrip(" ") for record in instructions])
    room = context - config.evaluate.max_new_tokens
    found = [(record, prompt) for record, prompt in zip(instructions, ids, strict=True) if 0 < len(prompt) <= room]
    if not found:
        raise InputError(
            f"evaluate.max_new_tokens={config.evaluate.max_new_tokens} leaves {max(room, 0)} of {context} tokens of "
            "context for prompts, and none is that short"
        )
    return found


def written_responses(
    model: LoadedModel,
    records: Sequence[Record],
    policy: Policy,
    config: Config,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Lets the model answer every prompt greedily, until an end token or `evaluate.max_new_tokens`, and scores that.

    Args:
        model: the model, one tree per layer.
        records: instructions among them.
        policy: route policy.
        config: evaluate section.
        progress: called with the number of prompts answered.

    Returns:
        The measures, the number of `examples` and of those `dropped` as their prompts were too long, and the executed
        share of layers over prompts and responses.

    Raises:
        InputError: as `prompts_that_fit`, or rouge-score is not installed.
    """
    scorer = make_scorer()  # what is missing is said before hours of writing, not after
    fitting = prompts_that_fit(records, model.tokenizer, model.spec.architecture.max_length, config)
    requests = [Request(ids, (), config.evaluate.max_new_tokens) for _, ids in fitting]
    counted = continue_requests(
        model.spec,
        model.params,
        model.tokenizer,
        requests,
        policy,
        ends=end_ids(model.tokenizer, model.provenance),
        batch_size=config.evaluate.batch_size,
        compute_dtype=jnp.dtype(config.train.compute_dtype),
        progress=progress,
    )
    assert counted is not None, "there is a request"
    answers = [request.text or "" for request in requests]
    scores = rouge(scorer, [record.response for record, _ in fitting], answers)
    share = float(np.sum(counted.executed) / (counted.tokens * len(counted.executed)))
    total = sum(isinstance(record, Instruction) for record in records)
    return {
        **scores,
        "examples": len(fitting),
        "dropped": total - len(fitting),
        "executed_ratio": share * model.spec.kept_share,
    }
