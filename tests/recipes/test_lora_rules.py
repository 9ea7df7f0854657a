"""Fields of `model.lora`: what is refused, and counts of parameters by hand."""

from dataclasses import replace

import pytest
from tiny import TINY, recipe_with

from recipes.schema.lora import LoraConfig, adapted_linears
from recipes.schema.optim import ParameterGroupConfig
from recipes.schema.pattern import parameters
from recipes.schema.rules import problems

LORA = LoraConfig(rank=4)


@pytest.mark.parametrize(
    ("changes", "key", "text"),
    [
        ({"model.lora": LoraConfig(alpha=8.0)}, "model.lora.alpha", "does nothing"),
        ({"model.lora": LoraConfig(targets=("*.in_proj",))}, "model.lora.targets", "does nothing"),
        ({"model.lora": LoraConfig(rank=4, targets=("*", "*.qkv"))}, "model.lora.targets", "'*.qkv' matches no linear"),
        ({"model.lora": LoraConfig(rank=4, targets=())}, "model.lora.targets", "an empty list matches"),
        ({"model.lora": LORA, "run.start_from": None}, "run.start_from", "would stay random"),
        ({"model.lora": LORA, "model.head": "scalar"}, "model.lora.rank", "freezes the head"),
        ({"model.lora": LORA, "model.mtp.depths": 1}, "model.mtp.depths", "have no adapters"),
        ({"model.lora": LORA, "optim.kind": "muon"}, "optim.kind", "which model.lora.rank=4 freezes"),
    ],
)
def test_refused(changes: dict[str, object], key: str, text: str) -> None:
    found = problems(recipe_with(**{"run.start_from": "runs/base", **changes}))
    assert any(problem.key == key and text in problem.text for problem in found), found


def test_a_group_rule_of_frozen_weights_is_refused() -> None:
    rules = (ParameterGroupConfig("embedding.*", lr_factor=0.1), ParameterGroupConfig("*_adapter.up", lr_factor=16.0))
    found = problems(recipe_with(**{"run.start_from": "x", "model.lora": LORA, "optim.groups": rules}))
    assert [problem.key for problem in found] == ["optim.groups[0].match"]


def test_parameters() -> None:
    targets = ("*.in_proj", "decoder.layers.3.*", "*.linear_fc2")
    model = replace(TINY, pattern="M-M*E", lora=LoraConfig(rank=2, targets=targets))
    assert adapted_linears(model.lora, "M-M*E") == {
        0: ("mixer.in_proj",),
        1: ("mlp.linear_fc2",),
        2: ("mixer.in_proj",),
        3: ("self_attention.linear_qkv", "self_attention.linear_proj"),
    }
    in_proj = 64 + (128 + 128 + 32 + 32 + 8)  # hidden; z, x, B, C, dt
    qkv, proj, fc2 = 64 + (64 + 32 + 32), 64 + 64, 128 + 64
    count = parameters(model)
    assert count.adapters == count.trained == 2 * (2 * in_proj + qkv + proj + fc2)
    assert count.total - count.adapters == parameters(replace(model, lora=LoraConfig())).total
