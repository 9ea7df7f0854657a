"""Scalings by linear layer (`precision.rules`): which linear gets which, in training, health, plan and words."""

from dataclasses import replace
from typing import Any

import pytest
import yaml
from ranks import run_ranks
from tiny import TINY, health, recipe_with, train_tiny

from launch.plan.cost.device import device_named
from launch.plan.planner import make_plan
from recipes.schema.command import RECIPES
from recipes.schema.precision import LinearRule, PrecisionConfig
from recipes.schema.scaling import describe_precision, linear_scalings, low_precision_linears
from recipes.schema.typed import build

SUPER = build(
    PrecisionConfig, yaml.safe_load((RECIPES / "precision" / "nemotron3_super.yaml").read_text()), "precision"
)
OF_TINY = {
    **{layer: {"mixer.in_proj": "nvfp4", "mixer.out_proj": "mxfp8"} for layer in (0, 2, 5, 7)},
    **{layer: {"mlp.linear_fc1": "nvfp4", "mlp.linear_fc2": "nvfp4"} for layer in (1, 4, 6)},
}
"""Nemotron 3 Super's scalings of `M-M*-M-M*-`: 15 % of 10 layers are two, attention is at 3 and 8."""


def test_supers_recipe_is_what_its_report_says() -> None:
    assert linear_scalings(TINY, SUPER, SUPER.scaling) == OF_TINY
    assert low_precision_linears(TINY, SUPER) == {layer: tuple(names) for layer, names in OF_TINY.items()}
    assert linear_scalings(TINY, SUPER, "none") == {}
    said = "nvfp4, 7 of 10 layers; mxfp8 in 4 linears; bf16 in 6 linears"
    assert describe_precision(TINY, SUPER) == said


def test_the_first_rule_that_matches_decides_and_the_ends_stay() -> None:
    rules = (
        LinearRule("mxfp8", kinds="M-", linears="*.linear_fc1"),
        LinearRule("none", kinds="-"),
        LinearRule("blockwise"),
    )
    precision = PrecisionConfig(scaling="current", high_precision_first=1, high_precision_last=1, rules=rules)
    model = replace(TINY, pattern="M-*-M")
    both = {"self_attention.linear_qkv": "blockwise", "self_attention.linear_proj": "blockwise"}
    assert linear_scalings(model, precision, "current") == {
        1: {"mlp.linear_fc1": "mxfp8"}, 2: both, 3: {"mlp.linear_fc1": "mxfp8"}
    }  # fmt: skip


def _recipe(**changes: Any) -> Any:
    return recipe_with(**{"precision.params": "bf16", **changes})


def test_a_rule_for_all_linears_is_that_scaling() -> None:
    """Every bit, and the default scaling is another one."""
    by_rule = _recipe(**{"precision.scaling": "current", "precision.rules": (LinearRule("mxfp8"),)})
    plain, other = _recipe(**{"precision.scaling": "mxfp8"}), _recipe(**{"precision.scaling": "current"})
    found, wanted, default = (run_ranks(1, train_tiny, recipe, 1)[0] for recipe in (by_rule, plain, other))
    assert found == wanted != default


def test_each_linear_is_measured_in_its_own_format_on_every_stage() -> None:
    """Layers are counted through all pipeline stages."""
    recipe = _recipe(**{f"precision.{name}": getattr(SUPER, name) for name in ("scaling", "rules")})
    formats = {"nvfp4": "e2m1", "mxfp8": "e4m3"}
    wanted = {(layer, name): formats[one] for layer, names in OF_TINY.items() for name, one in names.items()}
    for world in (1, 2):
        steps, _ = run_ranks(world, health, replace(recipe, parallel=replace(recipe.parallel, pipeline=world)), world)[
            0
        ]
        assert {(reading.layer, reading.linear): reading.format for reading in steps[0]} == wanted


@pytest.mark.parametrize("field", ["seconds", "low_copies"])
def test_the_plan_counts_linears_by_their_scaling(field: str) -> None:
    def planned(precision: PrecisionConfig) -> float:
        plan = make_plan(_recipe(**{"precision": replace(precision, backend="te"), "data.row_tokens": 8192,
                                    "model.hidden": 2048, "model.ffn": 8192}), world=1, device=device_named("gb200"))  # fmt: skip
        return plan.time.seconds if field == "seconds" else plan.memory[0].low_copies

    plain, rules, high = (
        planned(one) for one in (PrecisionConfig("bf16", scaling="nvfp4"), SUPER, PrecisionConfig("bf16"))
    )
    assert sorted([plain, rules, high], reverse=field == "low_copies") == [plain, rules, high]
    assert plain != rules != high
