"""Runs lm-evaluation-harness on our forward pass and decoder (its `TemplateLM`). Only this module imports the package.

    names, folder of YAML files --TaskManager--> tasks --simple_evaluate(HarnessModel)--> samples --> TaskResult

The harness is an optional package (extra `evaluate`): this module is imported when one of its tasks is requested.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from data.tokenizer import Tokenizer
from recipes.schema.errors import DataError, NumericsError
from recipes.schema.suggestions import did_you_mean
from train.evaluate.ask import TaskResult
from train.evaluate.decoder import Decoder
from train.evaluate.intervals import Metric, mean, ratio, share
from train.evaluate.results import HARNESS
from train.evaluate.score import Forward, Request, fitted, rolling_requests, scores
from train.evaluate.tasks.task import begin_token, split_pair
from train.inference.request import Sampling

_MOST_NEW_TOKENS = 256
"""Tokens to generate if a task does not say, as in the harness's own models."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Our model behind the harness's interface. The forward pass decides about batches, packing and layout."""

    def __init__(self, forward: Forward, tokenizer: Tokenizer, decoder: Decoder) -> None:
        super().__init__()
        self._forward, self._tokens, self._decoder = forward, tokenizer, decoder
        self.cut_contexts = 0

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eod

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: begin-of-document, or else end-of-document."""
        return begin_token(self._tokens)

    @property
    def tokenizer_name(self) -> str:
        return self._tokens.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of a text, after the begin-of-document token if the model has one and add_special_tokens is not False."""
        begin = [] if self._tokens.bod is None or add_special_tokens is False else [self._tokens.bod]
        return begin + self._tokens.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each continuation. The harness's own encoding loses a target whose first letters
        merge with the context, and a target that begins with the end-of-document token; `split_pair` keeps both."""
        pairs = [(request.args, *split_pair(self._tokens, *request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        wanted = [Request(tuple(context), tuple(target)) for _, context, target in requests]
        kept = [fitted(request, self._forward.row_tokens) for request in wanted]
        self.cut_contexts += sum(one is not other for one, other in zip(wanted, kept, strict=True))
        found = [(score.log_probability, score.is_greedy) for score in scores(self._forward, kept)]
        for (texts, _, _), (log_probability, _) in zip(requests, found, strict=True):
            if not math.isfinite(log_probability):
                raise NumericsError(
                    f"the log-probability of {texts[1][:60]!r} is {log_probability}: the model's logits overflow or contain NaN."
                )
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, from its first token on."""
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            parts = rolling_requests(
                self._tokens.encode(text), prefix=self.prefix_token_id, row_tokens=self._forward.row_tokens
            )
            own = [(("", text), list(part.context), list(part.target)) for part in parts]
            windows += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows))
        return [math.fsum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to one of its stop texts. Requests with equal options are decoded together."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
        for places in groups.values():
            options: dict[str, Any] = requests[places[0]].args[1]
            until = options.get("until") or []
            texts = self._decoder.generate(
                [requests[place].args[0] for place in places],
                max_new_tokens=int(options.get("max_gen_toks", options.get("max_new_tokens", _MOST_NEW_TOKENS))),
                stop=[until] if isinstance(until, str) else list(until),
                sampling=_sampling(options),
            )
            answers |= dict(zip(places, texts, strict=True))
        return [answers[place] for place in range(len(requests))]


def run_harness(
    name: str,
    *,
    folder: Path | None,
    forward: Forward,
    tokenizer: Tokenizer,
    decoder: Decoder,
    items: int | None = None,
) -> list[TaskResult]:
    """Evaluate a task of the harness, or all of a group. folder: with its YAML file; None: the tasks that come with the harness.

    Raises DataError for an unknown task, or one that the harness cannot read.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    if name not in manager.all_tasks:
        where = f"in {folder}" if folder is not None else "in lm-evaluation-harness"
        hint = did_you_mean(name, manager.all_tasks, otherwise=f"There are {len(manager.all_tasks):,} {where}.")
        raise DataError(f"there is no task {name!r} {where}. {hint}")
    model = HarnessModel(forward, tokenizer, decoder)
    try:
        found: Any = simple_evaluate(
            model=model, tasks=[name], task_manager=manager, limit=items, bootstrap_iters=0, log_samples=True
        )
    except NumericsError:
        raise
    except Exception as error:  # the harness raises whatever a task's data or code raises
        raise DataError(f"lm-evaluation-harness failed on {name}: {type(error).__name__}: {error}") from error
    return [_result(one, found, cut=model.cut_contexts) for one in found["samples"]]


def _sampling(options: dict[str, Any]) -> Sampling:
    """The sampling options of a request; greedy by default."""
    if not options.get("do_sample"):
        return Sampling(temperature=0.0)
    return Sampling(
        temperature=float(options.get("temperature", 1.0)),
        top_k=int(options.get("top_k", 0)),
        top_p=float(options.get("top_p", 1.0)),
        seed=int(options.get("seed", 0)),
    )


def _result(name: str, found: dict[str, Any], *, cut: int) -> TaskResult:
    samples = found["samples"][name]
    higher = found.get("higher_is_better", {}).get(name, {})
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or not filter_name:
            continue
        own = [sample for sample in samples if sample.get("filter", "none") == filter_name and metric in sample]
        shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
        metrics[shown] = _metric(
            metric, float(value), [s[metric] for s in own], is_higher=higher.get(metric) is not False
        )
    digest = hashlib.sha256(json.dumps([s.get("doc_hash") for s in samples], default=str).encode()).hexdigest()
    kept = ("doc_id", "target", "resps", "filtered_resps")
    plain = [{key: json.loads(json.dumps(s.get(key), default=str)) for key in kept} for s in samples]
    return TaskResult(f"{HARNESS}{name}", "harness", digest, len({s["doc_id"] for s in samples}), metrics, cut, plain)


def _metric(name: str, value: float, items: list[Any], *, is_higher: bool) -> Metric:
    """The harness's value with our interval, computed from the samples: for a share, a mean, and per-byte and per-word rates of
    (log-probability, length) pairs. Other aggregations have no interval."""
    unknown = Metric(value, math.nan, math.nan, "unknown", is_higher)
    if not items:
        return unknown
    if all(isinstance(item, int | float) for item in items):
        numbers = [float(item) for item in items]
        if math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-9, abs_tol=1e-12):
            if all(number in (0.0, 1.0) for number in numbers):
                return share(round(sum(numbers)), len(numbers))
            return mean(numbers, higher_is_better=is_higher)
        return unknown
    if not all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        return unknown
    rate = ratio([-float(log) for log, _ in items], [float(size) for _, size in items], higher_is_better=False)
    for turn in (lambda nats: nats / math.log(2), math.exp):  # bits_per_byte; byte_perplexity, word_perplexity
        if math.isclose(turn(rate.value), value, rel_tol=1e-9):
            return Metric(value, turn(rate.low), turn(rate.high), rate.method, higher_is_better=False)
    return unknown
