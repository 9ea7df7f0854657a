"""A reward model's run on prepared preferences, from a language model's weights: killed in the middle, it ends bit for bit as
undisturbed; its held-out scores are those of `stratum evaluate`; commands that need a language model refuse it."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

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


def test_a_run_continues_after_a_kill_is_evaluated_and_refused_where_it_cannot_work(tmp_path: Path) -> None:
    language, reward = recipes_in(tmp_path)
    before = replace(language, run=replace(language.run, name="before", steps=1))
    Run(before, 1, folder=tmp_path / "said before").attempt(None)
    ends = []
    for name in ("undisturbed", "killed"):
        stage = replace(reward, run=replace(reward.run, name=name, start_from=str(tmp_path / "before")))
        run = Run(stage, 1, folder=tmp_path / f"said {name}")
        if name == "killed":
            assert run.attempt(Kill(steps=2, delay_s=0.0))
        run.attempt(None)
        steps = {line["step"]: (line["loss"], line["loss_parts"]) for line in run.metrics if line["kind"] == "step"}
        assert sorted(steps) == list(range(1, STEPS + 1))
        ends.append((steps, contents_at(run.checkpoints / f"step_{STEPS:08d}")))
    assert ends[0] == ends[1]
    assert ends[0][1]["model.output_layer.weight"]

    scores = {line["step"]: line["tasks"]["heldout/preference"] for line in run.metrics if line["kind"] == "tasks"}
    assert sorted(scores) == [0, STEPS] and scores[0]["items"] >= 5
    assert set(scores[0]["metrics"]) == {"accuracy", "calibration_error", "loss"}

    folder = str(run.folder)
    status, text = run_ranks(1, call, tmp_path, ["evaluate", folder, "--heldout", "5"])[0]
    assert status == 0 and "heldout/preference" in text, text
    (results,) = run.folder.glob("evaluations/*/results.json")
    again = json.loads(results.read_text())["tasks"]["heldout/preference"]
    assert again["items"] == scores[STEPS]["items"]
    for name, metric in scores[STEPS]["metrics"].items():
        assert abs(again["metrics"][name]["value"] - metric["value"]) < 1e-6, name
    status, text = run_ranks(1, call, tmp_path, ["report", folder])[0]
    page = (run.folder / "summary.md").read_text()
    assert status == 0 and "training loss (Bradley-Terry)" in page and "heldout/preference | accuracy" in page

    (tmp_path / "mine").mkdir()
    for recipe in (before, run.recipe):
        (tmp_path / "mine" / f"{recipe.run.name}.yaml").write_text(recipe_yaml(recipe_mapping(recipe)))
    mine = ["--config-dir", "mine", "-cn"]
    is_reward = (
        "is a reward model (model.head=scalar): it gives a text one number and predicts no tokens. Name a language"
    )
    refused = {
        "generate": ["generate", *mine, "killed", "--prompt", "a"],
        "evaluate": ["evaluate", folder, "--tasks", "needle-1k"],
        "compress": ["compress", "score", *mine, "before", f"compress.parent={folder}"],
        "a draft model": ["generate", *mine, "before", "--prompt", "a", "--speculate", folder],
        "a teacher": ["train", *mine, "before", "run.name=student", "objective.kind=distill", f"objective.teacher={folder}"],
    }  # fmt: skip
    for what, words in refused.items():
        status, text = run_ranks(1, call, tmp_path, words)[0]
        assert status == 2 and is_reward in " ".join(text.split()), f"{what}: {status} {text}"
    status, text = run_ranks(1, call, tmp_path, ["hf", "export", folder, "--out", "exported"])[0]
    assert status == 2 and "NemotronHForCausalLM: model.head=scalar" in text, text
    status, text = run_ranks(1, call, tmp_path, ["evaluate", str(tmp_path / "before"), "--heldout", "5"])[0]
    assert status == 2 and "is a language model. Name tasks instead" in text, text
    status, text = run_ranks(
        1, call, tmp_path, ["merge", str(tmp_path / "before"), folder, "--out", "m", "--alpha", "0.5"]
    )[0]
    assert status == 2 and "head" in text, text
    two = [str(tmp_path / "undisturbed"), folder, "--out", "merged", "--alpha", "0.2,0.5", "--evaluate", "heldout"]
    status, text = run_ranks(1, call, tmp_path, ["merge", *two])[0]
    assert status == 0, text
