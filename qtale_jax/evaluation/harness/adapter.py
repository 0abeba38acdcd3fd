"""The `LM` that lm-evaluation-harness asks: log-likelihoods, rolling log-likelihoods, generation until a stop string.

Texts become tokens exactly as in the harness's own Hugging Face backend (lm_eval.models.huggingface), so that numbers
compare: the tokenizer adds the special tokens that it adds by default, a start token is put before text without
context, and what is longer than the context loses its beginning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qtale_jax.artifact import LoadedModel
from qtale_jax.data.stops import end_ids
from qtale_jax.errors import InputError
from qtale_jax.evaluation.evaluate import layout
from qtale_jax.evaluation.harness.generation import Request, continue_requests
from qtale_jax.evaluation.likelihood import Counted, Row, likelihoods
from qtale_jax.inference.policies import inference_policy

GREEDY = {"until", "do_sample", "temperature", "top_p", "max_gen_toks", "max_new_tokens", "max_tokens"}
"""Keys of a task's `generation_kwargs` that are understood."""


@dataclass
class TaskCounts:
    """What the requests of one task came to."""

    requests: int = 0
    truncated: int = 0
    """Requests that lost their beginning, as they were longer than the context."""
    counted: Counted | None = None

    def add(self, counted: Counted | None) -> None:
        """Adds the counts of some of its requests."""
        if counted is not None:
            self.counted = counted if self.counted is None else jax.tree.map(np.add, self.counted, counted)


class HarnessModel(TemplateLM):
    """A loaded model as lm-evaluation-harness wants it; `counts` says per task what was executed.

    Args:
        model: a loaded model directory with a tokenizer.
        theta: one threshold for all routed layers; default: the model's own.
        batch_size: rows per batch; batches have one shape per length class.
        compute_dtype: type of activations.
        max_new_tokens: of generation, where the task does not say.
        progress: called with the number of requests done.

    Raises:
        InputError: the model has no tokenizer.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        theta: float | None = None,
        batch_size: int = 64,
        compute_dtype: str = "float32",
        max_new_tokens: int = 256,
        progress: Callable[[int], None] = lambda _: None,
    ):
        super().__init__()
        if model.tokenizer is None:
            raise InputError("the model directory has no tokenizer")
        self.tokenizer: Any = model.tokenizer
        self.counts: dict[str, TaskCounts] = {}
        self._spec, self._params = model.spec, model.params
        self._ends = end_ids(model.tokenizer, model.provenance)
        self._layout = layout(model.spec, model.params)
        self._policy = inference_policy(model.spec, theta)
        self._batch_size, self._dtype = batch_size, jnp.dtype(compute_dtype)
        self._max_new_tokens, self._progress = max_new_tokens, progress
        self._task = ""

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before text that has no context: the start token, or else the end token.

        Raises:
            InputError: the tokenizer has neither.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise InputError("the tokenizer has neither a start nor an end token to put before a text without context")
        return eos if bos is None else bos

    @property
    def max_length(self) -> int:
        """The context in tokens."""
        return self._spec.architecture.max_length

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text, by the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with the special tokens that the tokenizer adds, unless the text has a start token."""
        if add_special_tokens is None:
            start = self.tokenizer.decode(self.prefix_token_id)
            kwargs = {} if not start or not string.startswith(start) else {"add_special_tokens": False}
        else:
            kwargs = {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **kwargs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation after its context, and whether greedy decoding gives it."""
        return self._by_task(requests, lambda part: super(HarnessModel, self).loglikelihood(part, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each text, in windows of the context; every token is predicted once."""
        return self._by_task(requests, self._rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations up to, and without, the first stop string.

        Raises:
            InputError: a setting of generation that is not understood, or more new tokens than the context has.
        """
        return self._by_task(requests, self._generate)

    def _by_task(self, requests: Sequence[Instance], answer: Callable[[list[Instance]], list]) -> list:
        """Answers the requests of one task after the other; the harness mixes them, and cost is reported per task."""
        places: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            places.setdefault(str(request.task_name), []).append(index)
        results: list = [None] * len(requests)
        for task, indices in places.items():
            self._task = task
            self.counts.setdefault(task, TaskCounts()).requests += len(indices)
            for index, result in zip(indices, answer([requests[i] for i in indices]), strict=True):
                results[index] = result
        return results

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored = self._score([(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), result in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return scored

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        counts, limit = self.counts[self._task], self.max_length + 1  # the last token is predicted, and never read
        rows = []
        for context, continuation in pairs:
            if not continuation or len(continuation) > self.max_length:
                raise InputError(
                    f"{self._task}: a continuation has {len(continuation)} tokens; allowed: 1 to the context of "
                    f"{self.max_length}"
                )
            ids = (context + continuation)[-limit:]
            counts.truncated += len(context) + len(continuation) > limit
            rows.append(Row(ids, len(ids) - len(continuation)))
        if not rows:
            return []
        found = likelihoods(
            self._spec,
            self._layout,
            rows,
            self._policy,
            batch_size=self._batch_size,
            compute_dtype=self._dtype,
            progress=self._progress,
            context=limit,
        )
        counts.add(found.counted)
        return [(float(v), bool(g)) for v, g in zip(found.log_likelihood, found.is_greedy, strict=True)]

    def _rolling(self, requests: list[Instance]) -> list[float]:
        pairs, owners = [], []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [make_disjoint_window(window) for window in windows]
            pairs += found
            owners += [index] * len(found)
        values = np.zeros(len(requests))
        np.add.at(values, owners, [value for value, _ in self._score(pairs)])
        for request, value in zip(requests, values, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(value))
        return values.tolist()

    def _generate(self, requests: list[Instance]) -> list[str]:
        asked = [self._request(*request.args) for request in requests]
        self.counts[self._task].add(
            continue_requests(
                self._spec,
                self._params,
                self.tokenizer,
                asked,
                self._policy,
                ends=self._ends,
                batch_size=self._batch_size,
                compute_dtype=self._dtype,
                progress=self._progress,
            )
        )
        texts = [request.text or "" for request in asked]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        if unknown := sorted(set(settings) - GREEDY):
            raise InputError(
                f"{self._task}: generation_kwargs has {unknown[0]!r}; allowed: {', '.join(sorted(GREEDY))}"
            )
        until = settings.get("until") or []
        given = (settings.get(key) for key in ("max_gen_toks", "max_new_tokens", "max_tokens"))
        count = int(next((value for value in given if value is not None), self._max_new_tokens))
        temperature = float(settings.get("temperature") or 0.0)
        if not 0 < count < self.max_length:
            raise InputError(
                f"{self._task}: {count} new tokens asked for; allowed: 1 to {self.max_length - 1}, as the context is "
                f"{self.max_length}"
            )
        whole = self.tok_encode(context) or [self.prefix_token_id]
        prompt = whole[-(self.max_length - count) :]
        self.counts[self._task].truncated += len(prompt) < len(whole)
        return Request(
            prompt,
            (until,) if isinstance(until, str) else tuple(until),
            count,
            temperature if settings.get("do_sample", temperature > 0) else 0.0,
            float(settings.get("top_p") or 1.0),
        )
