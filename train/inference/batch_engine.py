"""Batched inference: texts of any lengths join and leave a running batch.

    add(Request) -> id          waiting --admit--> running --finish--> gone
    step() -> events            one forward pass over the next tokens of all running texts: one token of each text that
                                generates, with the guesses of a drafter for those after it, and parts of the prompts of
                                those that are still being read

Memory is a fixed set of pages and states (`pools.py`), allocated at the start. A text is admitted if its tokens so far fit. If a
running text needs a page and none is free, blocks of the prefix cache are removed first. Then the running text of the lowest
priority (among equals, the latest) waits again: later it reads its tokens again, including generated ones, and continues with the
same random numbers.

The engine is not thread-safe: one thread calls it. Under tensor parallelism every rank makes the same calls, and every rank
gets the same events.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from launch.plan.cost.inference import cache_sizes, draft_sizes
from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from train.inference.acceptance import Guess, next_tokens
from train.inference.drafters import Ask, Drafter, Followed
from train.inference.engine_stats import EngineStats
from train.inference.forward import logits_of, read_tokens, settle
from train.inference.pools import Pools, memory_budget
from train.inference.prefix import PrefixCache
from train.inference.request import Event, Finish, Request, Token
from train.inference.sampling import Draw
from train.inference.thinking import ThinkingWatch
from train.inference.turns import Drawn, OpenText, Turn
from train.model.context import PAGE_TOKENS
from train.model.few_tokens import MOST, FewTokens
from train.native.few_rows import line_sums


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine: texts, tokens and memory."""

    rows: int = 16
    """Largest number of texts that run at once."""
    context_tokens: int = 4096
    """Largest number of tokens of a text, prompt and answer together."""
    memory_bytes: int | None = None
    """Bytes of keys, values and states on this rank; None: enough for `rows` texts of `context_tokens`, or nine tenths of
    the free memory if that is less (on one tensor rank; several ranks must agree)."""
    page_tokens: int = PAGE_TOKENS
    """Tokens of a page of keys and values."""
    step_tokens: int = 512
    """Largest number of tokens read in a step. It limits the memory of a step, and how long a prompt delays the other texts."""
    prefix_blocks: int = 0
    """Number of blocks of prompts whose pages and states are stored for later texts with the same beginning; 0: none."""
    block_tokens: int = 128
    """Tokens of such a block; a multiple of `page_tokens`."""
    draft_tokens: int = 4
    """Largest number of guesses for a text in one step, if the engine has a drafter."""
    is_stepwise: bool = False
    """Read prompts token by token too, as generated tokens are: log-probabilities are then the trainer's (docs/align.md)."""


class InferenceEngine:
    """See the module docstring. `model`: a whole model or this tensor rank's part, of shape `shape`.

    drafter: guesses tokens; the distribution of texts stays the same (`train.inference.acceptance`). fingerprint: identifies
    weights and tokenizer in the keys of the prefix cache. Raises RecipeError if one text of `context_tokens` does not fit into
    `memory_bytes`, where the message names the longest that fits, or if the drafter has other token ids.
    """

    def __init__(
        self,
        model: Any,
        shape: ModelConfig,
        config: EngineConfig | None = None,
        *,
        drafter: Drafter | None = None,
        fingerprint: str = "",
    ) -> None:
        self.model, self.shape = model.eval(), shape
        self.config = config = config or EngineConfig()
        weight = next(model.parameters())
        tensor = model.pg_collection.tp.size()
        draft = drafter.shape if drafter is not None else None
        if drafter is not None:
            _check_drafter(draft, shape, config)
        self.sizes = cache_sizes(
            shape, rows=config.rows, context_tokens=config.context_tokens, page_tokens=config.page_tokens,
            step_tokens=config.step_tokens, snapshots=config.prefix_blocks if "M" in shape.pattern else 0,
            number_bytes=weight.element_size(), tensor=tensor,
            budget_bytes=memory_budget(config.memory_bytes, weight.device, tensor=tensor),
            trial_tokens=config.rows * (1 + config.draft_tokens) if drafter is not None else 0, draft=draft,
        )  # fmt: skip
        self.pools = Pools(shape, self.sizes, dtype=weight.dtype, device=weight.device, tensor=tensor)
        self.drafter = drafter
        if drafter is not None and draft is not None:
            drafter.open(draft_sizes(draft, self.sizes, step_tokens=config.step_tokens), step_tokens=config.step_tokens)
        self.prefixes = PrefixCache(
            self.pools, block_tokens=config.block_tokens, capacity=config.prefix_blocks, root=fingerprint
        )
        self._few = FewTokens(model)
        self._free_rows = list(range(config.rows - 1, -1, -1))
        self._running: list[OpenText] = []
        self._waiting: list[OpenText] = []
        self._texts: dict[int, OpenText] = {}
        self._events: list[Event] = []
        self._next_id = 0
        self._counts = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "preemptions": 0, "steps": 0}
        self._counts |= {"draws": 0, "guessed_tokens": 0, "accepted_tokens": 0}

    # ---- calls of users

    def add(self, request: Request) -> int:
        """Accept a request. -> its id. RecipeError if it is malformed or too long; the message names the limit."""
        self._check(request)
        watch = ThinkingWatch(request.thinking, request.prompt) if request.thinking is not None else None
        scored = request.score_from if request.score_from is not None else len(request.prompt)
        most = self.config.draft_tokens if self.drafter is not None else 0
        if request.draft_tokens is not None:
            most = min(most, request.draft_tokens)
        text = OpenText(
            self._next_id, request, list(request.prompt), watch, scored=scored, most_guesses=most, guesses=most
        )
        self._next_id += 1
        self._texts[text.id] = text
        self._waiting.append(text)
        return text.id

    def cancel(self, id: int) -> None:
        """End a request. Its last event comes with the next step. No effect if it has ended."""
        if id in self._texts:
            self._end(self._texts[id], "cancelled")

    def weights_changed(self) -> None:
        """Call it after the model's weights have changed: the engine has copies of them, and states computed with them."""
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
            self._run(self._guess(batch))
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
        """Start waiting texts, in order, as long as their tokens fit; but not those whose next block is being read, or whose
        prompt: they begin where it ends, in a row that stays free for them."""
        self._waiting.sort(key=lambda text: text.order)
        followers = 0
        for text in list(self._waiting):
            if not self._free_rows and all(other.order <= text.order for other in self._running):
                return
            if self._is_being_read(text):
                continue
            if any(_begins_as(text, other) and other.order < text.order for other in self._running):
                followers += 1
                continue
            if 0 < len(self._free_rows) <= followers:
                continue
            if not self._free_rows:
                self._preempt_for(text)
            if not self._start(text):
                return
            self._waiting.remove(text)
            self._running.append(text)

    def _start(self, text: OpenText) -> bool:
        """Give a text a row, and its blocks in the prefix cache. -> False if its tokens do not fit now."""
        text.row, text.done = self._free_rows[-1], 0
        if self.prefixes.capacity:
            text.done = self.prefixes.adopt(text.row, self._usable_keys(text))
        while not self._has_room(text):
            if not self.prefixes.evict() and not self._preempt_for(text):
                self._drop(text)
                return False
        self._free_rows.remove(text.row)
        self._counts["prompt_tokens"] += len(text.tokens)
        self._counts["cached_tokens"] += text.done
        return True

    def _usable_keys(self, text: OpenText) -> list[bytes]:
        """The keys of the blocks that the text need not read: the token before the next one to draw or to score is read."""
        is_scored = text.scored == len(text.request.prompt)
        self.prefixes.extend_keys(text.keys, text.tokens, len(text.tokens) // self.config.block_tokens)
        return text.keys[: ((len(text.tokens) if is_scored else text.scored) - 1) // self.config.block_tokens]

    def _is_being_read(self, text: OpenText) -> bool:
        """Whether a running text that is served earlier reads the block that this one would begin with: it will be shared."""
        if not self.prefixes.capacity:
            return False
        keys = self._usable_keys(text)
        first = self.prefixes.known(keys)
        return first < len(keys) and any(
            other.order < text.order
            and other.done < (first + 1) * self.config.block_tokens
            and other.keys[first : first + 1] == keys[first : first + 1]
            for other in self._running
        )

    def _has_room(self, text: OpenText) -> bool:
        """Whether all tokens of the text so far fit into free pages; for a window, those of the next step."""
        next_tokens = min(len(text.tokens), text.done + self.config.step_tokens)
        return all(
            group.missing(text.row, next_tokens if group.window else len(text.tokens)) <= group.pages.free
            for group in self.pools.groups.values()
        ) and self._drafter_fits(text, len(text.tokens))

    def _drafter_fits(self, text: OpenText, tokens: int) -> bool:
        return not text.most_guesses or self.drafter is None or self.drafter.fits(text.row, tokens)

    def _fits(self, text: OpenText, tokens: int) -> bool:
        """Whether the first `tokens` tokens of a running text can be stored with the pages that are free."""
        return self.pools.fits(text.row, tokens) and self._drafter_fits(text, tokens)

    def _extend(self, text: OpenText, tokens: int) -> None:
        """Take these pages."""
        self.pools.extend(text.row, tokens)
        if text.most_guesses and self.drafter is not None:
            self.drafter.reserve(text.row, tokens)

    def _drop(self, text: OpenText) -> None:
        """Let go of everything that a text has in the pools."""
        self.pools.drop(text.row)
        if text.most_guesses and self.drafter is not None:
            self.drafter.drop(text.row)
        text.row, text.done = -1, 0

    def _preempt_for(self, text: OpenText) -> bool:
        """Make the running text of the lowest priority wait again, if it is served after `text`. -> whether there was one."""
        last = max(self._running, key=lambda other: other.order, default=None)
        if last is None or last.order <= text.order:
            return False
        self._stop(last)
        self._waiting.append(last)
        self._waiting.sort(key=lambda other: other.order)
        self._counts["preemptions"] += 1
        return True

    def _stop(self, text: OpenText) -> None:
        self._running.remove(text)
        self._free_rows.append(text.row)
        self._drop(text)

    def _end(
        self,
        text: OpenText,
        finish: Finish,
        *,
        message: str = "",
        token: Token | None = None,
        guesses: int | None = None,
    ) -> None:
        if text.row >= 0:
            self._stop(text)
        else:
            self._waiting.remove(text)
        del self._texts[text.id]
        self._events.append(Event(text.id, token, finish, message=message, guesses=guesses))

    # ---- one step

    def _schedule(self) -> list[tuple[OpenText, int]]:
        """(text, number of its tokens to read in this step); texts with one token first. Takes the pages that they need."""
        self._running.sort(key=lambda text: text.order)
        singles: list[tuple[OpenText, int]] = []
        parts: list[tuple[OpenText, int]] = []
        ready = [text for text in list(self._running) if not self._read_ahead(text)]
        for text in [text for text in ready if text.left == 1]:
            if text.row >= 0 and self._take(text, 1):
                singles.append((text, 1))
        budget = self.config.step_tokens - len(singles)
        for text in [text for text in ready if text.left > 1]:
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

    def _read_ahead(self, text: OpenText) -> bool:
        """Let the drafter read the next part of a long prefix that the prefix cache had. -> whether the text waits for it."""
        if not text.most_guesses or self.drafter is None or text.row < 0:
            return False
        lag, size = self.drafter.lag(text.row, text.done), self.config.step_tokens
        if lag <= size:
            return False
        end = text.done - lag + size
        while not self.drafter.fits(text.row, end):
            if not self._preempt_for(text):
                return True
        self.drafter.reserve(text.row, end)
        self.drafter.follow([Followed(text.row, text.tokens, end, None)])
        return True

    def _take(self, text: OpenText, count: int) -> int:
        """Take the pages for the text's next `count` tokens, or for fewer. -> that number; 0 if the text has to wait."""
        if not self._fits(text, text.done + count):
            while not self._fits(text, text.done + 1):
                if not self.prefixes.evict() and not self._preempt_for(text):
                    return 0
            while not self._fits(text, text.done + count):
                count -= 1
        self._extend(text, text.done + count)
        return count

    def _guess(self, batch: list[tuple[OpenText, int]]) -> list[Turn]:
        """Add the drafter's guesses for texts that are read to their end, as far as there is room. -> turns with one token
        come first."""
        turns = [Turn(text, count) for text, count in batch]
        asking = [turn for turn in turns if turn.text.most_guesses and turn.is_drawing]
        if self.drafter is None or not asking:
            return turns
        used = sum(count for _, count in batch)
        # More tokens than MOST are read in another way, which does not pay for guesses.
        most_tokens = MOST if used == len(batch) else self.config.step_tokens
        left, asks = max(0, min(most_tokens, self.config.step_tokens) - used), []
        for place, turn in enumerate(asking):
            text = turn.text
            most = min(text.guesses, self._last_guess(text), left // (len(asking) - place)) if text.left == 1 else 0
            while most and not self._fits(text, len(text.tokens) + most):
                most -= 1
            self._extend(text, len(text.tokens) + most)
            left -= most
            asks.append(Ask(text.row, text.tokens, most, Draw(text.request.sampling, text.generated)))
        for turn, draft in zip(asking, self.drafter.propose(asks), strict=True):
            turn.draft = draft
            self.pools.cut(turn.text.row, turn.text.done + turn.tokens)
        return sorted(turns, key=lambda turn: turn.tokens > 1)

    def _last_guess(self, text: OpenText) -> int:
        """Guesses that make sense: the last token needs none after it, and no text may pass the end of a block unseen."""
        left = text.request.max_new_tokens - text.generated - 1
        if self.prefixes.capacity:
            left = min(left, self.config.block_tokens - text.done % self.config.block_tokens - 1)
        return left

    @torch.no_grad()
    def _run(self, turns: list[Turn]) -> None:
        befores = [turn.text.done for turn in turns]
        reads = [turn.read for turn in turns]
        hidden_TH = read_tokens(self.model, reads, self.pools, few=self._few, is_stepwise=self.config.is_stepwise)
        # Logits are needed before each token to score, and after the last token of a text and each of its guesses.
        lines: list[int] = []
        scoring: list[range] = []
        begin = 0
        for turn in turns:
            text = turn.text
            first = max(text.scored - 1, text.done)
            last = min(text.done + turn.count, len(text.request.prompt) - 1)
            scoring.append(range(len(lines), len(lines) + max(0, last - first)))
            lines += range(begin + first - text.done, begin + last - text.done)
            begin += turn.tokens
        drawing: list[tuple[Turn, range]] = []
        begin = 0
        for turn in turns:
            begin += turn.tokens
            if turn.is_drawing:
                count = 1 + len(turn.draft.tokens)
                drawing.append((turn, range(len(lines), len(lines) + count)))
                lines += range(begin - count, begin)
        logits_NV = logits_of(self.model, _of_lines(hidden_TH, lines), few=self._few)
        best_N, log_sums_N = line_sums(logits_NV)
        is_finite, bad = self._finite(turns, hidden_TH, lines, log_sums_N)
        drawing = [(turn, places) for turn, places in drawing if turn.text not in bad]
        drawing += [(fork, places) for turn, places in drawing for fork in self._forks(turn)]
        drawn = self._draw(drawing, logits_NV, best_N, is_finite)
        self._settle([turn for turn in turns if turn.draft.tokens and turn.text not in bad])
        for turn, places in zip(turns, scoring, strict=True):
            if turn.text in bad:
                continue
            self._advance(turn.text, turn.text.left - 1 if turn.draft.tokens else turn.count)
            if places:
                self._score(turn.text, *(x[places.start : places.stop] for x in (logits_NV, log_sums_N, best_N)))
        if self.drafter is not None:
            parts = hidden_TH.split([turn.tokens for turn in turns])
            self.drafter.follow(
                [
                    Followed(turn.text.row, turn.text.tokens, turn.text.done, part[: turn.text.done - before])
                    for turn, part, before in zip(turns, parts, befores, strict=True)
                    if turn.text.most_guesses and turn.text not in bad
                ]
            )
        for text in bad:
            self._end(text, "error", message=_NOT_FINITE)
        if drawn:
            self._report(drawn, *(_of_lines(x, [one.line for one in drawn]) for x in (logits_NV, log_sums_N, best_N)))
        for turn in turns:
            if turn.text.row >= 0 and not turn.text.left:
                self._end(turn.text, "length")  # the request only scores its prompt

    def _finite(
        self, turns: list[Turn], hidden_TH: torch.Tensor, lines: list[int], log_sums_N: torch.Tensor
    ) -> tuple[list[bool], list[OpenText]]:
        """Whether each line of logits is finite; and the texts whose hidden states or logits contain NaN or infinity, other than
        after a guess."""
        if bool((hidden_TH * 0).sum() + (log_sums_N * 0).sum() == 0):  # NaN and infinity times 0 are NaN
            return [True] * len(lines), []
        finite_T = torch.isfinite(hidden_TH).all(-1)
        finite_N = torch.isfinite(log_sums_N) & finite_T[lines]
        finite_T[lines] &= finite_N
        parts = finite_T.split([turn.tokens for turn in turns])
        bad = [turn.text for turn, part in zip(turns, parts, strict=True) if not bool(part[: turn.count].all())]
        return finite_N.tolist(), bad

    def _draw(
        self, drawing: list[tuple[Turn, range]], logits_NV: torch.Tensor, best_N: torch.Tensor, is_finite: list[bool]
    ) -> list[Drawn]:
        """The next token of each text, and those after it as long as guesses are right. They become part of the texts."""
        draws: list[Draw] = []
        guesses: list[Guess | None] = []
        for turn, places in drawing:
            text, own = turn.text, turn.draft.guesses
            draws += (Draw(text.request.sampling, text.generated + index) for index in range(len(places)))
            guesses += own or [None] * len(places)
        if not draws:
            return []
        all_lines = [line for _, places in drawing for line in places]
        logits_DV, likeliest_D = (_of_lines(x, all_lines) for x in (logits_NV, best_N))
        ids = iter(next_tokens(logits_DV, draws, guesses, likeliest_D).tolist())
        drawn = [one for turn, places in drawing for one in turn.accept(places, [next(ids) for _ in places], is_finite)]
        self._counts["draws"] += len(drawing)
        self._counts["guessed_tokens"] += sum(len(turn.draft.tokens) for turn, _ in drawing)
        self._counts["accepted_tokens"] += sum(one.is_guessed for one in drawn)
        return drawn

    def _forks(self, turn: Turn) -> list[Turn]:
        """Turns of the waiting texts with the prompt that this turn has read to its end: they get copies of its states, and draw
        their first token from the same logits."""
        leader, forks = turn.text, []
        if leader.generated:
            return []
        for text in sorted(self._waiting, key=lambda text: text.order):
            if not self._free_rows or not self.pools.fits_fork:
                break
            if _begins_as(text, leader):
                text.row, text.done = self._free_rows.pop(), len(text.tokens)
                self.pools.fork(leader.row, text.row, text.done)
                self._waiting.remove(text)
                self._running.append(text)
                self._counts["prompt_tokens"] += text.done
                self._counts["cached_tokens"] += text.done
                forks.append(Turn(text, 0))
        return forks

    def _settle(self, trials: list[Turn]) -> None:
        """Take back the guesses that were wrong."""
        if not trials:
            return
        accepted = [turn.text.left - 1 for turn in trials]  # without the token that was drawn last
        settle(self.model, [turn.read for turn in trials], accepted, self.pools)
        for turn, count in zip(trials, accepted, strict=True):
            self.pools.cut(turn.text.row, turn.text.done + count)

    def _advance(self, text: OpenText, count: int) -> None:
        """Count tokens as read, store a block that has just ended, and release pages outside of windows."""
        text.done += count
        blocks, rest = divmod(text.done, self.config.block_tokens)
        if self.prefixes.capacity and not rest:
            self.prefixes.extend_keys(text.keys, text.tokens, blocks)
            self.prefixes.store(text.row, text.keys[:blocks])
        self.pools.slide(text.row, text.done)

    def _score(self, text: OpenText, logits_NV: torch.Tensor, log_sums_N: torch.Tensor, best_N: torch.Tensor) -> None:
        ids = torch.tensor(text.tokens[text.scored : text.scored + len(logits_NV)], device=logits_NV.device)
        tokens = self._tokens(ids, logits_NV, log_sums_N, best_N, tops=[text.request.top_logprobs] * len(ids))
        text.scored += len(tokens)
        self._events.append(Event(text.id, scores=tuple(tokens)))

    def _report(
        self, drawn: list[Drawn], logits_NV: torch.Tensor, log_sums_N: torch.Tensor, best_N: torch.Tensor
    ) -> None:
        """Events of new tokens, drawn from these lines."""
        ids = torch.tensor([max(one.id, 0) for one in drawn], device=logits_NV.device)
        tokens = self._tokens(ids, logits_NV, log_sums_N, best_N, tops=[one.text.request.top_logprobs for one in drawn])
        for one, token in zip(drawn, tokens, strict=True):
            if one.finish == "error":
                self._end(one.text, "error", message=_NOT_FINITE)
                continue
            self._counts["generated_tokens"] += 1
            if one.is_forced or one.is_guessed:
                token = replace(token, is_forced=one.is_forced, is_guessed=one.is_guessed)
            if one.finish is not None:
                self._end(one.text, one.finish, token=token, guesses=one.guesses)
            else:
                self._events.append(Event(one.text.id, token, guesses=one.guesses))

    def _tokens(
        self,
        ids_N: torch.Tensor,
        logits_NV: torch.Tensor,
        log_sums_N: torch.Tensor,
        best_N: torch.Tensor,
        *,
        tops: Sequence[int],
    ) -> list[Token]:
        """The tokens with their log-probabilities."""
        logprobs = (logits_NV.gather(-1, ids_N[:, None])[:, 0] - log_sums_N).tolist()
        likeliest = best_N.tolist()
        most = min(max(tops), self.shape.real_vocab)  # the padding of the vocabulary is no token
        top_ids: list[list[int]] = [[]] * len(likeliest)
        top_values: list[list[float]] = [[]] * len(likeliest)
        if most:
            values, indices = logits_NV[:, : self.shape.real_vocab].topk(most, dim=-1)
            top_ids, top_values = indices.tolist(), (values - log_sums_N[:, None]).tolist()
        return [
            Token(
                id, logprobs[line], tuple(zip(top_ids[line][: tops[line]], top_values[line][: tops[line]], strict=True)),
                is_likeliest=id == likeliest[line],
            )
            for line, id in enumerate(ids_N.tolist())
        ]  # fmt: skip


_NOT_FINITE = "the model's output is not finite (NaN or infinity)"


def _begins_as(text: OpenText, other: OpenText) -> bool:
    """Whether a text that waits can begin where the prompt of the other one ends, which is not read yet, or just now. A drafter
    reads prompts itself; a text with guesses has states that may be taken back; a score needs the logits of its prompt."""
    return not (
        text.generated
        or other.generated
        or max(text.most_guesses, other.most_guesses)
        or text.scored < len(text.tokens)
        or other.scored < len(other.tokens)
        or text.tokens != other.tokens
        or not text.request.max_new_tokens
        or not other.request.max_new_tokens
    )


def _of_lines(x: torch.Tensor, lines: list[int]) -> torch.Tensor:
    """x[lines], without a copy if these are all lines."""
    return x if lines == list(range(len(x))) else x[lines]


def _check_drafter(draft: ModelConfig | None, shape: ModelConfig, config: EngineConfig) -> None:
    if draft is not None and draft.real_vocab != shape.real_vocab:
        raise RecipeError(
            f"the draft model has {draft.real_vocab:,} token ids and the model has {shape.real_vocab:,}. Use a draft model that "
            "was trained with the same tokenizer."
        )
    if config.draft_tokens >= config.step_tokens:
        raise RecipeError(
            f"{config.draft_tokens} guesses and a token do not fit into a step of {config.step_tokens} tokens. Use at most "
            f"{config.step_tokens - 1} guesses."
        )
