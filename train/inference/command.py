"""`python -m train.generate -cn RECIPE`: stream text from the newest checkpoint of a recipe's run.

python -m train.generate -cn smoke +generate.prompt="ROMEO."
python -m train.generate -cn smoke +generate.temperature=0            greedy
python -m train.generate -cn smoke +generate.top_p=0.9 +generate.tokens=400 +generate.seed=7
python -m train.generate -cn smoke +generate.checkpoint=runs/smoke/checkpoints/step_00000120
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from recipes.schema.command import dotted_keys, run_command, section
from recipes.schema.errors import USER_ERRORS, CheckpointError, RecipeError
from recipes.schema.fields import Count, Fraction, NonNegativeFloat, PositiveInt
from recipes.schema.recipe import Recipe
from recipes.schema.typed import FieldError, build


@dataclass(frozen=True)
class GenerateConfig:
    """Fields of `+generate.*` on the command line."""

    prompt: str = "\n"
    """Text to continue."""
    tokens: PositiveInt = 200
    """Tokens to write at most."""
    temperature: NonNegativeFloat = 0.8
    """0 is greedy."""
    top_k: Count = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: Fraction = 0.95
    """Only the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the picks: the same seed and checkpoint give the same text."""
    checkpoint: str | None = None
    """A checkpoint folder; null takes the newest of the run."""


def main() -> int:
    """Entry point of `python -m train.generate`."""
    return run_command(_generate, program="train.generate", keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _generate(composed: DictConfig) -> int:
    from recipes.schema.read import read_recipe

    try:
        config = build(GenerateConfig, section(composed, "generate"), "generate")
    except FieldError as error:
        raise RecipeError(str(error)) from error
    for piece in stream_text(read_recipe(composed), config):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def stream_text(recipe: Recipe, config: GenerateConfig) -> Iterator[str]:
    """Yield the prompt and then the text the model writes, in pieces as they become whole characters.

    A run without a checkpoint is read where it starts from (`run.start_from`). Raises CheckpointError where there is
    neither.
    """
    from train.parallel.device import choose_device, prepare
    from train.run import model_on_one_rank, open_tokenizer

    device = choose_device(recipe.run.device)
    tokenizer, tokenizer_file = open_tokenizer(recipe)
    prepare(device)

    from train.checkpoint.manager import CheckpointFolder, checkpoint_at
    from train.inference.decode import Sampling, generate

    folder = Path(recipe.run.folder) / recipe.run.name / "checkpoints"
    found = CheckpointFolder(folder, recipe.checkpoint).newest() if config.checkpoint is None else None
    if found is None:
        place = config.checkpoint or recipe.run.start_from
        if place is None:
            raise CheckpointError(f"{folder} holds no checkpoint. Train first: python -m train -cn <recipe>.")
        found = checkpoint_at(place)
    path, manifest = found
    if manifest.tokenizer and manifest.tokenizer != tokenizer.fingerprint:
        raise CheckpointError(
            f"{path} was trained with another tokenizer than {tokenizer_file}: its text would be gibberish. Point "
            f"data.folder at the data it was trained on."
        )
    with model_on_one_rank(recipe, path, device=device) as model:
        ids = tokenizer.encode(config.prompt) or [tokenizer.eod]
        sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
        decoder = tokenizer.incremental_decoder()
        yield config.prompt
        for token in generate(model, ids, tokens=config.tokens, sampling=sampling, end_of_document=tokenizer.eod):
            yield decoder.feed(token)
        yield decoder.finish()


if __name__ == "__main__":
    sys.exit(main())
