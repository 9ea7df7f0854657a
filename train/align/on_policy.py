"""Preferences among a model's own answers, for the next round of DPO (iterative, on policy).

    prompts --the run's model, N answers each--> answers --verifiers--> rewards --> best and worst of each prompt --> OUT

Work is kept in the hidden folder `.OUT.work`: a line for each finished prompt, and the journal of rewards. After a kill, the
same command continues with the next prompt. The random numbers of an answer are a function of (seed, prompt, number of the
answer), so neither kills nor the batch change the records.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.chat.prompts import PromptSet
from data.system import disk
from data.system.console import open_console, progress
from recipes.schema.align import GrpoConfig
from recipes.schema.errors import DataError
from recipes.schema.foreign import parse_json, printable
from recipes.schema.recipe import Recipe
from recipes.schema.tools import PreferencesConfig
from train.align.judging import Case, Judges, check_prompts
from train.align.rollout import Answer, draw_answers
from train.checkpoint.manager import checkpoint_at
from train.inference.text import Opened, opened

_DONE = "done.jsonl"


def write_preferences(recipe: Recipe, config: PreferencesConfig) -> int:
    """Write `config.out`. -> exit status. Raises DataError for bad prompts or an output of another request, CheckpointError."""
    assert config.prompts is not None and config.out is not None, "checked by the command"
    out = Path(config.out)
    if out.exists():
        raise DataError(f"{out} exists already. Name another --out, or remove it.")
    drawing = GrpoConfig(
        generations_per_prompt=config.samples,
        max_answer_tokens=config.tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        generation_rows=config.batch,
        allowed_functions=tuple(name for name in config.allow_functions.split(",") if name),
    )
    with opened(recipe, checkpoint=config.checkpoint) as it:
        most = recipe.data.row_tokens - config.tokens
        answer = f"--tokens {config.tokens}"
        with PromptSet(
            recipe.data, [config.prompts], it.tokenizer, answer=answer, most_tokens=most, checks=True
        ) as prompts:
            verifiers = check_prompts(prompts.prompts, drawing)
            lineage = _lineage(it, config, prompts)
            work = out.with_name(f".{out.name}.work")
            done = _open_work(work, lineage)
            with Judges(work / "rewards", drawing, rank=0) as judges:
                judges.try_all(verifiers)
                _judge_rest(recipe, it, prompts, judges, work, done, config=config, drawing=drawing)
    records = [done[index] for index in sorted(done)]
    kept = [record | {"lineage": lineage} for record in records if "chosen" in record]
    if not kept:
        raise DataError(
            f"none of the {len(records):,} prompts has answers with different rewards, so nothing is preferred. Use more "
            f"--samples, a higher --temperature, or prompts that the model sometimes answers right."
        )
    disk.write_text(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    disk.remove_tree(work)
    left_out = f"{len(records) - len(kept):,} prompts left out, whose answers have equal rewards"
    console = open_console(stderr=True)
    console.print(
        printable(f"{out}: {len(kept):,} preferences; {left_out}."),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _judge_rest(
    recipe: Recipe,
    it: Opened,
    prompts: PromptSet,
    judges: Judges,
    work: Path,
    done: dict[int, dict[str, Any]],
    *,
    config: PreferencesConfig,
    drawing: GrpoConfig,
) -> None:
    """Draw and judge the prompts that are not in `done`, some at a time, and add them to it and to the file."""
    every = range(len(prompts.prompts))
    rest = [position for position in every if prompts.index_at(position) not in done]
    together = max(1, config.batch // config.samples)
    with progress("preferences", len(every), in_bytes=False) as advance:
        advance(len(every) - len(rest))
        for start in range(0, len(rest), together):
            positions = rest[start : start + together]
            groups = draw_answers(it.model, recipe.model, prompts, positions, config=drawing, seed=config.seed)
            for position, answers in zip(positions, groups, strict=True):
                index = prompts.index_at(position)
                done[index] = _record(prompts, judges, it, position, answers, min_gap=config.min_gap)
                disk.append(work / _DONE, [json.dumps({"prompt_number": index, **done[index]}).encode() + b"\n"])
                advance(1)


def _record(
    prompts: PromptSet, judges: Judges, it: Opened, position: int, answers: Sequence[Answer], *, min_gap: float
) -> dict[str, Any]:
    """The preference of one prompt, or {} if its answers do not differ. An answer counts if it ended, is not empty, and its
    verifier gave it a reward."""
    prompt = prompts.at(position)
    texts = [it.tokenizer.decode(_content(answer, prompts)).strip() for answer in answers]
    cases = [Case(position, number, prompt, text) for number, text in enumerate(texts)]
    judged = [
        (reward.value, text)
        for reward, text, answer in zip(judges.rewards(cases, step=0), texts, answers, strict=True)
        if reward.value is not None and answer.ended and text
    ]
    if not judged:
        return {}
    best, worst = max(judged, key=lambda one: one[0]), min(judged, key=lambda one: one[0])
    if best[0] - worst[0] < min_gap or best[1] == worst[1]:  # a function may judge equal texts differently
        return {}
    found = {"prompt": prompt.messages, "rewards": [best[0], worst[0]], "place": prompt.place}
    if prompt.tools:
        found["tools"] = prompt.tools
    both = {
        name: [{"role": "assistant", "content": text}] for name, (_, text) in (("chosen", best), ("rejected", worst))
    }
    return found | both


def _content(answer: Answer, prompts: PromptSet) -> list[int]:
    """Ids of an answer without the token that ended it."""
    ids = [int(token) for token in answer.tokens]
    return ids[:-1] if ids and ids[-1] in prompts.stop_ids else ids


def _lineage(it: Opened, config: PreferencesConfig, prompts: PromptSet) -> dict[str, Any]:
    """What the records follow from."""
    manifest = checkpoint_at(it.checkpoint)[1]
    drawn = {
        name: value for name, value in asdict(config).items() if name not in ("prompts", "out", "batch", "checkpoint")
    }
    weights = {"checkpoint": str(it.checkpoint), "step": manifest.step, "weights": manifest.fingerprint}
    return weights | {"prompts": prompts.manifest_hash} | drawn


def _open_work(work: Path, lineage: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """{prompt: record} of an earlier attempt; a new folder without one. DataError if that attempt was of another request."""
    path, request = work / _DONE, json.dumps(lineage)
    if not path.exists():
        if work.exists():
            disk.remove_tree(work)
        work.mkdir(parents=True)
        disk.write_text(path, request + "\n")
        return {}
    first, *lines = path.read_text().split("\n")
    if first != request:
        digest = hashlib.sha256(first.encode()).hexdigest()[:8]
        raise DataError(
            f"{work} is of another attempt ({digest}), with other weights, prompts or options. Remove it, or name another --out."
        )
    whole = [line for line in lines[:-1] if line]
    if lines[-1:] != [""]:  # the last line was cut off by a kill
        disk.write_text(path, "".join(f"{line}\n" for line in [first, *whole]))
    records = [parse_json(line) for line in whole]
    return {record.pop("prompt_number"): record for record in records}
