"""Opening a run, or one of its checkpoints, for inference: model, tokenizer and what identifies both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from recipes.schema.errors import CheckpointError, refuse
from recipes.schema.recipe import Recipe
from recipes.schema.rules import reading_problems
from recipes.schema.teacher_rules import tokenizer_problems
from train.build import model_on_one_rank, open_tokenizer
from train.checkpoint.manager import CheckpointFolder, checkpoint_at
from train.megatron import choose_device, use_device


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to read tokens."""

    model: Any
    tokenizer: Tokenizer
    checkpoint: Path

    @property
    def fingerprint(self) -> str:
        """Identifies weights and tokenizer, for keys of the prefix cache."""
        return f"{self.checkpoint.resolve()} {self.tokenizer.fingerprint}"


@contextmanager
def loaded_model(recipe: Recipe, checkpoint: str | None = None) -> Iterator[LoadedModel]:
    """The model of a run with the weights of `checkpoint`, or of its newest one; without any, of `run.start_from`.

    Raises CheckpointError if there is none, or if it was trained with another tokenizer.
    """
    refuse(reading_problems(recipe))
    device = choose_device(recipe.run.device)
    tokenizer, tokenizer_file = open_tokenizer(recipe)
    use_device(device)

    folder = Path(recipe.run.folder) / recipe.run.name / "checkpoints"
    found = CheckpointFolder(folder, recipe.checkpoint).newest() if checkpoint is None else None
    if found is None:
        place = checkpoint or recipe.run.start_from
        if place is None:
            raise CheckpointError(f"{folder} contains no checkpoint. Train first: stratum train -cn <recipe>.")
        found = checkpoint_at(place)
    path, manifest = found
    ours, another = tokenizer.fingerprint, "name another checkpoint (--checkpoint)"
    refuse(
        tokenizer_problems(str(path), manifest.tokenizer, ours, where=str(tokenizer_file), otherwise=another),
        CheckpointError,
    )
    with model_on_one_rank(recipe, path, device=device) as model:
        yield LoadedModel(model, tokenizer, path)
