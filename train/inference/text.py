"""Text from a checkpoint of a run, as a stream of whole characters."""

from collections.abc import Iterator
from pathlib import Path

from data.tokenizer import load_tokenizer
from recipes.schema.errors import CheckpointError, refuse
from recipes.schema.recipe import Recipe
from recipes.schema.rules import reading_problems
from recipes.schema.teacher_rules import tokenizer_problems
from recipes.schema.tools import GenerateConfig
from train.build import model_on_one_rank, open_tokenizer
from train.checkpoint.manager import CheckpointFolder, checkpoint_at
from train.inference.decode import Sampling, generate
from train.megatron import choose_device, use_device
from train.quantize.directory import is_quantized


def stream_text(recipe: Recipe, config: GenerateConfig) -> Iterator[str]:
    """Yield the prompt and then the model's text, in pieces of whole characters.

    For a run without a checkpoint, `run.start_from` is read instead. Raises CheckpointError if there is neither.
    """

    refuse(reading_problems(recipe))
    device = choose_device(recipe.run.device)
    tokenizer, tokenizer_file = open_tokenizer(recipe)
    use_device(device)

    path, fingerprint = _weights_of(recipe, config)
    ours, another = tokenizer.fingerprint, "name another checkpoint (+generate.checkpoint)"
    refuse(
        tokenizer_problems(str(path), fingerprint, ours, where=str(tokenizer_file), otherwise=another), CheckpointError
    )
    with model_on_one_rank(recipe, path, device=device) as model:
        ids = tokenizer.prompt(config.prompt)
        sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
        decoder = tokenizer.incremental_decoder()
        yield config.prompt
        for token in generate(model, ids, tokens=config.tokens, sampling=sampling, end_of_document=tokenizer.eod):
            yield decoder.feed(token)
        yield decoder.finish()


def _weights_of(recipe: Recipe, config: GenerateConfig) -> tuple[Path, str]:
    """(checkpoint or directory of quantised weights, fingerprint of its tokenizer; empty if it has none)."""
    if config.checkpoint is not None and is_quantized(Path(config.checkpoint)):
        path = Path(config.checkpoint)
        file = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)
        return path, "" if file is None else load_tokenizer(file, recipe.data.tokenizer).fingerprint
    folder = Path(recipe.run.folder) / recipe.run.name / "checkpoints"
    found = CheckpointFolder(folder, recipe.checkpoint).newest() if config.checkpoint is None else None
    if found is None:
        place = config.checkpoint or recipe.run.start_from
        if place is None:
            raise CheckpointError(f"{folder} contains no checkpoint. Train first: stratum train -cn <recipe>.")
        found = checkpoint_at(place)
    return found[0], found[1].tokenizer
