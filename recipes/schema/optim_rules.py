"""Fields of the `optim` group that would do nothing. `recipes.schema.rules.problems` calls these rules, and `notes` the notes."""

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


def optim_notes(optim: OptimConfig, *, steps: int) -> list[Problem]:
    """An average that is longer than the run. steps: of the whole run."""
    span = round(1 / (1 - optim.ema_decay))
    if span <= steps:
        return []
    text = f"optim.ema_decay={optim.ema_decay:g} averages over about {span:,} steps, but the run has {steps:,}: most of the "
    text += "average is the weights after the first update."
    return [Problem("optim.ema_decay", text, f"Use a value below {1 - 1 / steps:.6g}.")]
