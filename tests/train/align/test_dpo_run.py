"""Runs of DPO on prepared preferences from another run's weights: the cached reference equals the online one, and kills change
nothing."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chats import assistant, tokenizer_file, user, write_chats
from killed_runs import Kill, Run, contents_at, recipe_in
from ranks import run_ranks
from rich.console import Console

from data.prepare import prepare
from recipes.schema.align import DpoConfig
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import StratumError
from recipes.schema.recipe import Recipe
from train.align import reference
from train.run import train

STEPS, PIECE = 4, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    """A recipe of DPO on 60 pairs, whose start is trained. Pieces of the cache are small."""
    folder = tmp_path_factory.mktemp("dpo")
    chats = [[user(f"Say {n}."), assistant(f"{n}!")] for n in range(80)]
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": f"No, not {n}."} for n in range(80)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write_chats(folder / "chats.jsonl", chats)
    start = recipe_in(folder, steps_=1)
    start = replace(start, schedule=replace(start.schedule, warmup=0, decay=0))
    data = DataConfig(
        tokenizer=TokenizerConfig(path=str(tokenizer_file())), row_tokens=96, reset_at_documents=True, workers=1
    )
    kinds = {"chats": "chat", "pairs": "preference"}
    both = {
        name: replace(
            data, folder=str(folder / name), heldout_fraction=0.1,
            sources={name: SourceConfig(path=str(folder / f"{name}.jsonl"), kind=kind)},  # type: ignore[arg-type]
        )
        for name, kind in kinds.items()
    }  # fmt: skip
    for one in both.values():
        prepare(one, console=Console(quiet=True))
    start = replace(start, data=both["chats"], model=replace(start.model, vocab=400))
    start = replace(start, run=replace(start.run, name="before"))
    Run(start, 1, folder=folder / "said before").attempt(None)
    run = replace(start.run, name="dpo", steps=STEPS, start_from=str(folder / "before"))
    evaluate = replace(start.evaluate, every_steps=2, rows_per_source=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_PIECE_ROWS", PIECE)
        yield replace(
            start, run=run, data=both["pairs"], evaluate=evaluate, objective=replace(start.objective, kind="dpo")
        )


def named(recipe: Recipe, name: str, **dpo: Any) -> Recipe:
    objective = replace(recipe.objective, dpo=replace(recipe.objective.dpo, **dpo))
    return replace(recipe, run=replace(recipe.run, name=name), objective=objective)


def run_of(recipe: Recipe, *kills: Kill, world: int = 1) -> Run:
    run = Run(recipe, world, folder=Path(recipe.run.folder) / f"said {recipe.run.name}")
    for kill in kills:
        assert run.attempt(kill)
    run.attempt(None)
    return run


def losses_of(run: Run) -> list[float]:
    """By step; of a step that ran twice, the last."""
    found = {line["step"]: line["loss"] for line in run.metrics if line["kind"] == "step"}
    return [found[step] for step in sorted(found)]


def pieces_of(recipe: Recipe) -> dict[str, bytes]:
    folder = Path(recipe.run.folder) / recipe.run.name / "reference"
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


@pytest.fixture(scope="module")
def undisturbed(place: Recipe) -> Run:
    return run_of(place)


def test_the_first_loss_is_that_of_equal_models_and_pairs_are_learned(undisturbed: Run) -> None:
    losses = losses_of(undisturbed)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0] - 1e-3
    scores = [line["tasks"]["heldout/pairs"]["metrics"] for line in undisturbed.metrics if line["kind"] == "tasks"]
    assert scores[0]["loss"]["value"] == pytest.approx(math.log(2), abs=1e-6)
    assert scores[0]["accuracy"]["value"] == 0.5 and scores[-1]["loss"]["value"] < math.log(2)


def test_online_and_a_named_reference_and_two_ranks_give_the_same_losses(place: Recipe, undisturbed: Run) -> None:
    online = named(place, "online", reference_log_probs="online")
    others = [
        run_of(online, Kill(steps=1, delay_s=0.0)),
        run_of(named(place, "two", reference=place.run.start_from), world=2),
    ]
    ends = [contents_at(run.checkpoints / f"step_{STEPS:08d}") for run in (others[0], undisturbed)]
    assert ends[0] == ends[1]  # the random state too
    for other in others:
        assert losses_of(other) == pytest.approx(losses_of(undisturbed), rel=1e-6)


def test_a_killed_run_ends_as_an_undisturbed_one(place: Recipe, undisturbed: Run) -> None:
    killed = run_of(named(place, "killed"), Kill(steps=2, delay_s=0.0))
    assert losses_of(killed) == losses_of(undisturbed)
    ends = [contents_at(run.checkpoints / f"step_{STEPS:08d}") for run in (killed, undisturbed)]
    assert ends[0] == ends[1]


def stopped(rank: int, recipe: Recipe) -> int:
    """A run that ends while it writes the second piece of its cache. -> pieces then."""
    keep = reference.ReferenceCache.keep

    def keep_one(self: Any, *arguments: Any, **more: Any) -> None:
        if pieces_of(recipe):
            raise KeyboardInterrupt
        keep(self, *arguments, **more)

    reference.ReferenceCache.keep = keep_one  # type: ignore[method-assign]
    try:
        train(recipe)
    except KeyboardInterrupt:
        return len(pieces_of(recipe))
    return -1


def test_a_cache_that_was_not_finished_is_continued(place: Recipe, undisturbed: Run) -> None:
    recipe = named(place, "stopped")
    assert run_ranks(1, stopped, recipe) == [1]
    first = pieces_of(recipe)
    assert losses_of(run_of(recipe)) == losses_of(undisturbed)
    assert first.items() <= pieces_of(recipe).items() and len(pieces_of(recipe)) > 1


def refused(rank: int, recipe: Recipe) -> str:
    try:
        train(recipe)
    except StratumError as error:
        return str(error)
    return ""


def test_other_weights_and_damage_are_named_and_more_steps_are_computed(place: Recipe) -> None:
    recipe = named(place, "changed")
    run_of(replace(recipe, run=replace(recipe.run, steps=1)))
    longer = replace(
        recipe, run=replace(recipe.run, steps=2), checkpoint=replace(recipe.checkpoint, allow=("arithmetic",))
    )
    (said,) = run_ranks(1, refused, named(longer, "changed", reference=str(Path(place.run.folder) / "dpo")))
    assert "has log-probabilities of another reference: weights " in said and ", now " in said
    count = len(pieces_of(recipe))
    assert run_ranks(1, refused, longer) == [""] and len(pieces_of(recipe)) > count  # by a model of its own
    folder = Path(recipe.run.folder) / "changed" / "reference"
    piece = min(folder.glob("*.npz"))
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes(content)
    (said,) = run_ranks(1, refused, longer)
    assert f"{piece} is damaged. Remove it: its rows are then computed again." in said


def test_changed_preferences_are_refused_and_leave_the_recipe_of_the_run(place: Recipe) -> None:
    """A start that was allowed to change data, and failed at the reference, had replaced the run's recipe.yaml."""
    recipe = named(place, "exchanged")
    run = run_of(replace(recipe, run=replace(recipe.run, stop_after_steps=1)))
    source = place.data.sources["pairs"]
    changed = Path(place.run.folder) / "changed.jsonl"
    changed.write_text(Path(source.path).read_text().replace("No, not 3.", "Three."))
    data = replace(
        place.data, folder=f"{place.run.folder}/changed data", sources={"pairs": replace(source, path=str(changed))}
    )
    prepare(data, console=Console(quiet=True))
    before = (run.folder / "recipe.yaml").read_bytes()
    other = replace(recipe, data=data)
    assert "was trained on data" in run_ranks(1, refused, other)[0]
    other = replace(other, checkpoint=replace(other.checkpoint, allow=("data_order",)))
    assert "reference has log-probabilities of another reference: data " in run_ranks(1, refused, other)[0]
    assert (run.folder / "recipe.yaml").read_bytes() == before


def test_a_recipe_without_a_reference_is_refused(place: Recipe) -> None:
    recipe = replace(named(place, "none"), run=replace(place.run, name="none", start_from=None))
    (said,) = run_ranks(1, refused, recipe)
    assert "objective.dpo.reference=null and run.start_from=null. Set run.start_from" in said
    assert DpoConfig().reference is None
