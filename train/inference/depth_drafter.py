"""Guesses by the model's own further depths (`model.mtp`): depth k guesses the k-th token after the next one.

    tokens      t_0 ... t_n-1, the last not read yet      hidden states h_0 ... h_n-2 of the model, from `follow`
    depth k     reads (state of depth k - 1 at i, token i + k) for each i <= n - 2, and guesses token n - 1 + k from the last

The last k - 1 of these tokens are guesses themselves: they are read again when they are final. Each depth has keys, values and
Mamba-2 states of its own. A guess is a token without a distribution, so texts are those without speculation (`acceptance`).
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from launch.plan.cost.inference import CacheSizes
from recipes.schema.model import ModelConfig
from recipes.schema.mtp import MtpConfig
from train.inference.drafters import Ask, Draft, Drafter, Followed
from train.inference.forward import Read, logits_of, pack
from train.inference.pools import Pools
from train.model.context import RowContext


@dataclass
class _Text:
    """What the depths have of a text, from its first token whose hidden state is known (a cached prefix has none)."""

    begin: int
    """Number of tokens before it."""
    states: list[torch.Tensor]
    """For each depth: final states of the depth before it that it has not read yet, [positions, hidden]."""
    done: list[int]
    """For each depth: number of positions that it has read with final tokens."""

    @property
    def end(self) -> int:
        """Number of tokens of the text whose hidden states are known."""
        return self.begin + self.done[0] + len(self.states[0])


class DepthDrafter(Drafter):
    """model: the model that generates, or this tensor rank's part; config: its shape, with further depths."""

    def __init__(self, model: Any, config: ModelConfig) -> None:
        self._model, self._depths, self._vocab = model, config.mtp.depths, config.real_vocab
        self._layers = len(config.mtp.pattern)
        self.shape: ModelConfig = replace(config, pattern=config.mtp.pattern * self._depths, mtp=MtpConfig())
        self._texts: dict[int, _Text] = {}

    def open(self, sizes: CacheSizes, *, step_tokens: int) -> None:
        weight, tensor = next(self._model.parameters()), self._model.pg_collection.tp.size()
        self.pools = Pools(self.shape, sizes, dtype=weight.dtype, device=weight.device, tensor=tensor)
        self._of_depth = [self._pools_of(depth) for depth in range(self._depths)]

    def _pools_of(self, depth: int) -> Pools:
        """The pools with the layers of one depth only, numbered from 1 as in the model."""
        view, before = copy(self.pools), depth * self._layers
        numbers = range(1, self._layers + 1)
        view.keys = {n: self.pools.keys[before + n] for n in numbers if before + n in self.pools.keys}
        view.states = {n: self.pools.states[before + n] for n in numbers if before + n in self.pools.states}
        return view

    def fits(self, row: int, tokens: int) -> bool:
        group = self.pools.groups.get("*")  # each row has separate pages for windows
        return group is None or group.missing(row, tokens) <= group.pages.free

    def reserve(self, row: int, tokens: int) -> None:
        if "*" in self.pools.groups:
            self.pools.groups["*"].extend(row, tokens)

    def drop(self, row: int) -> None:
        self.pools.drop(row)
        self._texts.pop(row, None)

    def bytes(self) -> int:
        return self.pools.bytes().total

    @torch.no_grad()
    def follow(self, texts: Sequence[Followed]) -> None:
        parts = []
        for text in texts:
            if text.hidden_TH is None or not len(text.hidden_TH):
                continue
            known = self._texts.get(text.row)
            begin = text.end - len(text.hidden_TH)
            if known is None or known.end != begin:
                none = text.hidden_TH[:0]
                self._texts[text.row] = known = _Text(begin, [none] * self._depths, [0] * self._depths)
            known.states[0] = torch.cat([known.states[0], text.hidden_TH])
            if text.end < len(text.tokens) - 1:  # `propose` reads the last tokens of a text, together with later ones
                parts.append((text.row, text.tokens))
        for depth in range(self._depths):
            self._read_final(depth, [(row, tokens, known) for row, tokens in parts if (known := self._texts[row])])

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        guesses: list[list[int]] = [[] for _ in asks]
        trial: list[torch.Tensor] = [torch.empty(0)] * len(asks)
        """States of the depth before at positions whose tokens are guesses."""
        for depth in range(min(self._depths, max((ask.most for ask in asks), default=0))):
            going = [
                place
                for place, ask in enumerate(asks)
                if ask.most > depth == len(guesses[place])
                and (text := self._texts.get(ask.row)) is not None
                and text.end == len(ask.tokens) - 1
                and text.end - text.begin > depth
            ]
            if not going:
                break
            last = self._read_final(depth, [(asks[p].row, asks[p].tokens, self._texts[asks[p].row]) for p in going])
            going = [place for place in going if depth or asks[place].row in last]
            if depth:
                last = self._read_trial(depth, [(asks[p], guesses[p], trial[p]) for p in going], going, trial)
            else:
                for place in going:
                    trial[place] = last[asks[place].row][:0]
            heads = torch.stack([last[asks[place].row][-1] for place in going])
            ids = logits_of(self._model, heads)[:, : self._vocab].argmax(-1).tolist()
            for place, id in zip(going, ids, strict=True):
                guesses[place].append(id)
        return [Draft(tuple(found)) for found in guesses]

    def _read_final(self, depth: int, texts: Sequence[tuple[int, Sequence[int], _Text]]) -> dict[int, torch.Tensor]:
        """Let a depth read all positions whose tokens are final. -> its new states, by row."""
        reads, states = [], []
        for row, tokens, text in texts:
            done = text.done[depth]
            # Position i needs token i + depth + 1.
            count = min(len(text.states[depth]), len(tokens) - depth - 1 - text.begin - done)
            if count > 0:
                first = text.begin + done + depth + 1
                reads.append(Read(row, tokens[first : first + count], done))
                states.append(text.states[depth][:count])
        found = self._read(depth, reads, states)
        for row, _tokens, text in texts:
            new = found.get(row)
            if new is None:
                continue
            text.states[depth] = text.states[depth][len(new) :]
            text.done[depth] += len(new)
            if depth + 1 < self._depths:
                text.states[depth + 1] = torch.cat([text.states[depth + 1], new])
            self.pools.slide(row, text.done[-1])
        return found

    def _read_trial(
        self,
        depth: int,
        texts: Sequence[tuple[Ask, list[int], torch.Tensor]],
        places: Sequence[int],
        trial: list[torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        """Let a depth read the positions whose tokens are guesses, and forget them. -> its states there, by row."""
        pools, rows = self._of_depth[depth], [ask.row for ask, _, _ in texts]
        snapshots = [pools.snapshot_slot(row) for row in rows]
        if pools.states:
            pools.copy_states(rows, snapshots)
        reads, states = [], []
        for ask, found, before in texts:
            text = self._texts[ask.row]
            reads.append(Read(ask.row, found[:depth], text.done[depth]))
            states.append(torch.cat([text.states[depth], before])[:depth])
        new = self._read(depth, reads, states)
        if pools.states:
            pools.copy_states(snapshots, rows)
        for place, (ask, _, _) in zip(places, texts, strict=True):
            trial[place] = new[ask.row]
        return new

    def _read(self, depth: int, reads: list[Read], states: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """One pass of a depth over tokens of several texts and the states of the depth before. -> its states, by row."""
        if not reads:
            return {}
        order = sorted(range(len(reads)), key=lambda place: len(reads[place].tokens) > 1)
        reads, states = [reads[place] for place in order], [states[place] for place in order]
        for read in reads:
            self.pools.extend(read.row, read.before + len(read.tokens))
        pools = self._of_depth[depth]
        tokens_1T, segments = pack(reads, pools, device=pools.device)
        embedded = self._model.embedding(input_ids=tokens_1T, position_ids=segments.positions_T[None])
        hidden = torch.cat(states)[:, None]
        new = self._model.depth(depth).further(hidden, embedded, context=RowContext(segments=segments))[:, 0]
        parts = new.split([len(read.tokens) for read in reads])
        return {read.row: part for read, part in zip(reads, parts, strict=True)}
