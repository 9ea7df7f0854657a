"""The plan of alignment: memory of references and reward models, rows of a step of GRPO."""

import pytest

from launch.compose import compose
from launch.plan.cost.device import device_named
from launch.plan.planner import Plan, make_plan
from recipes.schema.recipe import Recipe
from recipes.schema.units import GIB


def plan_of(*words: str, world: int) -> Plan:
    recipe = compose(["-cn", *words], program="plan")
    assert isinstance(recipe, Recipe)
    return make_plan(recipe, world=world, device=device_named("h100"))


@pytest.mark.parametrize(
    ("name", "tensor", "world", "parameters", "rows"),
    [  # published sizes; answers of 8,192 tokens: one in a row of 16,384 with its prompt; of 1,024: seven in a row of 8,192
        ("align_nano_12b_v2_ifeval", 8, 64, 12.31e9, 512),
        ("align_nano_12b_v2_rlhf", 8, 64, 12.31e9 + (12.31e9 - 131_072 * 5_120), 512),
        ("align_gemma2_2b_rlhf", 4, 32, 2.614e9 + 27.227e9, 80),
    ],
)
def test_a_plan_of_grpo_has_its_frozen_models_and_all_its_answers(
    name: str, tensor: int, world: int, parameters: float, rows: int
) -> None:
    found = plan_of(name, world=world)
    assert found.memory[0].teacher == pytest.approx(2 * parameters / tensor, rel=1e-3)
    assert found.recipe.run.global_rows == rows == found.layout.microbatches_per_step * found.layout.data
    assert any("the time of a step is that of the update" in warning for warning in found.warnings)
    without = plan_of(name, "objective.grpo.kl_weight=0", "objective.grpo.reward_model=null", world=world)
    assert without.memory[0].teacher == 0


def test_the_caches_of_many_answers_take_memory_in_the_plan() -> None:
    """Six attention layers, one key head of 128 on each of 8 ranks, 2 bytes: 3 KiB a token; 2,048 rows of 16,384 tokens."""
    few = plan_of("align_nano_12b_v2_ifeval", world=64)
    many = plan_of("align_nano_12b_v2_ifeval", "objective.grpo.generation_rows=2048", world=64)
    assert few.memory[0].answers == 0, "64 caches fit where the activations are during the update"
    idle = few.memory[0].activations + few.memory[0].workspace
    assert many.memory[0].answers + idle > 2048 * 16_384 * 6 * 2 * 128 * 2 > 90 * GIB


def test_an_unknown_reward_model_is_named_in_the_plan() -> None:
    found = plan_of("align_nano_12b_v2_rlhf", "objective.grpo.reward_model=runs/nobody", world=64)
    assert any("runs/nobody is not on this disk" in warning for warning in found.warnings)


def test_an_online_reference_of_dpo_is_as_large_as_the_model_on_every_stage() -> None:
    words = ("align_nano_12b_v2_dpo", "parallel.pipeline=2")
    found = plan_of(*words, "objective.dpo.reference_log_probs=online", world=64)
    for memory in found.memory:  # the weights that train are in buffers that are padded for the data ranks
        assert 0 <= memory.weights - memory.teacher < 1e-5 * memory.weights
    assert all(memory.teacher == 0 for memory in plan_of(*words, world=64).memory)
