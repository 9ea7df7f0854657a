"""Runs the items of a task through a model, and turns log-probabilities or judged answers into metrics with intervals.

cloze            accuracy (every token of the target is the likeliest), bits_per_byte of the targets
multiple_choice  accuracy (the likeliest choice is right), accuracy_per_byte (log-probability per byte of the choice)
rolling          bits_per_byte of the texts, from the first token on
generate         score of the greedy answers
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.tokenizer import Tokenizer
from recipes.schema.errors import DataError, NumericsError, RecipeError
from train.evaluate.deal import in_parts
from train.evaluate.decoder import Decoder
from train.evaluate.intervals import Metric, mean, ratio, share
from train.evaluate.score import Forward, Request, Score, bits, fitted, rolling_requests, scores
from train.evaluate.tasks.task import Item, Task, begin_token, request_of
from train.inference.request import Sampling
from train.parallel.mesh import Mesh

_BLOCK_TOKENS = 1 << 22
"""Tokens of items whose rows are in memory at once."""
_BLOCK_ITEMS = 256
"""Prompts handed to the decoder at once."""


@dataclass(frozen=True)
class TaskResult:
    """The result of a task."""

    name: str
    kind: str
    hash: str
    items: int
    metrics: dict[str, Metric]
    cut_contexts: int = 0
    """Number of contexts that were cut at the beginning to fit into a row."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Question and answer of each item."""


def ask(task: Task, *, forward: Forward, tokenizer: Tokenizer, decoder: Decoder | None = None) -> TaskResult:
    """Run all items. Collective over the world; the same result on every rank.

    Raises NumericsError if a log-probability is not finite, DataError if an item does not fit into a row.
    """
    if task.judge is not None:
        assert decoder is not None, "a task that generates needs a decoder"
        return _generated(task, decoder, mesh=forward.mesh)
    is_long = task.row_tokens > forward.row_tokens
    if is_long:
        assert decoder is not None, "the rules refuse tasks that are longer than the rows of training"
        forward = replace(forward, row_tokens=task.row_tokens)
    found: list[list[Score]] = []
    cut = 0
    for block in _blocks(task, forward, tokenizer):
        requests = [request for of_item in block for request in of_item]
        kept = [fitted(request, forward.row_tokens) for request in requests]
        cut += sum(one is not other for one, other in zip(requests, kept, strict=True))
        results = iter(decoder.scores(kept) if is_long and decoder is not None else scores(forward, kept))
        found += [[next(results) for _ in of_item] for of_item in block]
    _check_finite(task, found)
    metrics, samples = _judged(task, found)
    return TaskResult(task.name, task.kind, task.hash, len(task.items), metrics, cut, samples)


def requests_of(task: Task, item: Item, tokenizer: Tokenizer, *, row_tokens: int) -> list[Request]:
    """The requests that score an item: each target after the prompt, or the windows of a text."""
    if task.kind == "rolling":
        ids = tokenizer.encode(item.prompt)
        return list(rolling_requests(ids, prefix=begin_token(tokenizer), row_tokens=row_tokens))
    return [request_of(tokenizer, item.prompt, target, end_of_document=task.end_of_document) for target in item.targets]


def _blocks(task: Task, forward: Forward, tokenizer: Tokenizer) -> Iterator[list[list[Request]]]:
    """The requests of a few items at a time."""
    block: list[list[Request]] = []
    tokens = 0
    for item in task.items:
        requests = requests_of(task, item, tokenizer, row_tokens=forward.row_tokens)
        for request in requests:
            if len(request.target) > forward.row_tokens:
                raise DataError(
                    f"{item.place}: the target has {len(request.target):,} tokens, more than a row of {forward.row_tokens:,}. "
                    f"Shorten it, or allow longer rows (--row-tokens)."
                )
        block.append(requests)
        tokens += sum(len(request.context) + len(request.target) for request in requests)
        if tokens >= _BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _check_finite(task: Task, found: Sequence[Sequence[Score]]) -> None:
    for item, of_item in zip(task.items, found, strict=True):
        for score in of_item:
            if not math.isfinite(score.log_probability):
                raise NumericsError(
                    f"task {task.name}, {item.place}: the log-probability is {score.log_probability}, so the model's logits "
                    f"overflow or contain NaN."
                )


def _judged(task: Task, found: Sequence[Sequence[Score]]) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    """Metrics and samples of a task that is scored by likelihood."""
    items = task.items
    logs = [[score.log_probability for score in of_item] for of_item in found]
    if task.kind == "multiple_choice":
        chosen = [_largest(row) for row in logs]
        per_byte = [
            _largest([log / len(target.encode()) for log, target in zip(row, item.targets, strict=True)])
            for row, item in zip(logs, items, strict=True)
        ]
        metrics = {
            "accuracy": share(sum(c == item.answer for c, item in zip(chosen, items, strict=True)), len(items)),
            "accuracy_per_byte": share(
                sum(c == item.answer for c, item in zip(per_byte, items, strict=True)), len(items)
            ),
        }
        samples = [
            {"item": item.place, "chosen": c, "right": item.answer, "log_probabilities": row}
            for item, c, row in zip(items, chosen, logs, strict=True)
        ]
        return metrics, samples
    texts = [item.prompt if task.kind == "rolling" else item.targets[0] for item in items]
    spent = [bits(math.fsum(row)) for row in logs]
    metrics = {
        "bits_per_byte": ratio(spent, [float(len(text.encode())) for text in texts], higher_is_better=False),
    }
    if task.kind == "cloze":
        metrics = {"accuracy": share(sum(of_item[0].is_greedy for of_item in found), len(items)), **metrics}
    samples = [
        {"item": item.place, "log_probability": math.fsum(row)}
        | ({"is_greedy": of_item[0].is_greedy} if task.kind == "cloze" else {})
        for item, row, of_item in zip(items, logs, found, strict=True)
    ]
    return metrics, samples


def _largest(values: Sequence[float]) -> int:
    """Index of the largest value; among equal values, the first."""
    return max(range(len(values)), key=lambda place: values[place])


def _generated(task: Task, decoder: Decoder, *, mesh: Mesh) -> TaskResult:
    """Greedy answers and their judged scores. The ranks share the work of both."""
    judge = task.judge
    assert judge is not None
    answers: list[str] = []
    for start in range(0, len(task.items), _BLOCK_ITEMS):
        prompts = [item.prompt for item in task.items[start : start + _BLOCK_ITEMS]]
        try:
            answers += decoder.generate(
                prompts, max_new_tokens=task.max_new_tokens, stop=task.stop, sampling=Sampling(temperature=0.0)
            )
        except RecipeError as error:  # the memory has no room for prompt and answer
            raise RecipeError(f"task {task.name}, max_new_tokens={task.max_new_tokens:,}: {error}") from error
    judged = in_parts(mesh, len(answers), lambda places: [judge(task.items[place], answers[place]) for place in places])
    metric = mean(judged) if task.is_graded else share(round(sum(judged)), len(judged))
    samples = [
        {"item": item.place, "answer": answer, "expected": item.targets[item.answer], "score": value}
        for item, answer, value in zip(task.items, answers, judged, strict=True)
    ]
    return TaskResult(task.name, task.kind, task.hash, len(task.items), {"score": metric}, 0, samples)
