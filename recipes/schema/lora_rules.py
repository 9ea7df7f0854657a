"""What does not work with adapters (`model.lora`), each refused by name, for `recipes.schema.rules.problems` and the tools."""

from recipes.schema.errors import Problem
from recipes.schema.lora import lora_problems
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds, pattern_problems
from recipes.schema.recipe import Recipe


def adapter_problems(recipe: Recipe) -> list[Problem]:
    """Fields that do nothing, frozen weights that would stay random, and an optimizer for which adapters are no matrices."""
    model, found = recipe.model, []
    if pattern_problems(model.pattern):
        return []
    found += lora_problems(model.lora, layer_kinds(model.pattern))
    if not model.lora.rank:
        return found
    rank = f"model.lora.rank={model.lora.rank}"
    if recipe.run.start_from is None:
        text = f"{rank} trains adapters only, and run.start_from=null: all other weights would stay random."
        found.append(Problem("run.start_from", text, "Name the run or checkpoint to adapt, or use model.lora.rank=0."))
    if model.head == "scalar":
        text = f"{rank} freezes the head, but a reward model's (model.head=scalar) is drawn at random when it starts."
        found.append(Problem("model.lora.rank", text, "Use model.lora.rank=0."))
    if model.mtp.depths:
        text = f"{rank}: the layers of model.mtp.depths={model.mtp.depths} have no adapters and would not follow the model."
        found.append(Problem("model.mtp.depths", text, "Use model.mtp.depths=0: the run starts without them."))
    if recipe.optim.kind == "muon":
        text = f"optim.kind=muon updates the matrices of layers, which {rank} freezes; adapters are trained with AdamW."
        found.append(Problem("optim.kind", text, "Use optim.kind=adamw."))
    return found


def folded_problems(model: ModelConfig, *, place: str, what: str, key: str) -> list[Problem]:
    """A model with adapters where a tool needs plain weights. place: the checkpoint; what: the tool; key: its field."""
    if not model.lora.rank:
        return []
    text = f"{place} has adapters (model.lora.rank={model.lora.rank}), which {what} does not support."
    return [Problem(key, text, "Add them to the weights first: stratum merge RUN --adapters --out NEW.")]
