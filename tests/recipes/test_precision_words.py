"""What is shown is the precision that really runs, by layers."""

from dataclasses import replace

import pytest
from recipes_composed import composed

from recipes.schema.model import ModelConfig
from recipes.schema.precision import PrecisionConfig
from recipes.schema.read import recipe_from_mapping
from recipes.schema.scaling import describe_precision
from train.record.displays import Screen

MODEL = ModelConfig(pattern="M-M*-M-M*-", hidden=64, vocab=64)
BLOCKWISE = PrecisionConfig(params="bf16", scaling="blockwise", high_precision_first=2, high_precision_last=2)


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        (PrecisionConfig(), "fp32"),
        (PrecisionConfig(params="bf16"), "bf16"),
        (BLOCKWISE, "fp8_blockwise, 6 of 10 layers; ends bf16"),
        (replace(BLOCKWISE, high_precision_first=5, high_precision_last=5), "bf16; fp8_blockwise in none of 10 layers"),
        (PrecisionConfig(scaling="mxfp8"), "mxfp8, 10 of 10 layers"),
        (replace(BLOCKWISE, switch_at_tokens=700), "fp8_blockwise, 6 of 10 layers; ends bf16; from token 700: bf16"),
    ],
)
def test_precision_in_words(precision: PrecisionConfig, said: str) -> None:
    assert describe_precision(MODEL, precision) == said


def test_the_smoke_recipe_trains_most_layers_in_fp8() -> None:
    recipe = recipe_from_mapping(composed("-cn", "smoke"))
    assert describe_precision(recipe.model, recipe.precision) == "fp8_blockwise, 6 of 10 layers; ends bf16"


def test_the_header_and_each_line_of_progress_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    precision = replace(BLOCKWISE, switch_at_tokens=64)
    screen = Screen(3, 0, live=False, precision_at=lambda done: describe_precision(MODEL, precision, tokens=done - 32))
    start = {
        "kind": "start",
        "parameters": 1,
        "device": "cpu",
        "layout": "TP1",
        "precision": describe_precision(MODEL, precision),
    }
    step = {"kind": "step", "loss": 1.0, "tokens_per_s": 9.0, "learning_rate": 1.0}
    screen.write([start])
    for number in (1, 2, 3):
        screen.write([step | {"step": number, "tokens": 32 * number}])
    head, first, second, third = capsys.readouterr().err.splitlines()
    assert head.endswith("fp8_blockwise, 6 of 10 layers; ends bf16; from token 64: bf16")
    assert "fp8_blockwise, 6 of 10 layers" in first and "fp8_blockwise, 6 of 10 layers" in second
    assert "fp8" not in third and "bf16" in third
