"""Rewards of answers, and their journal: a verifier's time limit depends on the clock, and a resumed run must not.

    answers --Judge of each verifier (train.align.verify), child processes--> rewards --> rewards/step_00000012.00000.jsonl

Before the weights change, the rewards of a batch are on disk. A run that was killed draws the same answers again and takes their
rewards from the journal. An entry's key covers the place of the answer in the run, its text, the prompt and the verifier, so an
answer that differs from its entry is judged again. Entries older than every checkpoint are deleted.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat.prompts import Prompt
from data.system.closing import Closing
from recipes.schema.align import GrpoConfig
from recipes.schema.errors import BackendError, DataError, RecipeError
from recipes.schema.foreign import parse_json, printable
from train.align.verify.judge import Judge, Limits, Reward
from train.align.verify.sample import Sample
from train.align.verify.verifier import check_facts, check_verifier

_MOST_JUDGES = 8
"""Verifiers whose processes are kept between batches."""


@dataclass(frozen=True)
class Case:
    """An answer to be judged."""

    position: int
    """Of the prompt in the run."""
    number: int
    """Of the answer in its group."""
    prompt: Prompt
    """With a verifier."""
    answer: str

    @property
    def key(self) -> str:
        """Identity in the journal."""
        parts = [self.position, self.number, self.prompt.text, self.answer, self.prompt.verifier, self.prompt.facts]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_prompts(prompts: Sequence[Prompt], config: GrpoConfig) -> list[dict[str, Any]]:
    """Check the verifiers of all prompts, and the facts that they need, without starting them. -> the different ones. DataError
    names file and line; RecipeError for a function that the recipe does not allow."""
    found: dict[str, dict[str, Any]] = {}
    for prompt in prompts:
        if prompt.verifier is None:
            if config.reward_model is None:
                raise DataError(
                    f'{prompt.place}: the prompt has no verifier. Add one, such as {{"kind": "number"}}, or set '
                    f"objective.grpo.reward_model."
                )
            continue
        text = _text_of(prompt.verifier)
        try:
            kind = check_verifier(prompt.verifier)
            check_facts(kind, Sample(prompt.text, "", prompt.facts))
        except DataError as error:
            raise DataError(f"{prompt.place}: {error}") from error
        if text in found:
            continue
        if kind == "function" and prompt.verifier["name"] not in config.allowed_functions:
            name = printable(str(prompt.verifier["name"]), most=100)
            raise RecipeError(
                f"{prompt.place}: the verifier {name} is code that would run with your rights, and "
                f"objective.grpo.allowed_functions={list(config.allowed_functions)} does not name it. If you trust it, add it."
            )
        found[text] = prompt.verifier
    return list(found.values())


class Judges(Closing):
    """The verifiers of one rank and its journal. Use it as a context manager: at the end their processes are gone."""

    def __init__(self, folder: Path, config: GrpoConfig, *, rank: int) -> None:
        """folder: of the journal, shared by all ranks."""
        self._folder, self._config, self._rank = folder, config, rank
        self._limits = Limits(seconds=config.verifier_seconds, memory_bytes=int(config.verifier_gib * 2**30))
        self._judges: dict[str, Judge] = {}
        self._known = dict(_entries(folder))

    def close(self) -> None:
        """End all verifiers."""
        for judge in self._judges.values():
            judge.close()
        self._judges.clear()

    def try_all(self, verifiers: Sequence[dict[str, Any]]) -> None:
        """Start each verifier once, so that one that cannot be opened is reported now. Errors: see `rewards`."""
        for verifier in verifiers:
            self._judge(_text_of(verifier), verifier)

    def rewards(self, cases: Sequence[Case], *, step: int) -> list[Reward]:
        """The reward of each answer, in order, from the journal if it is there. They are on disk when this returns.

        step: finished steps. A verifier that cannot be started is a failure of its answers; `try_all` reports it before step 1.
        Raises DataError if the journal cannot be written.
        """
        found = {place: self._known[case.key] for place, case in enumerate(cases) if case.key in self._known}
        todo: dict[str, list[int]] = {}
        for place, case in enumerate(cases):
            if place not in found:
                todo.setdefault(_text_of(case.prompt.verifier), []).append(place)
        left_s = self._config.verifier_lost_seconds
        for text, places in todo.items():
            rewards, lost_s = self._rewards(text, [cases[i] for i in places], left_s)
            left_s -= lost_s
            self._write([(cases[i], reward) for i, reward in zip(places, rewards, strict=True)], step)
            found |= dict(zip(places, rewards, strict=True))
        return [found[place] for place in range(len(cases))]

    def forget_before(self, step: int) -> None:
        """Delete the journal of steps before `step`: no checkpoint is that old. Called on one rank."""
        for path in self._folder.glob("step_*.jsonl") if self._folder.is_dir() else ():
            number = path.name[5:13]
            if number.isdecimal() and int(number) < step:
                with suppress(OSError):
                    path.unlink()

    def _rewards(self, text: str, cases: Sequence[Case], left_s: float) -> tuple[list[Reward], float]:
        """(rewards of the answers that one verifier judges, seconds lost as it hung or ended). left_s: of those seconds."""
        verifier = cases[0].prompt.verifier or {}
        if left_s <= 0 and text not in self._judges:
            why = f"verifier {verifier['kind']} was not started, because others hung or ended in this batch"
            return [Reward(None, why, "not judged")] * len(cases), 0.0
        try:
            judge = self._judge(text, verifier)
        except (DataError, BackendError) as error:
            why = f"verifier {verifier['kind']} did not start: {error}"
            return [Reward(None, why, "did not start")] * len(cases), 0.0
        before_s = judge.lost_s
        samples = [Sample(case.prompt.text, case.answer, case.prompt.facts) for case in cases]
        return judge.rewards(samples, lost_seconds=left_s), judge.lost_s - before_s

    def _judge(self, text: str, verifier: dict[str, Any]) -> Judge:
        judge = self._judges.pop(text, None)
        if judge is None:
            while len(self._judges) >= _MOST_JUDGES:
                self._judges.pop(next(iter(self._judges))).close()
            # Which functions may run was checked when the prompts were opened (`check_prompts`).
            judge = Judge(
                verifier, run_code=verifier.get("name") in self._config.allowed_functions, limits=self._limits
            )
        self._judges[text] = judge  # the last one in order of use
        return judge

    def _write(self, judged: list[tuple[Case, Reward]], step: int) -> None:
        path = self._folder / f"step_{step:08d}.{self._rank:05d}.jsonl"
        lines = "".join(
            json.dumps({"key": case.key, "value": reward.value, "failure": reward.failure, "what": reward.what}) + "\n"
            for case, reward in judged
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                stream.write(b"\n" * bool(stream.tell()) + lines.encode())  # a kill may have cut the last line short
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}. Free some space.") from error


def _entries(folder: Path) -> Iterator[tuple[str, Reward]]:
    """(key, reward) of every readable line of the journal; answers of damaged lines are judged again."""
    for path in sorted(folder.glob("step_*.jsonl")) if folder.is_dir() else ():
        if not path.is_file():
            continue
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}. Make it readable.") from error
        for line in lines:
            with suppress(ValueError, TypeError, KeyError):
                plain = parse_json(line.decode())
                value, failure, what = plain["value"], plain["failure"], plain["what"]
                if (value is None) == bool(what) and (value is None or math.isfinite(value)):
                    yield str(plain["key"]), Reward(value, str(failure), str(what))


def _text_of(verifier: dict[str, Any] | None) -> str:
    return json.dumps(verifier, sort_keys=True)
