"""Fields of the `optim` group that would do nothing. `recipes.schema.rules.problems` calls these rules."""

import dataclasses

from recipes.schema.errors import Problem
from recipes.schema.model import ModelConfig
from recipes.schema.optim import MuonConfig, OptimConfig
from recipes.schema.parameter_groups import group_problems
from recipes.schema.pattern import pattern_problems


def optim_problems(optim: OptimConfig, model: ModelConfig) -> list[Problem]:
    """Rules of groups that do nothing, and fields of Muon that are set although AdamW updates all parameters."""
    found = [] if pattern_problems(model.pattern) else group_problems(optim.groups, model)
    if optim.kind == "muon":
        return found
    for field in dataclasses.fields(MuonConfig):
        value = getattr(optim.muon, field.name)
        if value != field.default:
            text = f"optim.muon.{field.name}={str(value).lower()} does nothing, because optim.kind={optim.kind}."
            found.append(Problem(f"optim.muon.{field.name}", text, "Use optim.kind=muon, or leave it out."))
    return found
