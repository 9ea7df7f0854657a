"""With `parallel.overlap_param_gather`, Megatron waits for gathered weights in a hook before the forward pass of the module that
owns them. A weight that is read without calling its module may be that of the step before."""

from typing import Any

import pytest
from expert_models import MIXTURE
from media_rows import AUDIO, VISION, media_rows
from ranks import run_ranks
from tiny import GEMMA, engine_of, recipe_with, rows_of, steps_of

from recipes.schema.lora import LoraConfig

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, gated, norms of queries and keys": GEMMA | {"model.qk_norm": True},
    "experts": MIXTURE,
    "further depths": {"model.mtp.depths": 1},
    "adapters": {"model.lora": LoraConfig(rank=4)},
    "encoders": {"model.vision": VISION, "model.audio": AUDIO},
}


def not_called(_rank: int, changes: dict[str, Any]) -> list[str]:
    """For `run_ranks`: the modules with trained weights of their own that a training step does not call."""
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=0, world=1) as engine:
        owners, called = set(), set()
        for chunk in engine.chunks:
            for name, module in chunk.module.named_modules():
                if any(weight.requires_grad for weight in module.parameters(recurse=False)):
                    owners.add(name)
                    module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        steps_of(engine, recipe, range(1), rows=media_rows if recipe.model.has_encoders else rows_of)
        assert len(owners) > 10
        return sorted(owners - called)


@pytest.mark.parametrize("name", MODELS)
def test_every_module_with_weights_is_called(name: str) -> None:
    assert run_ranks(1, not_called, MODELS[name]) == [[]]
