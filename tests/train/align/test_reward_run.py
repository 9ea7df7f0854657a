"""A reward model's run on prepared preferences, from a language model's weights: killed in the middle, it ends bit for bit as
undisturbed; its held-out scores are those of `stratum evaluate`; commands that need a language model refuse it."""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from chats import assistant, tokenizer_file, user, write_chats
from killed_runs import Kill, Run, contents_at, recipe_in
from ranks import run_ranks
from rich.console import Console

from data.prepare import prepare
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.objective import ObjectiveConfig
from recipes.schema.read import recipe_mapping, recipe_yaml
from recipes.schema.recipe import Recipe
from train import stratum

STEPS = 4


def recipes_in(folder: Path) -> tuple[Recipe, Recipe]:
    """(a language model on chats, a reward model on preferences about the same chats)."""
    tokenizer = TokenizerConfig(path=str(tokenizer_file()))
    chats = write_chats(folder / "chats.jsonl", [[user(f"Say {n}."), assistant(f"{n}!")] for n in range(150)])
    records = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": f"{n + 1}?"} for n in range(150)]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    found = []
    for path, kind in ((chats, "chat"), (pairs, "preference")):
        data = DataConfig(
            folder=str(folder / kind),
            sources={kind: SourceConfig(path=str(path), kind=kind)},  # type: ignore[arg-type]
            tokenizer=tokenizer,
            row_tokens=64,
            reset_at_documents=True,
            heldout_fraction=0.1,
            workers=1,
        )
        prepare(data, console=Console(quiet=True))
        recipe = recipe_in(folder, steps_=STEPS)
        schedule = replace(recipe.schedule, warmup=0, decay=1)
        found.append(replace(recipe, data=data, model=replace(recipe.model, vocab=400), schedule=schedule))
    language, reward = found
    return language, replace(
        reward,
        model=replace(reward.model, head="scalar"),
        objective=ObjectiveConfig(kind="reward"),
        evaluate=replace(reward.evaluate, rows_per_source=5),
    )


def call(rank: int, folder: Path, words: list[str]) -> tuple[int, str]:
    """For `run_ranks`: a command of `stratum`. -> its exit status and output."""
    os.chdir(folder)
    handle = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    try:
        status = stratum.main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return status, Path("output").read_text()


@dataclass(frozen=True)
class Trained:
    """A language model and two runs of the same reward model that started from it, the second killed in the middle."""

    before: Recipe
    undisturbed: Run
    killed: Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("reward")
    language, reward = recipes_in(folder)
    before = replace(language, run=replace(language.run, name="before", steps=1))
    Run(before, 1, folder=folder / "said before").attempt(None)
    runs = []
    for name in ("undisturbed", "killed"):
        stage = replace(reward, run=replace(reward.run, name=name, start_from=str(folder / "before")))
        runs.append(Run(stage, 1, folder=folder / f"said {name}"))
        if name == "killed":
            assert runs[-1].attempt(Kill(steps=2, delay_s=0.0))
        runs[-1].attempt(None)
    return Trained(before, *runs)


def test_a_killed_run_ends_as_an_undisturbed_one(trained: Trained) -> None:
    ends = []
    for run in (trained.undisturbed, trained.killed):
        steps = {line["step"]: (line["loss"], line["loss_parts"]) for line in run.metrics if line["kind"] == "step"}
        assert sorted(steps) == list(range(1, STEPS + 1))
        ends.append((steps, contents_at(run.checkpoints / f"step_{STEPS:08d}")))
    assert ends[0] == ends[1]
    assert ends[0][1]["model.output_layer.weight"]


def test_heldout_scores_of_the_run_are_those_of_evaluate_and_in_the_report(trained: Trained) -> None:
    run, home = trained.killed, trained.killed.folder.parent
    scores = {line["step"]: line["tasks"]["heldout/preference"] for line in run.metrics if line["kind"] == "tasks"}
    assert sorted(scores) == [0, STEPS] and scores[0]["items"] >= 5
    assert set(scores[0]["metrics"]) == {"accuracy", "calibration_error", "loss"}
    status, text = run_ranks(1, call, home, ["evaluate", str(run.folder), "--heldout", "5"])[0]
    assert status == 0 and "heldout/preference" in text, text
    (results,) = run.folder.glob("evaluations/*/results.json")
    again = json.loads(results.read_text())["tasks"]["heldout/preference"]
    assert again["items"] == scores[STEPS]["items"]
    for name, metric in scores[STEPS]["metrics"].items():
        assert abs(again["metrics"][name]["value"] - metric["value"]) < 1e-6, name
    status, text = run_ranks(1, call, home, ["report", str(run.folder)])[0]
    page = (run.folder / "summary.md").read_text()
    assert status == 0 and "training loss (Bradley-Terry)" in page and "heldout/preference | accuracy" in page


@pytest.mark.slow
def test_commands_work_or_say_why_not(trained: Trained) -> None:
    home, folder, before = trained.killed.folder.parent, str(trained.killed.folder), "before"
    (home / "mine").mkdir()
    for recipe in (trained.before, trained.killed.recipe):
        (home / "mine" / f"{recipe.run.name}.yaml").write_text(recipe_yaml(recipe_mapping(recipe)))
    mine = ["--config-dir", "mine", "-cn"]
    is_reward = (
        "is a reward model (model.head=scalar): it gives a text one number and predicts no tokens. Name a language"
    )
    distil = ["objective.kind=distill", f"objective.teacher={folder}"]
    refused = {
        "generate": (["generate", *mine, "killed", "--prompt", "a"], is_reward),
        "serve": (["serve", *mine, "killed", "--port", "0"], is_reward),
        "evaluate": (["evaluate", folder, "--tasks", "needle-1k"], is_reward),
        "compress": (["compress", "score", *mine, before, f"+compress.parent={folder}"], is_reward),
        "a draft model": (["generate", *mine, before, "--prompt", "a", "--speculate", folder], is_reward),
        "a teacher": (["train", *mine, before, "run.name=student", *distil], is_reward),
        "quantize": (["hf", "export", folder, "--out", "int8", "--quantize", "int8"], "head=scalar"),
        "hf export": (["hf", "export", folder, "--out", "exported"], "NemotronHForCausalLM: model.head=scalar"),
        "held-out rows": (["evaluate", before, "--heldout", "5"], "is a language model. Name tasks instead"),
        "merge": (["merge", before, folder, "--out", "mixed", "--alpha", "0.5"], "model.head"),
        "a sweep by tasks": (
            ["merge", "undisturbed", folder, "--out", "m", "--alpha", "0.2,0.5", "--evaluate", "needle-1k"],
            is_reward,
        ),
    }
    for what, (words, reason) in refused.items():
        status, text = run_ranks(1, call, home, words)[0]
        assert status == 2 and reason in " ".join(text.split()), f"{what}: {status} {text}"
    sweep = ["merge", "undisturbed", folder, "--out", "merged", "--alpha", "0.2,0.5", "--evaluate", "heldout"]
    for words in (sweep, ["plan", *mine, "killed"], ["checkpoint", "show", folder], ["inspect", *mine, "killed"]):
        status, text = run_ranks(1, call, home, words)[0]
        assert status == 0, text
