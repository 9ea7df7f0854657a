"""The stream of GRPO: each step's microbatches are made of answers that the model draws itself (docs/align.md).

    draw:   prompts --rollout--> answers --judging--> rewards
    begin:  advantages, log p of the reference; answers packed in rows, dealt to the data ranks
    next:   the microbatches of one update; updates_per_batch of them from one batch

The trainer's log p, which is compared with the sampler's (`train.align.log_prob_gap`), comes from the forward pass of the update
if a batch is learned from once and at once, otherwise from a pass of its own after the answers are drawn.

Every rank gets all answers, so that rows do not depend on the layout. The state between two steps is the next prompt's position
and, if answers are left (several updates from a batch, or a batch drawn ahead), those with their numbers: `state`.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.chat.prompts import PromptSet
from data.system.closing import Closing
from recipes.schema.errors import CheckpointError
from recipes.schema.manifest import RunState
from recipes.schema.recipe import Recipe
from train.align.frozen_models import FrozenModels
from train.align.judging import Case, Judges, check_prompts
from train.align.log_prob_gap import GapCheck, gathered
from train.align.losses.policy import group_advantages, without_overlong
from train.align.policy_step import PolicyRows, token_losses
from train.align.rollout import Answer, draw_answers
from train.align.verify.judge import Reward
from train.engine import Engine, live_model, run_schedule
from train.evaluate.deal import evaluating, in_parts, on_all_ranks
from train.evaluate.score import Request, pack, packed_rows
from train.record.telemetry import Telemetry

JOURNAL = "rewards"
"""Folder of the journal of rewards in a run's folder."""
_UNIT_TOKENS = 16
"""Operands in low precision have a multiple of so many rows (Transformer Engine)."""
_SHOWN = 4
"""Answers that are recorded as samples."""
_SHOWN_CHARS = 2000


@dataclass(frozen=True)
class Group:
    """The answers to one prompt and their rewards."""

    position: int
    answers: list[Answer]
    rewards: list[Reward]
    """Those that are learned from."""
    verified: list[Reward]
    """Those of the prompt's verifier; empty without one."""

    @property
    def is_informative(self) -> bool:
        """Whether two rewards differ."""
        return len({reward.value for reward in self.rewards if reward.value is not None}) > 1


@dataclass(frozen=True)
class Drawn:
    """The answers of one batch, group after group, with their numbers."""

    positions: np.ndarray
    """int64 [prompts]"""
    answers: list[Answer]
    rewards: torch.Tensor
    """float64 [prompts, answers of a prompt]; 0 where `valid` is false."""
    valid: torch.Tensor
    """bool: the verifier gave a reward."""
    drawn: list[np.ndarray]
    """float32 [tokens] of each answer: log p when it was drawn, at the temperature of the loss."""
    old: list[np.ndarray]
    """float32: log p of the policy when the batch begins; empty if the forward pass of the update computes it."""
    reference: list[np.ndarray] | None = None


@dataclass(frozen=True)
class Part:
    """The rows of one update."""

    first: int
    """Number of its first answer in the batch."""
    requests: list[Request]
    rows: list[list[int]]
    """Numbers of the answers in each row, from 0 in this part."""


@dataclass
class _Seconds:
    generation: float = 0.0
    judging: float = 0.0


class PolicyStream(Closing):
    """An iterator of microbatches for `train.loop`. Every rank makes the same calls. Use it as a context manager."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        engine: Engine,
        prompts: PromptSet,
        frozen: FrozenModels,
        telemetry: Telemetry,
        folder: Path,
        start: RunState,
        state: dict[str, torch.Tensor],
        oldest_step: Callable[[], int],
    ) -> None:
        """frozen: reference and reward model. folder: of the run. start, state: where the run is, and what its
        checkpoint has of this stream. oldest_step: of the run's checkpoints. Collective over the world. Raises DataError,
        RecipeError, BackendError for a wrong verifier, CheckpointError for a state that cannot be used."""
        self.position = start.position
        """Position of the next prompt to draw answers to."""
        self.step_tokens = 0
        """Tokens of prompts and answers that the last step learned from."""
        self.tokens = start.tokens
        """Those of all steps so far."""
        self._config, self._recipe = recipe.objective.grpo, recipe
        self._engine, self._mesh = engine, engine.mesh
        self._prompts, self._frozen, self._telemetry = prompts, frozen, telemetry
        self._step, self._oldest_step = start.step, oldest_step
        verifiers = check_prompts(prompts.prompts, self._config)
        self._judges = on_all_ranks(self._mesh, lambda: Judges(folder / JOURNAL, self._config, rank=self._mesh.rank))
        # Only rank 0 tries the verifiers: one that cannot be opened is reported before the first step.
        on_all_ranks(self._mesh, lambda: self._judges.try_all(verifiers if self._mesh.rank == 0 else []))
        self._batch: Drawn | None = None
        self._next: Drawn | None = None
        self._parts: list[Part] = []
        self._at = 0
        """Updates made from the batch."""
        config = self._config
        self._is_checked_by_update = (
            config.updates_per_batch == 1 and not config.off_policy_steps and config.temperature == 1
        )
        """Whether the forward pass of the update computes what is compared with the sampler's log p: same weights, same rows."""
        self._check: GapCheck | None = None
        """That of the batch, if the update makes it."""
        self._warned: set[tuple[str, str]] = set()
        """Kinds of verifiers and of their failures that a warning has named."""
        self._restore(state)

    def close(self) -> None:
        """End the verifiers and the process that renders prompts."""
        self._judges.close()
        self._prompts.close()

    def __iter__(self) -> Iterator[list[PolicyRows]]:
        return self

    def __next__(self) -> list[PolicyRows]:
        """This rank's microbatches of the next update. Collective over the world.

        Raises NumericsError if the log-probabilities of sampler and trainer differ by more than the recipe allows, unless the
        update itself checks that (`Engine.check`).
        """
        if self._batch is None or self._at == self._config.updates_per_batch:
            self._begin()
        part = self._parts[self._at % len(self._parts)]
        self._at += 1
        self._step += 1
        return self._microbatches(part)

    # ---- state

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step needs in addition to position and weights, by name; the same on every rank."""
        found: dict[str, torch.Tensor] = {}
        if self._batch is not None and self._at < self._config.updates_per_batch:
            found = {"updates": torch.tensor([self._at])} | _tensors_of(self._batch, "batch")
        if self._next is not None:
            found |= _tensors_of(self._next, "next")
        return found

    def _restore(self, state: dict[str, torch.Tensor]) -> None:
        if "updates" in state:
            self._batch, self._at = _drawn_of(state, "batch"), int(state["updates"][0])
            self._parts = self._parts_of(self._batch)
        if "next.tokens" in state:
            self._next = _drawn_of(state, "next")

    # ---- a batch

    def _begin(self) -> None:
        """Take the next batch; draw it, or the one after it."""
        batch = self._next
        if batch is None:
            batch = self._draw()
        if self._config.off_policy_steps:
            self._next = self._draw()
        self._parts = self._parts_of(batch)
        if self._config.off_policy_steps:
            batch = replace(batch, old=self._log_probs(self._parts, temperature=self._config.temperature))
        if self._frozen.reference is not None:
            batch = replace(batch, reference=self._reference_log_probs())
        self._batch, self._at = batch, 0

    def _draw(self) -> Drawn:
        """Draw a batch with the present weights, judge it, and compare the log-probabilities of sampler and trainer."""
        config, seconds = self._config, _Seconds()
        wanted = config.prompts_per_step * config.updates_per_batch // config.passes_per_batch
        if self._mesh.rank == 0:
            self._judges.forget_before(self._oldest_step())
        model = live_model(self._engine)
        groups: list[Group] = []
        spare: list[Group] = []
        most = wanted * (config.most_prompts if config.dynamic_sampling else 1)
        while len(groups) < wanted and len(groups) + len(spare) < most:
            count = min(wanted - len(groups), most - len(groups) - len(spare))
            first = self.position

            def work(places: range, first: int = first) -> list[Group]:
                return self._groups(model, [first + place for place in places], seconds)

            found = in_parts(self._mesh, count, work)
            self.position += count
            groups += [group for group in found if group.is_informative or not config.dynamic_sampling]
            spare += [group for group in found if config.dynamic_sampling and not group.is_informative]
        everything = groups + spare
        groups = [*groups, *spare[: wanted - len(groups)]]
        drawn = Drawn(
            positions=np.array([group.position for group in groups], dtype=np.int64),
            answers=[answer for group in groups for answer in group.answers],
            rewards=torch.tensor([[r.value or 0.0 for r in g.rewards] for g in groups], dtype=torch.float64),
            valid=torch.tensor([[r.value is not None for r in g.rewards] for g in groups]),
            drawn=[answer.log_probs for group in groups for answer in group.answers],
            old=[],
        )
        check = GapCheck(
            self._recipe, self._mesh, self._telemetry, self._step + 1, drawn.positions, drawn.drawn,
            self._facts(everything, seconds),
        )  # fmt: skip
        self._warn_of_failures(everything)
        self._record_samples(everything)
        if self._is_checked_by_update:
            self._check = check
            return drawn
        began = time.perf_counter()
        parts = self._parts_of(drawn)
        ours = self._log_probs(parts)
        old = ours
        if config.temperature != 1:  # the engine reports log p at temperature 1 only; the trainer's equal them
            old = self._log_probs(parts, temperature=config.temperature)
            drawn = replace(drawn, drawn=old)
        check.event["log_probs_s"] = time.perf_counter() - began
        check.record(ours)
        return replace(drawn, old=old)

    def _groups(self, model: Any, positions: Sequence[int], seconds: "_Seconds") -> list[Group]:
        """This data rank's groups: drawn by its tensor ranks together, judged by verifiers on the first of them."""
        began = time.perf_counter()
        groups = draw_answers(
            model, self._recipe.model, self._prompts, positions, config=self._config, seed=self._recipe.run.seed
        )
        seconds.generation += time.perf_counter() - began
        began = time.perf_counter()
        scored = self._scored(positions, groups)
        if self._mesh.groups.tp.rank() != 0:
            return []  # `in_parts` takes the first tensor rank's
        cases = [
            Case(position, number, prompt, self._text(answer))
            for position, answers in zip(positions, groups, strict=True)
            if (prompt := self._prompts.at(position)).verifier is not None
            for number, answer in enumerate(answers)
        ]
        verified: dict[int, list[Reward]] = {position: [] for position in positions}
        for case, reward in zip(cases, self._judges.rewards(cases, step=self._step), strict=True):
            verified[case.position].append(reward)
        seconds.judging += time.perf_counter() - began
        return [
            Group(position, answers, scored.get(position, verified[position]), verified[position])
            for position, answers in zip(positions, groups, strict=True)
        ]

    def _scored(self, positions: Sequence[int], groups: Sequence[Sequence[Answer]]) -> dict[int, list[Reward]]:
        """Rewards of a reward model by position; empty without one. Collective over the tensor group."""
        if self._frozen.rewards is None or not positions:
            return {}
        texts = [
            (*self._prompts.ids(self._prompts.index_at(position)), *answer.tokens.tolist())
            for position, answers in zip(positions, groups, strict=True)
            for answer in answers
        ]
        different = list(
            dict.fromkeys(texts)
        )  # equal answers must not differ by rounding: they would seem to tell something
        with torch.no_grad():
            scores = self._frozen.rewards.scores([list(text) for text in different])
        value_of = dict(zip(different, scores, strict=True))
        values = (value_of[text] for text in texts)
        wrong = "the reward model gave a number that is not finite"
        return {
            position: [
                Reward(value) if math.isfinite(value := next(values)) else Reward(None, wrong, "not a number")
                for _ in answers
            ]
            for position, answers in zip(positions, groups, strict=True)
        }

    def _text(self, answer: Answer) -> str:
        """What verifiers read: special tokens by their names, without the one that ended the answer."""
        return self._prompts.tokenizer.decode_all(answer.tokens[: len(answer.tokens) - answer.ended].tolist())

    # ---- rows

    def _parts_of(self, drawn: Drawn) -> list[Part]:
        """The rows of each part of a batch."""
        count = self._config.generations_per_prompt
        each = self._config.prompts_per_step * count
        parts = []
        for first in range(0, len(drawn.answers), each):
            requests = []
            for number, answer in enumerate(drawn.answers[first : first + each], start=first):
                prompt = self._prompts.ids(self._prompts.index_at(int(drawn.positions[number // count])))
                requests.append(Request(tuple(prompt), tuple(answer.tokens.tolist())))
            parts.append(Part(first, requests, pack(requests, row_tokens=self._engine.row_tokens, is_shared=True)))
        return parts

    def _dealt(self, part: Part) -> list[list[list[int]]]:
        """This rank's microbatches: the answers in each of their rows. Every rank has the same number of microbatches, of about
        the same number of rows; a rank without a row gets an empty one."""
        ranks = self._mesh.layout.data
        microbatches = -(-len(part.rows) // (ranks * self._engine.microbatch_rows))
        mine = part.rows[self._mesh.data_rank :: ranks]
        return [mine[number::microbatches] or [[]] for number in range(microbatches)]

    def _row_tokens(self, rows: list[list[int]], requests: list[Request]) -> int:
        """Length of a microbatch's rows: of the longest one, as a multiple of what tensor ranks and kernels divide it by."""
        longest = max(sum(len(requests[n].context) + len(requests[n].target) - 1 for n in row) for row in rows)
        unit = _UNIT_TOKENS * self._mesh.layout.tensor
        return min(self._engine.row_tokens, max(1, -(-longest // unit)) * unit)

    def _microbatches(self, part: Part) -> list[PolicyRows]:
        config, batch = self._config, self._batch
        assert batch is not None, "a batch has begun"
        dealt = self._dealt(part)
        each = slice(part.first, part.first + len(part.requests))
        advantages = group_advantages(
            batch.rewards,
            valid_PG=batch.valid,
            leave_one_out=config.advantage == "leave_one_out",
            normalize=config.normalize,
        ).reshape(-1)[each]
        counts = [
            len(answer.tokens) if answer.ended or not config.mask_overlong else 0 for answer in batch.answers[each]
        ]
        self.step_tokens = sum(len(request.context) + len(request.target) - 1 for request in part.requests)
        self.tokens += self.step_tokens
        return [
            self._policy_rows(
                rows, part, batch, advantages, step_tokens=sum(counts), step_answers=sum(count > 0 for count in counts),
                scale=len(dealt) * self._mesh.layout.data,
            )
            for rows in dealt
        ]  # fmt: skip

    def _policy_rows(
        self, rows: list[list[int]], part: Part, batch: Drawn, advantages: torch.Tensor, *, step_tokens: int,
        step_answers: int, scale: int,
    ) -> PolicyRows:  # fmt: skip
        length = self._row_tokens(rows, part.requests)
        packed = packed_rows(rows, part.requests, length)
        numbers = [number for row in rows for number in row]
        places, mask = _places(rows, part.requests, length)
        ended = torch.tensor([batch.answers[part.first + number].ended for number in numbers], dtype=torch.bool)

        def padded(values: list[np.ndarray]) -> torch.Tensor:
            result = torch.zeros(mask.shape)
            for line, number in enumerate(numbers):
                own = values[part.first + number]
                result[line, : len(own)] = torch.from_numpy(own)
            return result

        return PolicyRows(
            tokens=packed.tokens, labels=packed.labels, document_index=packed.document_index, places=places,
            mask=without_overlong(mask, ended) if self._config.mask_overlong else mask,
            advantages=advantages[numbers].float(), old=padded(batch.old) if batch.old else None, drawn=padded(batch.drawn),
            reference=padded(batch.reference) if batch.reference is not None else None,
            step_tokens=step_tokens, step_answers=step_answers, scale=scale, numbers=[part.first + n for n in numbers],
            check=self._check,
        )  # fmt: skip

    # ---- log-probabilities

    def _log_probs(self, parts: Sequence[Part], *, temperature: float = 1.0) -> list[np.ndarray]:
        """log p of every token of every answer by the model that trains, in the rows in which it trains on them: float32
        [tokens] each, on every rank. Collective over the world."""

        def step(microbatches: Any, model: torch.nn.Module) -> Any:
            losses = token_losses(model, next(microbatches), mesh=self._mesh, temperature=temperature)
            return losses, lambda nats: (nats.sum(), nats)

        def run(batches: list[Any]) -> list[torch.Tensor]:
            return run_schedule(self._engine, batches, forward_step=step, forward_only=True)

        with evaluating(self._engine.chunks):
            return self._gathered(parts, run)

    def _reference_log_probs(self) -> list[np.ndarray]:
        def run(batches: list[Any]) -> list[torch.Tensor]:
            temperature = self._config.temperature
            return [
                token_losses(self._frozen.reference, one, mesh=self._mesh, temperature=temperature) for one in batches
            ]

        with torch.no_grad():
            return self._gathered(self._parts, run)

    def _gathered(self, parts: Sequence[Part], run: Callable[[list[Any]], list[torch.Tensor]]) -> list[np.ndarray]:
        """run: nats of every label of this rank's microbatches."""
        mine: dict[int, np.ndarray] = {}
        for part in parts:
            dealt = self._dealt(part)
            lengths = [self._row_tokens(rows, part.requests) for rows in dealt]
            found = run([packed_rows(rows, part.requests, n) for rows, n in zip(dealt, lengths, strict=True)])
            for rows, length, nats in zip(dealt, lengths, found, strict=True):
                places, mask = _places(rows, part.requests, length)
                flat = -nats.float().reshape(-1).cpu()
                numbers = [number for row in rows for number in row]
                for line, number in enumerate(numbers):
                    mine[part.first + number] = flat[places[line][mask[line]]].numpy()
        return gathered(self._mesh, mine)

    # ---- telemetry

    def _facts(self, groups: list[Group], seconds: "_Seconds") -> dict[str, Any]:
        """What is recorded about a batch (`docs/align.md` lists the fields) except what its log-probabilities tell."""
        answers = [answer for group in groups for answer in group.answers]
        rewards = [reward for group in groups for reward in group.rewards]
        values = [reward.value for reward in rewards if reward.value is not None]
        lengths = [len(answer.tokens) for answer in answers]
        return {
            "prompts": len(groups),
            "answers": len(answers),
            "reward_mean": _mean(values),
            "reward_std": float(np.std(values)) if values else None,
            "verifiers": self._verifiers(groups),
            "informative": sum(group.is_informative for group in groups) / len(groups),
            "answer_tokens_mean": float(np.mean(lengths)),
            "answer_tokens_max": max(lengths),
            "ended": sum(answer.ended for answer in answers) / len(answers),
            "generated_tokens": sum(lengths),
            "generation_s": seconds.generation,
            "judging_s": seconds.judging,
            "log_probs_s": 0.0,
        }

    def _record_samples(self, groups: list[Group]) -> None:
        every = self._config.samples_every_steps
        if every and (self._step % every == 0 or self._step + self._config.updates_per_batch >= self._recipe.run.steps):
            self._telemetry.event("rollout_samples", step=self._step + 1, samples=self._samples(groups))

    def _verifiers(self, groups: list[Group]) -> dict[str, dict[str, Any]]:
        """By kind of verifier: answers, how many got the highest reward, their mean reward, and failures by what happened."""
        rewards: dict[str, list[Reward]] = defaultdict(list)
        passed: Counter[str] = Counter()
        for group in groups:
            verifier = self._prompts.at(group.position).verifier
            if verifier is not None:
                kind, high = str(verifier["kind"]), float(verifier.get("high", 1.0))
                rewards[kind] += group.verified
                passed[kind] += sum(one.value is not None and one.value >= high for one in group.verified)
        return {
            kind: {
                "answers": len(some),
                "passed": passed[kind],
                "reward_mean": _mean([one.value for one in some if one.value is not None]),
                "failures": dict(Counter(one.what for one in some if one.what)),
            }
            for kind, some in sorted(rewards.items())
        }

    def _warn_of_failures(self, groups: list[Group]) -> None:
        """A warning at the first failure of each kind: a verifier that always fails would leave nothing to learn from."""
        failures: dict[tuple[str, str], list[tuple[int, Reward]]] = defaultdict(list)
        for group in groups:
            verifier = self._prompts.at(group.position).verifier or {}
            for reward in group.verified:
                if reward.what:
                    failures[str(verifier["kind"]), reward.what].append((group.position, reward))
        for key, found in failures.items():
            if key in self._warned:
                continue
            self._warned.add(key)
            position, reward = found[0]
            answers = sum(len(group.verified) for group in groups)
            self._telemetry.event(
                "warning",
                step=self._step + 1,
                text=f"step {self._step + 1:,}: {len(found):,} of {answers:,} answers have no reward, such as one to the prompt "
                f"of {self._prompts.at(position).place}: {reward.failure}. Correct the prompt or the verifier if this is not "
                f"meant. Later failures of this kind are only counted in metrics.jsonl.",
            )

    def _samples(self, groups: list[Group]) -> list[dict[str, Any]]:
        """The first answer of some groups, as texts."""
        return [
            {
                "prompt": self._prompts.at(group.position).text[:_SHOWN_CHARS],
                "answer": self._text(group.answers[0])[:_SHOWN_CHARS],
                "reward": group.rewards[0].value,
                "failure": group.rewards[0].failure,
                "verified": group.verified[0].value if group.verified else None,
            }
            for group in groups[:_SHOWN]
        ]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _places(rows: list[list[int]], requests: list[Request], row_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(places [B, T] int64, mask [B, T]) of the tokens of each answer among the labels of all rows."""
    spans = []
    for place, row in enumerate(rows):
        stop = place * row_tokens
        for number in row:
            stop += len(requests[number].context) + len(requests[number].target) - 1
            spans.append((stop - len(requests[number].target), stop))
    longest = max((stop - start for start, stop in spans), default=1)
    starts = torch.tensor([start for start, _ in spans], dtype=torch.int64)[:, None]
    stops = torch.tensor([stop for _, stop in spans], dtype=torch.int64)[:, None]
    places = starts + torch.arange(longest)
    mask = places < stops
    return torch.where(mask, places, starts), mask


def _tensors_of(drawn: Drawn, name: str) -> dict[str, torch.Tensor]:
    """A batch as tensors of one dimension."""
    sizes = [len(answer.tokens) for answer in drawn.answers]
    values = {
        "positions": torch.from_numpy(drawn.positions),
        "sizes": torch.tensor(sizes),
        "tokens": torch.from_numpy(np.concatenate([answer.tokens for answer in drawn.answers])),
        "ended": torch.tensor([answer.ended for answer in drawn.answers], dtype=torch.uint8),
        "rewards": drawn.rewards.reshape(-1),
        "valid": drawn.valid.reshape(-1).to(torch.uint8),
        "drawn": torch.from_numpy(np.concatenate(drawn.drawn)),
        "old": torch.from_numpy(np.concatenate(drawn.old)),
    }
    if drawn.reference is not None:
        values["reference"] = torch.from_numpy(np.concatenate(drawn.reference))
    return {f"{name}.{key}": value.contiguous() for key, value in values.items()}


def _drawn_of(state: dict[str, torch.Tensor], name: str) -> Drawn:
    """The inverse of `_tensors_of`."""
    values = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    try:
        sizes = values["sizes"].tolist()
        each = {
            key: np.split(values[key].numpy(), np.cumsum(sizes)[:-1])
            for key in ("tokens", "drawn", "old", "reference")
            if key in values
        }
        shape = (len(values["positions"]), -1)
        answers = [
            Answer(tokens, drawn, bool(ended))
            for tokens, drawn, ended in zip(each["tokens"], each["drawn"], values["ended"].tolist(), strict=True)
        ]
        return Drawn(
            positions=values["positions"].numpy(), answers=answers, rewards=values["rewards"].view(shape),
            valid=values["valid"].view(shape).bool(), drawn=each["drawn"], old=each["old"], reference=each.get("reference"),
        )  # fmt: skip
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the answers in the checkpoint cannot be used: {error}") from error
