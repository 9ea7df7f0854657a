"""Texts that the model writes at each held-out evaluation (`evaluate.sample_prompts`), with the weights that train.

prompts --> continuations, drawn with the run's seed --> a line of kind "samples" in metrics.jsonl

A text depends on the weights, its prompt and the seed only: not on the other prompts, the number of ranks, or a resume.
"""

from data.tokenizer import Tokenizer
from recipes.schema.errors import NumericsError, RecipeError
from recipes.schema.recipe import Recipe
from train.engine import Engine, live_model
from train.evaluate.decoder import BatchedDecoder
from train.inference.request import Sampling

_TEMPERATURE = 0.8
"""As `stratum generate`: greedy texts of small models repeat themselves."""


def prompt_samples(recipe: Recipe, engine: Engine, *, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """{"prompt", "text"} of each prompt of the recipe, in order. Collective over the world; the same on every rank.

    Raises NumericsError if logits are not finite, RecipeError if the memory has no room for a prompt and its text.
    """
    config = recipe.evaluate
    decoder = BatchedDecoder(live_model(engine), recipe.model, tokenizer, mesh=engine.mesh)
    try:
        texts = decoder.generate(
            config.sample_prompts,
            max_new_tokens=config.sample_tokens,
            stop=(),
            sampling=Sampling(temperature=_TEMPERATURE, seed=recipe.run.seed),
        )
    except NumericsError as error:
        raise NumericsError(
            f"evaluate.sample_prompts: {error} Continue from an earlier checkpoint with a lower learning rate."
        ) from error
    except RecipeError as error:
        raise RecipeError(f"evaluate.sample_prompts, sample_tokens={config.sample_tokens:,}: {error}") from error
    return [{"prompt": prompt, "text": text} for prompt, text in zip(config.sample_prompts, texts, strict=True)]
