"""Batched inference: texts of any lengths join and leave a running batch.

    add(Request) -> id          waiting --admit--> running --finish--> gone
    step() -> events            one forward pass over the next tokens of all running texts: one token of each text that
                                generates, and parts of the prompts of prompts that are not read completely yet

Memory is a fixed set of pages and states (`pools.py`), allocated at the start. A text is admitted if its tokens so far fit. If a
running text needs a page and none is free, blocks of the prefix cache are removed first. Then the running text of the lowest
priority (among equals, the latest) waits again: later it reads its tokens again, including generated ones, and continues with the
same random numbers.

The engine is not thread-safe: one thread calls it. Under tensor parallelism every rank makes the same calls, and every rank
gets the same events.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from launch.plan.cost.inference import cache_sizes
from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from train.inference.forward import Read, logits_of, read_tokens
from train.inference.pools import Pools
from train.inference.prefix import PrefixCache
from train.inference.request import Event, Finish, Request, Token
from train.inference.sampling import Draw, draw
from train.inference.thinking import ThinkingWatch
from train.model.few_tokens import FewTokens
from train.native.few_rows import line_sums


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine: texts, tokens and memory."""

    rows: int = 16
    """Largest number of texts that run at once."""
    context_tokens: int = 4096
    """Largest number of tokens of a text, prompt and answer together."""
    memory_bytes: int | None = None
    """Bytes of keys, values and states on this rank; None: enough for `rows` texts of `context_tokens`."""
    page_tokens: int = 16
    """Tokens of a page of keys and values."""
    step_tokens: int = 512
    """Largest number of tokens read in a step. It limits the memory of a step, and how long a prompt delays the other texts."""
    prefix_blocks: int = 0
    """Number of blocks of prompts whose pages and states are stored for later texts with the same beginning; 0: none."""
    block_tokens: int = 128
    """Tokens of such a block; a multiple of `page_tokens`."""


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and the current numbers of texts and free pages."""

    running: int
    waiting: int
    prompt_tokens: int
    """Prompt tokens of admitted texts. A text that had to wait again adds all tokens that it reads again."""
    cached_tokens: int
    """Those that were found in the prefix cache."""
    generated_tokens: int
    preemptions: int
    steps: int
    free_pages: dict[str, int]
    """By kind of attention layer."""
    prefix_blocks: int

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found in the prefix cache and not read."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(eq=False)
class _Text:
    """A request that has not ended, and its state."""

    id: int
    request: Request
    tokens: list[int]
    """Prompt and generated tokens."""
    watch: ThinkingWatch | None
    done: int = 0
    """Number of tokens that are in the pools."""
    row: int = -1
    """Row in the pools; -1 while waiting."""
    scored: int = 0
    """Number of prompt tokens, from the start, whose scores were reported."""
    keys: list[bytes] = field(default_factory=list)
    """Keys of the text's blocks in the prefix cache, as far as they are computed."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Number of tokens that are not in the pools yet."""
        return len(self.tokens) - self.done

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: the first text is served first."""
        return (-self.request.priority, self.id)


class InferenceEngine:
    """See the module docstring. `model`: a whole model or this tensor rank's part, of shape `shape`.

    fingerprint: identifies weights and tokenizer in the keys of the prefix cache. Raises RecipeError if one text of
    `context_tokens` does not fit into `memory_bytes`; the message names the longest that fits.
    """

    def __init__(
        self, model: Any, shape: ModelConfig, config: EngineConfig | None = None, *, fingerprint: str = ""
    ) -> None:
        self.model, self.shape = model.eval(), shape
        self.config = config = config or EngineConfig()
        weight = next(model.parameters())
        tensor = model.pg_collection.tp.size()
        self.sizes = cache_sizes(
            shape, rows=config.rows, context_tokens=config.context_tokens, page_tokens=config.page_tokens,
            step_tokens=config.step_tokens, snapshots=config.prefix_blocks if "M" in shape.pattern else 0,
            number_bytes=weight.element_size(), tensor=tensor, budget_bytes=config.memory_bytes,
        )  # fmt: skip
        self.pools = Pools(shape, self.sizes, dtype=weight.dtype, device=weight.device, tensor=tensor)
        self.prefixes = PrefixCache(
            self.pools, block_tokens=config.block_tokens, capacity=config.prefix_blocks, root=fingerprint
        )
        self._few = FewTokens(model)
        self._free_rows = list(range(config.rows - 1, -1, -1))
        self._running: list[_Text] = []
        self._waiting: list[_Text] = []
        self._texts: dict[int, _Text] = {}
        self._events: list[Event] = []
        self._next_id = 0
        self._counts = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "preemptions": 0, "steps": 0}

    # ---- calls of users

    def add(self, request: Request) -> int:
        """Accept a request. -> its id. RecipeError if it is malformed or too long; the message names the limit."""
        self._check(request)
        watch = ThinkingWatch(request.thinking, request.prompt) if request.thinking is not None else None
        scored = request.score_from if request.score_from is not None else len(request.prompt)
        text = _Text(self._next_id, request, list(request.prompt), watch, scored=scored)
        self._next_id += 1
        self._texts[text.id] = text
        self._waiting.append(text)
        return text.id

    def cancel(self, id: int) -> None:
        """End a request. Its last event comes with the next step. No effect if it has ended."""
        if id in self._texts:
            self._end(self._texts[id], "cancelled")

    def weights_changed(self) -> None:
        """Call it after the model's weights have changed: the engine holds copies of them, and states that they gave."""
        self._few.pack()
        self.prefixes.clear()

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs and no event is left."""
        return not self._texts and not self._events

    def step(self) -> list[Event]:
        """Read and generate the next tokens of all running texts. -> events; their order between requests is not defined."""
        self._admit()
        batch = self._schedule()
        if batch:
            self._counts["steps"] += 1
            self._run(batch)
        events, self._events = self._events, []
        return events

    def run(self, requests: Sequence[Request]) -> list[list[Event]]:
        """Add requests and run steps until all of them have ended. -> the events of each, in order."""
        ids = [self.add(request) for request in requests]
        found: dict[int, list[Event]] = {id: [] for id in ids}
        while any(id in self._texts for id in ids) or self._events:
            for event in self.step():
                found.setdefault(event.request, []).append(event)
        return [found[id] for id in ids]

    def stats(self) -> EngineStats:
        free = {kind: group.pages.free for kind, group in self.pools.groups.items()}
        return EngineStats(
            running=len(self._running), waiting=len(self._waiting), free_pages=free, prefix_blocks=len(self.prefixes),
            **self._counts,
        )  # fmt: skip

    # ---- which texts run

    def _check(self, request: Request) -> None:
        prompt, vocab = request.prompt, self.shape.real_vocab
        if not len(prompt):
            raise RecipeError("the prompt has no tokens. Give at least one, such as the end-of-text token.")
        if min(prompt) < 0 or max(prompt) >= vocab:
            wrong = next(id for id in prompt if not 0 <= id < vocab)
            raise RecipeError(f"the prompt has token id {wrong}; the model has ids 0 to {vocab - 1}.")
        whole, most = len(prompt) + request.max_new_tokens, self.config.context_tokens
        if whole > most:
            raise RecipeError(
                f"{len(prompt):,} prompt tokens and {request.max_new_tokens:,} new ones are {whole:,}, but a text here has at "
                f"most {most:,}. Shorten the prompt"
                + (f", or ask for at most {most - len(prompt):,} new tokens." if len(prompt) < most else ".")
            )
        if request.score_from is not None and request.score_from < 1:
            raise RecipeError(
                f"score_from={request.score_from}: the first token of a text has no score. Use 1 or more."
            )

    def _admit(self) -> None:
        """Start waiting texts, in order, as long as their tokens fit."""
        self._waiting.sort(key=lambda text: text.order)
        while self._waiting:
            text = self._waiting[0]
            if not self._free_rows and not self._preempt_for(text):
                return
            if not self._start(text):
                return
            self._waiting.remove(text)
            self._running.append(text)

    def _start(self, text: _Text) -> bool:
        """Give a text a row, and its blocks in the prefix cache. -> False if its tokens do not fit now."""
        text.row, text.done = self._free_rows[-1], 0
        if self.prefixes.capacity:
            is_scored = text.scored == len(text.request.prompt)
            # The token before the next one to draw or score must be read, even if the prefix cache has it.
            known = ((len(text.tokens) if is_scored else text.scored) - 1) // self.config.block_tokens
            self.prefixes.extend_keys(text.keys, text.tokens, known)
            text.done = self.prefixes.adopt(text.row, text.keys[:known])
        while not self._has_room(text):
            if not self.prefixes.evict() and not self._preempt_for(text):
                self.pools.drop(text.row)
                text.row, text.done = -1, 0
                return False
        self._free_rows.remove(text.row)
        self._counts["prompt_tokens"] += len(text.tokens)
        self._counts["cached_tokens"] += text.done
        return True

    def _has_room(self, text: _Text) -> bool:
        """Whether all tokens of the text so far fit into free pages; for a window, those of the next step."""
        next_tokens = min(len(text.tokens), text.done + self.config.step_tokens)
        return all(
            group.missing(text.row, next_tokens if group.window else len(text.tokens)) <= group.pages.free
            for group in self.pools.groups.values()
        )

    def _preempt_for(self, text: _Text) -> bool:
        """Make the running text of the lowest priority wait again, if it is served after `text`. -> whether there was one."""
        last = max(self._running, key=lambda other: other.order, default=None)
        if last is None or last.order <= text.order:
            return False
        self._stop(last)
        self._waiting.append(last)
        self._waiting.sort(key=lambda other: other.order)
        self._counts["preemptions"] += 1
        return True

    def _stop(self, text: _Text) -> None:
        self._running.remove(text)
        self.pools.drop(text.row)
        self._free_rows.append(text.row)
        text.row, text.done = -1, 0

    def _end(self, text: _Text, finish: Finish, *, message: str = "", token: Token | None = None) -> None:
        if text.row >= 0:
            self._stop(text)
        else:
            self._waiting.remove(text)
        del self._texts[text.id]
        self._events.append(Event(text.id, token, finish, message=message))

    # ---- one step

    def _schedule(self) -> list[tuple[_Text, int]]:
        """(text, number of its tokens to read in this step); texts with one token first. Takes the pages that they need."""
        self._running.sort(key=lambda text: text.order)
        singles: list[tuple[_Text, int]] = []
        parts: list[tuple[_Text, int]] = []
        for text in [text for text in self._running if text.left == 1]:
            if text.row >= 0 and self._take(text, 1):
                singles.append((text, 1))
        budget = self.config.step_tokens - len(singles)
        for text in [text for text in self._running if text.left > 1]:
            if budget < 1 or text.row < 0:
                continue
            count = min(text.left, budget)
            if self.prefixes.capacity:  # stop at the end of a block, to store its states
                count = min(count, self.config.block_tokens - text.done % self.config.block_tokens)
            taken = self._take(text, count)
            if taken:
                (singles if taken == 1 else parts).append((text, taken))
                budget -= taken
        return [pair for pair in singles + parts if pair[0].row >= 0]

    def _take(self, text: _Text, count: int) -> int:
        """Take the pages for the text's next `count` tokens, or for fewer. -> that number; 0 if the text has to wait."""
        while not self.pools.fits(text.row, text.done + 1):
            if not self.prefixes.evict() and not self._preempt_for(text):
                return 0
        while not self.pools.fits(text.row, text.done + count):
            count -= 1
        self.pools.extend(text.row, text.done + count)
        return count

    @torch.no_grad()
    def _run(self, batch: list[tuple[_Text, int]]) -> None:
        reads = [Read(text.row, text.tokens[text.done : text.done + count], text.done) for text, count in batch]
        hidden_TH = read_tokens(self.model, reads, self.pools, few=self._few)
        # Logits are needed after the last token of a text, and before each token to score.
        lines: list[int] = []
        scoring: list[range] = []
        begin = 0
        for text, count in batch:
            first = max(text.scored - 1, text.done)
            last = min(text.done + count, len(text.request.prompt) - 1)
            scoring.append(range(len(lines), len(lines) + max(0, last - first)))
            lines += range(begin + first - text.done, begin + last - text.done)
            begin += count
        drawing = []
        begin = 0
        for text, count in batch:
            begin += count
            if count == text.left and text.generated < text.request.max_new_tokens:
                drawing.append((text, len(lines)))
                lines.append(begin - 1)
        finite_T = torch.isfinite(hidden_TH).all(-1)
        logits_NV = logits_of(
            self.model, hidden_TH if lines == list(range(len(hidden_TH))) else hidden_TH[lines], few=self._few
        )
        best_N, log_sums_N = line_sums(logits_NV)
        bad = self._broken(batch, finite_T, lines, log_sums_N)
        for (text, count), places in zip(batch, scoring, strict=True):
            if text in bad:
                continue
            self._advance(text, count)
            if places:
                self._score(text, *(x[places.start : places.stop] for x in (logits_NV, log_sums_N, best_N)))
        for text in bad:
            self._end(text, "error", message="the model's output is not finite (NaN or infinity)")
        drawing = [(text, line) for text, line in drawing if text not in bad]
        if drawing:
            chosen = [line for _, line in drawing]
            whole = chosen == list(range(len(lines)))
            self._draw(
                [text for text, _ in drawing], *(x if whole else x[chosen] for x in (logits_NV, log_sums_N, best_N))
            )
        for text, _ in batch:
            if text.row >= 0 and not text.left:
                self._end(text, "length")  # the request only scores its prompt

    def _broken(
        self, batch: list[tuple[_Text, int]], finite_T: torch.Tensor, lines: list[int], log_sums_N: torch.Tensor
    ) -> list[_Text]:
        """The texts whose hidden states or logits contain NaN or infinity."""
        if bool(finite_T.all()) and bool(torch.isfinite(log_sums_N).all()):
            return []
        finite_T = finite_T.clone()
        for line, is_finite in zip(lines, torch.isfinite(log_sums_N).tolist(), strict=True):
            finite_T[line] &= is_finite
        parts = finite_T.split([count for _, count in batch])
        return [text for (text, _), part in zip(batch, parts, strict=True) if not bool(part.all())]

    def _advance(self, text: _Text, count: int) -> None:
        """Count tokens as read, store a block that has just ended, and release pages outside of windows."""
        text.done += count
        blocks, rest = divmod(text.done, self.config.block_tokens)
        if self.prefixes.capacity and not rest:
            self.prefixes.extend_keys(text.keys, text.tokens, blocks)
            self.prefixes.store(text.row, text.keys[:blocks])
        self.pools.slide(text.row, text.done)

    def _score(self, text: _Text, logits_NV: torch.Tensor, log_sums_N: torch.Tensor, best_N: torch.Tensor) -> None:
        ids = torch.tensor(text.tokens[text.scored : text.scored + len(logits_NV)], device=logits_NV.device)
        tokens = _tokens(ids, logits_NV, log_sums_N, best_N, tops=[text.request.top_logprobs] * len(ids))
        text.scored += len(tokens)
        self._events.append(Event(text.id, scores=tuple(tokens)))

    def _draw(
        self, texts: list[_Text], logits_NV: torch.Tensor, log_sums_N: torch.Tensor, best_N: torch.Tensor
    ) -> None:
        """The next token of each text."""
        ids = draw(logits_NV, [Draw(text.request.sampling, text.generated) for text in texts], best_N)
        forced = [text.watch.forced if text.watch is not None else None for text in texts]
        for line, id in enumerate(forced):
            if id is not None:
                ids[line] = id
        tokens = _tokens(
            ids, logits_NV, log_sums_N, best_N, tops=[text.request.top_logprobs for text in texts], forced=forced
        )
        self._counts["generated_tokens"] += len(tokens)
        for text, token in zip(texts, tokens, strict=True):
            text.tokens.append(token.id)
            if text.watch is not None:
                text.watch.see(token.id)
            if token.id in text.request.stop:
                self._end(text, "stop", token=token)
            elif text.generated == text.request.max_new_tokens:
                self._end(text, "length", token=token)
            else:
                self._events.append(Event(text.id, token))


def _tokens(
    ids_N: torch.Tensor,
    logits_NV: torch.Tensor,
    log_sums_N: torch.Tensor,
    best_N: torch.Tensor,
    *,
    tops: Sequence[int],
    forced: Sequence[int | None] | None = None,
) -> list[Token]:
    """The tokens with their log-probabilities."""
    logprobs = (logits_NV.gather(-1, ids_N[:, None])[:, 0] - log_sums_N).tolist()
    likeliest = best_N.tolist()
    most = min(max(tops), logits_NV.shape[-1])
    top_ids: list[list[int]] = [[]] * len(likeliest)
    top_values: list[list[float]] = [[]] * len(likeliest)
    if most:
        values, indices = logits_NV.topk(most, dim=-1)
        top_ids, top_values = indices.tolist(), (values - log_sums_N[:, None]).tolist()
    return [
        Token(
            id, logprobs[line], tuple(zip(top_ids[line][: tops[line]], top_values[line][: tops[line]], strict=True)),
            is_likeliest=id == likeliest[line], is_forced=forced is not None and forced[line] is not None,
        )
        for line, id in enumerate(ids_N.tolist())
    ]  # fmt: skip
