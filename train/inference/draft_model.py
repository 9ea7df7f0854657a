"""A small model that guesses for a large one. It has the same tokenizer, and separate caches in the engine's memory.

    texts --read new tokens--> states --copied--> one guess after the other, each read --states copied back-->

Under tensor parallelism it is split like the large model.
"""

from collections.abc import Sequence
from typing import Any

import torch

from launch.plan.cost.inference import CacheSizes
from recipes.schema.model import ModelConfig
from train.inference.acceptance import Guess
from train.inference.drafters import Ask, Draft, Drafter, Followed
from train.inference.forward import Read, logits_of, read_tokens
from train.inference.pools import Pools
from train.inference.sampling import Draw, distribution, draw_from, uniforms
from train.model.few_tokens import FewTokens


class DraftModel(Drafter):
    """model: a whole model, or this tensor rank's part, in the number format of the large one; shape: its shape."""

    def __init__(self, model: Any, shape: ModelConfig) -> None:
        self.shape: ModelConfig = shape
        self._model = model.eval()
        self._few = FewTokens(model)
        self._done: dict[int, int] = {}
        """By row: number of final tokens that were read."""

    def open(self, sizes: CacheSizes, *, step_tokens: int) -> None:
        weight, tensor = next(self._model.parameters()), self._model.pg_collection.tp.size()
        self.pools = Pools(self.shape, sizes, dtype=weight.dtype, device=weight.device, tensor=tensor)
        self._step_tokens = step_tokens

    def lag(self, row: int, tokens: int) -> int:
        return tokens - self._done.get(row, 0)

    def fits(self, row: int, tokens: int) -> bool:
        group = self.pools.groups.get("*")  # each row has separate pages for windows
        return group is None or group.missing(row, tokens) <= group.pages.free

    def reserve(self, row: int, tokens: int) -> None:
        if "*" in self.pools.groups:
            self.pools.groups["*"].extend(row, tokens)

    def drop(self, row: int) -> None:
        self.pools.drop(row)
        self._done.pop(row, None)

    def bytes(self) -> int:
        return self.pools.bytes().total

    @torch.no_grad()
    def follow(self, texts: Sequence[Followed]) -> None:
        # Parts of prompts. `propose` reads the last tokens, together with later ones.
        parts = [text for text in texts if text.end < len(text.tokens) - 1 and self.lag(text.row, text.end) > 0]
        self._catch_up([(text.row, text.tokens, text.end) for text in parts])

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        found: list[list[Guess]] = [[] for _ in asks]
        # A greedy text without guesses needs no distribution.
        first = [place for place, ask in enumerate(asks) if ask.most or ask.draw.sampling.temperature > 0]
        if not first:
            return [Draft() for _ in asks]
        hidden = self._catch_up([(asks[place].row, asks[place].tokens, len(asks[place].tokens)) for place in first])
        self._guess(asks, first, torch.stack(hidden), found)
        going = [place for place, ask in enumerate(asks) if ask.most]
        rows = [asks[place].row for place in going]
        if going and self.pools.states:
            self.pools.copy_states(rows, [self.pools.snapshot_slot(row) for row in rows])
        for index in range(max((ask.most for ask in asks), default=0)):
            # The token after the last guess has a distribution too, unless nothing is drawn from it.
            active = [
                place for place in going if index < asks[place].most - (asks[place].draw.sampling.temperature == 0)
            ]
            if not active:
                break
            reads = []
            for place in active:
                ask = asks[place]
                self.pools.extend(ask.row, len(ask.tokens) + index + 1)
                reads.append(Read(ask.row, [found[place][index].id], len(ask.tokens) + index))
            self._guess(asks, active, read_tokens(self._model, reads, self.pools, few=self._few), found)
        if going and self.pools.states:
            self.pools.copy_states([self.pools.snapshot_slot(row) for row in rows], rows)
        return [
            Draft(tuple(guess.id for guess in guesses[: ask.most]), tuple(guesses) if len(guesses) > ask.most else ())
            for ask, guesses in zip(asks, found, strict=True)
        ]

    def _guess(
        self, asks: Sequence[Ask], active: Sequence[int], hidden_NH: torch.Tensor, found: list[list[Guess]]
    ) -> None:
        """One more guess for each active text, from the hidden state of its last token."""
        logits = logits_of(self._model, hidden_NH, few=self._few)[:, : self.shape.real_vocab]
        # If the draft model's output is not finite, the guess is random: the large model decides.
        logits = logits.masked_fill(~torch.isfinite(logits.logsumexp(-1, keepdim=True)), 0.0)
        likeliest = logits.argmax(-1).tolist()
        samplings = [asks[place].draw.sampling for place in active]
        warm = [line for line, sampling in enumerate(samplings) if sampling.temperature > 0]
        draws = [Draw(samplings[line], asks[active[line]].draw.number + len(found[active[line]])) for line in warm]
        drawn: dict[int, Guess] = {}
        if warm:
            q = distribution(logits[warm], draws)
            ids = draw_from(q, uniforms(draws, q.device, " guess")).tolist()
            drawn = {line: Guess(id, line_q) for line, id, line_q in zip(warm, ids, q, strict=True)}
        for line, place in enumerate(active):
            found[place].append(drawn[line] if line in drawn else Guess(likeliest[line], logits.new_empty(0)))

    def _catch_up(self, texts: Sequence[tuple[int, Sequence[int], int]]) -> list[torch.Tensor]:
        """Read final tokens (row, tokens, end), at least one of each text. -> hidden states after the last token of each."""
        last: dict[int, torch.Tensor] = {}
        left = {place: end - self._done.get(row, 0) for place, (row, _, end) in enumerate(texts)}
        assert all(count > 0 for count in left.values()), "a text without new tokens"
        while any(left.values()):
            budget, parts = self._step_tokens, []
            for place, count in sorted(left.items(), key=lambda pair: pair[1]):
                if count and budget:
                    parts.append((place, min(count, budget)))
                    budget -= parts[-1][1]
            parts.sort(key=lambda part: part[1] > 1)
            reads = []
            for place, count in parts:
                row, tokens, _ = texts[place]
                done = self._done.get(row, 0)
                self.pools.extend(row, done + count)
                reads.append(Read(row, tokens[done : done + count], done))
            hidden = read_tokens(self._model, reads, self.pools, few=self._few)
            for (place, count), part in zip(parts, hidden.split([count for _, count in parts]), strict=True):
                row = texts[place][0]
                left[place] -= count
                last[place] = part[-1]
                self._done[row] = self._done.get(row, 0) + count
                self.pools.slide(row, self._done[row])
        return [last[place] for place in range(len(texts))]
