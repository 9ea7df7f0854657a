"""Text from a checkpoint of a run, as a stream of whole characters."""

from collections.abc import Iterator
from pathlib import Path

from recipes.schema.errors import CheckpointError, refuse
from recipes.schema.recipe import Recipe
from recipes.schema.rules import reading_problems
from recipes.schema.teacher_rules import tokenizer_problems
from recipes.schema.tools import GenerateConfig
from train.build import model_on_one_rank, open_tokenizer
from train.checkpoint.manager import CheckpointFolder, checkpoint_at
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Request, Sampling
from train.megatron import choose_device, use_device


def stream_text(recipe: Recipe, config: GenerateConfig) -> Iterator[str]:
    """Yield the prompt and then the model's text, in pieces of whole characters.

    For a run without a checkpoint, `run.start_from` is read instead. Raises CheckpointError if there is neither.
    """

    refuse(reading_problems(recipe))
    device = choose_device(recipe.run.device)
    tokenizer, tokenizer_file = open_tokenizer(recipe)
    use_device(device)

    folder = Path(recipe.run.folder) / recipe.run.name / "checkpoints"
    found = CheckpointFolder(folder, recipe.checkpoint).newest() if config.checkpoint is None else None
    if found is None:
        place = config.checkpoint or recipe.run.start_from
        if place is None:
            raise CheckpointError(f"{folder} contains no checkpoint. Train first: stratum train -cn <recipe>.")
        found = checkpoint_at(place)
    path, manifest = found
    ours, another = tokenizer.fingerprint, "name another checkpoint (+generate.checkpoint)"
    refuse(
        tokenizer_problems(str(path), manifest.tokenizer, ours, where=str(tokenizer_file), otherwise=another),
        CheckpointError,
    )
    with model_on_one_rank(recipe, path, device=device) as model:
        ids = tokenizer.prompt(config.prompt)
        sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)
        request = Request(ids, config.tokens, sampling=sampling, stop=frozenset({tokenizer.eod}))
        engine = InferenceEngine(model, recipe.model, EngineConfig(rows=1, context_tokens=len(ids) + config.tokens))
        engine.add(request)
        decoder = tokenizer.incremental_decoder()
        yield config.prompt
        while not engine.is_idle:
            for event in engine.step():
                if event.token is not None:
                    yield decoder.feed(event.token.id)
        yield decoder.finish()
