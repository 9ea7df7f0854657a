"""Preferences among a model's own answers: the best and the worst by their verifier, the same after a kill."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from chats import assistant, tokenizer_file, user, write_chats
from killed_runs import Run, recipe_in
from ranks import run_ranks
from rich.console import Console

from data.chat.preferences import preference_of
from data.prepare import prepare
from data.system import disk
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import StratumError
from recipes.schema.recipe import Recipe
from recipes.schema.tools import PreferencesConfig
from train.align.on_policy import write_preferences

RULES = [
    {"kind": "letter_count", "letter": "e", "least": 3}, {"kind": "no_digits"},
    {"kind": "characters", "least": 60}, {"kind": "no_commas"},
]  # fmt: skip


def share(text: str) -> float:
    """The reward of an answer, found without the code under test."""
    held = [text.lower().count("e") >= 3, not any(c.isdigit() for c in text), len(text.strip()) >= 60, "," not in text]
    return sum(held) / len(held)


def a_run(folder: Path) -> Recipe:
    """A model that has hardly learned: its answers are random tokens, some of which end."""
    start = recipe_in(folder, steps_=1)
    chats = [[user(f"Say {n}."), assistant(f"{n}!")] for n in range(80)]
    data = DataConfig(
        folder=str(folder / "chats"),
        sources={"chats": SourceConfig(path=str(write_chats(folder / "chats.jsonl", chats)), kind="chat")},
        tokenizer=TokenizerConfig(path=str(tokenizer_file())),
        row_tokens=96, reset_at_documents=True, heldout_fraction=0.1, workers=1,
    )  # fmt: skip
    prepare(data, console=Console(quiet=True))
    schedule = replace(start.schedule, warmup=0, decay=0)
    recipe = replace(start, data=data, schedule=schedule, model=replace(start.model, vocab=400))
    Run(recipe, 1, folder=folder / "said").attempt(None)
    return recipe


def written(rank: int, recipe: Recipe, config: PreferencesConfig, stop_after: int | None) -> str:
    """What the command says, or the error; stop_after: interrupt it after so many prompts."""
    if stop_after is not None:
        append = disk.append
        done: list[Any] = []

        def some(path: Path, parts: Any) -> None:
            if path.name == "done.jsonl":
                done.append(path)
                if len(done) > stop_after:
                    raise KeyboardInterrupt
            append(path, parts)

        disk.append = some  # type: ignore[assignment]
    try:
        return str(write_preferences(recipe, config))
    except KeyboardInterrupt:
        return "interrupted"
    except StratumError as error:
        return str(error)


def test_best_and_worst_become_a_record_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    recipe, prompts = a_run(tmp_path), tmp_path / "prompts.jsonl"
    records = [{"prompt": f"Write {n}.", "verifier": {"kind": "constraints"}, "constraints": RULES} for n in range(6)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = PreferencesConfig(prompts=str(prompts), out=str(tmp_path / "a.jsonl"), samples=16, tokens=64, batch=32)
    assert run_ranks(1, written, recipe, config, None) == ["0"]
    again = replace(config, out=str(tmp_path / "b.jsonl"))
    assert run_ranks(1, written, recipe, again, 2) == ["interrupted"]
    other = replace(again, temperature=0.5)
    assert "with other weights, prompts or options. Remove it" in run_ranks(1, written, recipe, other, None)[0]
    assert run_ranks(1, written, recipe, replace(again, batch=16), None) == ["0"]
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert not (tmp_path / ".b.jsonl.work").exists()
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert 2 <= len(found) <= 6
    for record in found:
        chosen, rejected = (answer.messages[0]["content"] for answer in preference_of(record).answers)
        assert record["rewards"] == [share(chosen), share(rejected)] and share(chosen) > share(rejected)
        assert record["lineage"]["weights"] and record["lineage"]["seed"] == 0
    assert "exists already" in run_ranks(1, written, recipe, config, None)[0]
