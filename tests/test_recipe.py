"""Recipes: shipped ones are complete and right; mistakes are reported before anything is allocated."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pruning_folder import shell
from ranks import run_ranks
from recipes_composed import composed as composed_words
from tiny import RECIPE, TINY, recipe_with

from recipes.schema.changes import check_folder, differences, refused
from recipes.schema.command import RECIPES, dotted_keys
from recipes.schema.errors import RecipeError
from recipes.schema.optim import ScheduleConfig
from recipes.schema.pattern import parameters
from recipes.schema.read import recipe_from_mapping, recipe_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.rules import problems, refuse
from recipes.schema.scaling import shape_problems
from recipes.schema.schedule import learning_rate_factor
from train.build import check

PRIMARY = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def composed(name: str, *overrides: str) -> dict:
    return composed_words("-cn", name, *overrides)


def leaves(tree: dict, prefix: str = "") -> set[str]:
    keys = set()
    for key, value in tree.items():
        keys.add(f"{prefix}{key}")
        if isinstance(value, dict) and f"{prefix}{key}" != "data.sources":
            keys |= leaves(value, f"{prefix}{key}.")
    return keys


@pytest.mark.parametrize("name", PRIMARY)
def test_shipped_recipes_build_and_name_every_field(name: str) -> None:
    plain = composed(name)
    recipe_from_mapping(plain)
    for section in ("compress", "stages"):  # of `train.compress`
        plain.pop(section, None)
    assert leaves(plain) == set(dotted_keys(Recipe)), (
        "fields missing in YAML could not be overridden on the command line"
    )


# Published: tokens, rows of a step, row, learning rate at the peak, parameters. Sources: each recipe's head.
PUBLISHED = {
    "nemotron_h_4b": (380e9, None, 8192, None, 4_489_223_040),
    "nemotron_h_8b": (15e12, 768, 8192, 8e-4, 8_100_852_736),
    "nemotron_h_47b": (63e9, None, 8192, None, 46_791_554_816),
    "nemotron_h_56b": (20e12, 768, 8192, 4e-4, 56_324_350_464),
    "nemotron_nano_12b_v2": (20e12, 736, 8192, 4.5e-4, 12_310_001_152),
    "nemotron_nano_12b_v2_long": (18.9e9, 12, 524_288, 4.5e-6, 12_310_001_152),
    "nemotron3_nano_30b_a3b": (25e12, 3072, 8192, 1e-3, 31_577_937_344),
    "nemotron3_nano_30b_a3b_long": (121e9, 48, 1_048_576, 1e-5, 31_577_937_344),
    "nemotron3_super_120b_a12b": (25e12, 3072, 8192, 4.5e-4, 123_611_012_096),
    "nemotron3_ultra_550b_a55b": (20e12, 3072, 8192, 2.5e-4, 560_524_578_816),
    "nemotron_nano_9b_v2": (360e9, None, 8192, None, 8_888_227_328),
    "gemma2_2b": (2e12, None, 8192, None, 2_614_341_888),
    "gemma2_9b": (8e12, None, 8192, None, 9_241_705_984),
    "gemma2_27b": (13e12, None, 8192, None, 27_227_128_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_recipes_say_what_was_published_and_fit_their_machines(name: str) -> None:
    tokens, rows, row, rate, size = PUBLISHED[name]
    recipe = recipe_from_mapping(composed(name))
    step = recipe.run.global_rows * recipe.data.row_tokens
    assert recipe.data.row_tokens == row and rows in (None, recipe.run.global_rows) and rate in (None, recipe.optim.lr)
    assert tokens <= recipe.run.steps * step < tokens + step
    assert parameters(recipe.model).total == size
    layout = check(recipe, world=recipe.launch.nodes * recipe.launch.gpus_per_node)
    assert layout.microbatches_per_step >= 1


def test_the_twelve_billion_recipe_in_detail() -> None:
    """arXiv 2508.14444, section 2."""
    recipe = recipe_from_mapping(composed("nemotron_nano_12b_v2"))
    tokens = recipe.run.steps * 6_029_312
    assert recipe.run.global_rows * recipe.data.row_tokens == 6_029_312
    assert (recipe.optim.beta1, recipe.optim.beta2, recipe.optim.weight_decay) == (0.9, 0.95, 0.1)
    assert [phase.from_tokens / 20e12 for phase in recipe.data.phases] == [0.6, 0.9]
    rates = [
        learning_rate_factor(
            recipe.schedule, step=at // 6_029_312, tokens=at, total_steps=recipe.run.steps, tokens_per_step=6_029_312
        )
        for at in (10**12, 16 * 10**12, tokens)
    ]
    assert rates == pytest.approx([1.0, 1.0, 0.01])
    precision = recipe.precision
    assert (precision.scaling, precision.high_precision_first, precision.high_precision_last) == ("blockwise", 2, 2)
    long = recipe_from_mapping(composed("nemotron_nano_12b_v2_long"))
    assert (long.parallel.tensor, long.parallel.context, long.schedule.kind) == (8, 16, "constant")
    assert long.model == recipe.model


@pytest.mark.parametrize(
    "override",
    ["precision=bf16", "schedule=cosine", "schedule=constant"]
    + [f"launch={name}" for name in ("slurm_gpu", "slurm_pyxis", "slurm_apptainer")],
)
def test_groups_can_be_swapped(override: str) -> None:
    recipe_from_mapping(composed("smoke", override))


def test_smoke_is_a_small_hybrid_of_every_kind_of_layer() -> None:
    recipe = recipe_from_mapping(composed("smoke"))
    assert set(recipe.model.pattern) == {"M", "*", "-"}
    assert 5e6 <= parameters(recipe.model).total <= 10e6


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_mapping(RECIPE)))
    assert recipe_from_mapping(yaml.safe_load(path.read_text())) == RECIPE


def changed(**groups: object) -> Recipe:
    return dataclasses.replace(RECIPE, **groups)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (changed(model=dataclasses.replace(TINY, pattern="M-X")), "character 3 is 'X'"),
        (changed(schedule=ScheduleConfig(warmup=100)), "schedule.warmup=100"),
        (changed(data=dataclasses.replace(RECIPE.data, sources={})), "data.sources is empty"),
    ],
)
def test_cross_field_mistakes_are_named(recipe: Recipe, message: str) -> None:
    assert recipe_from_mapping(recipe_mapping(recipe)) == recipe, "reading judges single fields only"
    with pytest.raises(RecipeError) as caught:
        refuse(problems(recipe))
    assert message in str(caught.value)


def test_a_run_may_move_to_another_layout_but_not_to_another_model() -> None:
    old = recipe_mapping(RECIPE)
    moved = changed(parallel=dataclasses.replace(RECIPE.parallel, tensor=2))
    other = changed(model=dataclasses.replace(TINY, hidden=128))
    assert refused(differences(old, recipe_mapping(moved)), ()) is None
    (difference,) = differences(old, recipe_mapping(other))
    assert str(difference) == "model.hidden: 64 in the run's folder, 128 now"
    assert "another run.name" in (refused([difference], ("data_order", "arithmetic")) or "")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"run.threads": 2}, "safe"),
        ({"parallel.tensor": 2}, "safe"),
        ({"telemetry.log_every_steps": 7}, "safe"),
        ({"data.seed": 5}, "data order"),
        ({"optim.lr": 1.0}, "arithmetic"),
        ({"precision.params": "bf16"}, "arithmetic"),
        ({"model.logit_softcap": 30.0}, "arithmetic"),
        ({"run.steps": 9}, "safe"),  # nothing of this schedule hangs on the end
        ({"run.global_rows": 8}, "another run"),
    ],
)
def test_a_changed_field_is_typed_by_what_it_does(change: dict, kind: str) -> None:
    (difference,) = differences(recipe_mapping(RECIPE), recipe_mapping(recipe_with(**change)))
    assert difference.kind == kind
    words = {"safe": (), "another run": None}.get(kind, (kind.replace(" ", "_"),))
    assert (refused([difference], words or ()) is None) == (words is not None)
    assert kind == "safe" or refused([difference], ()) is not None


def test_a_change_of_the_last_step_is_arithmetic_if_the_schedule_depends_on_it() -> None:
    cosine = recipe_with(**{"schedule.kind": "cosine"})
    longer = dataclasses.replace(cosine, run=dataclasses.replace(cosine.run, steps=16))
    assert [d.kind for d in differences(recipe_mapping(cosine), recipe_mapping(longer))] == ["arithmetic"]


def test_a_change_of_the_last_step_is_arithmetic_if_a_phase_is_a_fraction_of_the_run() -> None:
    part = recipe_with(**{"schedule.kind": "constant", "schedule.warmup": 0.5})
    longer = dataclasses.replace(part, run=dataclasses.replace(part.run, steps=16))
    assert [d.kind for d in differences(recipe_mapping(part), recipe_mapping(longer))] == ["arithmetic"]


def test_a_phase_of_the_same_steps_written_as_a_fraction_is_no_change() -> None:
    steps = RECIPE.run.steps
    was, now, other = (recipe_with(**{"schedule.warmup": value}) for value in (steps // 2, 0.5, 0.25))
    assert differences(recipe_mapping(was), recipe_mapping(now)) == []
    (found,) = differences(recipe_mapping(was), recipe_mapping(other))
    assert (found.key, found.old, found.new, found.kind) == ("schedule.warmup", steps // 2, 0.25, "arithmetic")


def test_a_recipe_too_old_to_have_a_field_had_its_default() -> None:
    old = recipe_mapping(RECIPE)
    del old["checkpoint"]["background"], old["objective"]
    assert differences(old, recipe_mapping(RECIPE)) == []


def test_a_folder_of_another_recipe_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_mapping(RECIPE)))
    check_folder(tmp_path, RECIPE)
    other = changed(optim=dataclasses.replace(RECIPE.optim, lr=1.0))
    with pytest.raises(RecipeError, match=r"optim\.lr: 0\.001 in the run's folder, 1\.0 now"):
        check_folder(tmp_path, other)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match=r"thesis\.tex"):
        check_folder(tmp_path, RECIPE)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "train", *words], capture_output=True, text=True, check=False, cwd=RECIPES.parent
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["-cn", "smoke", "model.hiden=3"],
            "unknown recipe key 'model.hiden' on the command line. Did you mean model.hidden?",
        ),
        (["-cn", "smok"], "there is no recipe 'smok'. Did you mean smoke? The recipes are: "),
        (["smoke-not-a-run"], "smoke-not-a-run is not a run: neither it nor runs/smoke-not-a-run has recipe.yaml"),
        (["smoke_not_a_run", "-cn", "smoke"], "'smoke_not_a_run' names a run, and -cn or --config-dir a recipe"),
        ([], "no recipe was named. Use `stratum train -cn NAME`"),
        (["-cn", "smoke", "precision=fp8_blokwise"], "Did you mean fp8_blockwise? Use one of bf16, fp32,"),
        (["-cn", "smoke", "precison=bf16"], "Did you mean precision?"),
        (["-cn", "smoke", "compress=standard"], "compress is not in this recipe yet. Add it with a plus: +compress="),
        (
            ["-cn", "smoke", "+optim.lr=1"],
            "optim.lr is already in this recipe. Override it without the plus: optim.lr=",
        ),
        (["-cn", "smoke", "--config-dri=x"], "unknown option --config-dri=x. Did you mean --config-dir?"),
        (
            ["-cn", "smoke", "optim.lr=-1", "model.heads=x", "model.activation=relu"],
            "optim.lr=-1 is out of range. Use a value > 0.",
        ),
    ],
)
def test_the_command_line_explains_mistakes(words: list[str], message: str) -> None:
    result = command(*words)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("parallel.tensor=2", "does not divide the 1 process of this run"),
        ("data.folder=nowhere", "no prepared data in nowhere"),
    ],
)
def test_the_trainer_explains_what_does_not_fit(word: str, message: str, tmp_path: Path) -> None:
    words = ["train", "-cn", "smoke", "--config-dir", ".", f"run.folder={tmp_path}", word]
    ((status, text),) = run_ranks(1, shell, tmp_path, words)
    assert status == 2 and message in text and "Traceback" not in text


def test_the_composed_recipe_is_printed_and_help_is_ours() -> None:
    shown = command("-cn", "smoke", "--cfg", "job", "optim.lr=3e-4")
    assert shown.returncode == 0 and float(yaml.safe_load(shown.stdout)["optim"]["lr"]) == 3e-4
    help = command("--help").stdout
    assert help.startswith("usage: stratum train") and "Hydra" not in help and "Configuration groups" not in help


@pytest.mark.parametrize("name", [*PUBLISHED, "nemotron_h_130m", "gemma2_130m", "smoke"])
def test_every_recipe_meant_for_a_gpu_has_widths_that_fp8_takes_there(name: str) -> None:
    """cuBLASLt needs both dimensions of an FP8 matrix to be multiples of 16. The 130M recipe had an in_proj of 4,120 rows."""
    recipe = recipe_from_mapping(composed(name, "precision=fp8_current"))
    rank_tokens = recipe.run.microbatch_rows * recipe.data.row_tokens // recipe.parallel.context
    found = shape_problems(recipe.model, parallel=recipe.parallel, precision=recipe.precision, rank_tokens=rank_tokens)
    assert found == []


def test_a_field_that_an_older_run_did_not_have_is_no_change_if_it_has_its_default() -> None:
    old = recipe_mapping(RECIPE)
    for source in old["data"]["sources"].values():
        del source["kind"]
    del old["data"]["chat"]
    assert differences(old, recipe_mapping(RECIPE)) == []
