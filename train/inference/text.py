"""Generates text from a checkpoint of a run: one text as a stream of whole characters, or a batch of texts as records.

Other callers get the same model, tokenizer and drafter from `opened`, which checks that they match.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.chat.record import checked_messages
from data.chat.template import open_template
from data.tokenizer import Tokenizer, load_tokenizer
from recipes.schema.encoder_rules import placeholder_problems
from recipes.schema.errors import CheckpointError, DataError, RecipeError, refuse
from recipes.schema.foreign import parse_json
from recipes.schema.objective_rules import language_model_problems
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.rules import reading_problems
from recipes.schema.teacher_rules import tokenizer_problems
from recipes.schema.tools import GenerateConfig, ServeConfig
from train.build import models_for_inference, open_tokenizer
from train.checkpoint.manager import CheckpointFolder, checkpoint_at
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.depth_drafter import DepthDrafter
from train.inference.draft_model import DraftModel
from train.inference.drafters import Drafter, PromptLookup
from train.inference.request import Event, Request, Sampling, Token
from train.megatron import choose_device, use_device
from train.quantize.directory import is_quantized

Prompt = str | list[dict[str, Any]]
"""A text, or the messages of a chat."""
LOOKUP = "lookup"
DEPTHS = "mtp"
"""The values of --speculate that need no draft model."""


@dataclass(frozen=True)
class Opened:
    """A model that is ready to generate, and the tokenizer of its texts."""

    model: Any
    tokenizer: Tokenizer
    checkpoint: Path
    drafter: Drafter | None = None
    """For one engine."""

    @property
    def fingerprint(self) -> str:
        """Identifies weights and tokenizer in the keys of the prefix cache."""
        return f"{self.checkpoint.resolve()} {self.tokenizer.fingerprint}"


@contextmanager
def opened(recipe: Recipe, *, checkpoint: str | None = None, speculate: str | None = None) -> Iterator[Opened]:
    """The model of a run with the weights of its newest checkpoint, or of the given one.

    For a run without a checkpoint, `run.start_from` is read instead. speculate: `lookup`, `mtp`, or the run or checkpoint of a
    draft model. Raises CheckpointError if there is no checkpoint, or if one was trained with another tokenizer.
    """
    refuse(reading_problems(recipe))
    device = choose_device(recipe.run.device)
    tokenizer, tokenizer_file = open_tokenizer(recipe)
    use_device(device)

    path, fingerprint = _weights_of(recipe, checkpoint)
    refuse(language_model_problems(recipe.model, place=str(path)))
    ours, another = tokenizer.fingerprint, "name another checkpoint (+generate.checkpoint)"
    refuse(
        tokenizer_problems(str(path), fingerprint, ours, where=str(tokenizer_file), otherwise=another), CheckpointError
    )
    draft = []
    if speculate == DEPTHS and not recipe.model.mtp.depths:
        raise RecipeError(
            f"--speculate {DEPTHS} needs a model with further depths, but model.mtp.depths=0. Use --speculate {LOOKUP}, or the "
            "run of a draft model."
        )
    if speculate not in (None, LOOKUP, DEPTHS):
        place, manifest = checkpoint_at(speculate)
        text = "name a draft model with that tokenizer (--speculate)"
        where = str(tokenizer_file)
        refuse(tokenizer_problems(str(place), manifest.tokenizer, ours, where=where, otherwise=text), CheckpointError)
        # Its caches are in the model's memory and number format.
        draft = [(replace(recipe_from_mapping(manifest.recipe), precision=recipe.precision), place)]
        refuse(language_model_problems(draft[0][0].model, place=f"--speculate {place}", key="--speculate"))
    with models_for_inference([(recipe, path), *draft], device=device) as (model, *others):
        drafter: Drafter | None = PromptLookup() if speculate == LOOKUP else None
        if speculate == DEPTHS:
            drafter = DepthDrafter(model, recipe.model)
        if others:
            drafter = DraftModel(others[0], draft[0][0].model)
        yield Opened(model, tokenizer, path, drafter)


def stream_text(recipe: Recipe, config: GenerateConfig) -> Iterator[str]:
    """Yield the prompt and then the model's text, in pieces of whole characters; of a chat the answer alone. Errors: see
    `opened`; ChatError for a prompt that the chat template cannot take."""
    guesses = draft_tokens(config)
    with opened(recipe, checkpoint=config.checkpoint, speculate=config.speculate) as it:
        ((ids,), stop) = _prompts(recipe, config, [config.prompt], it.tokenizer)
        (request,) = _requests(ids, config, stop=stop)
        engine = _engine(recipe, it, rows=1, context=len(ids) + config.tokens, guesses=guesses)
        engine.add(request)
        decoder = it.tokenizer.incremental_decoder()
        # Before the prompt is printed: the first step loads kernels, and its warnings must not appear inside the text.
        events = engine.step()
        if not config.chat:
            yield config.prompt
        while events or not engine.is_idle:
            for event in events:
                if event.token is not None:
                    yield decoder.feed(event.token.id)
            events = engine.step()
        yield decoder.finish()


def generate_records(recipe: Recipe, config: GenerateConfig) -> Iterator[dict[str, Any]]:
    """Continue all prompts in one batch, `config.n` times each. -> a JSON record for each text, in the order of the prompts.

    Errors: see `opened`; DataError for a file of prompts that cannot be read.
    """
    prompts: Sequence[Prompt] = [config.prompt]
    if config.prompts is not None:
        prompts = read_prompts(Path(config.prompts), is_chat=config.chat)
    guesses = draft_tokens(config)
    with opened(recipe, checkpoint=config.checkpoint, speculate=config.speculate) as it:
        ids, stop = _prompts(recipe, config, prompts, it.tokenizer)
        requests = [request for one in ids for request in _requests(one, config, stop=stop)]
        context = max(map(len, ids)) + config.tokens
        engine = _engine(recipe, it, rows=min(len(requests), config.batch), context=context, guesses=guesses)
        for place, events in enumerate(engine.run(requests)):
            tokens = [event.token for event in events if event.token is not None]
            yield {
                "prompt": prompts[place // config.n],
                "sample": place % config.n,
                "text": it.tokenizer.decode([token.id for token in tokens]),
                "finish": events[-1].finish,
                **_logprobs(tokens, events, config.logprobs),
                **(_speculation(events) if it.drafter is not None else {}),
            }


def _prompts(
    recipe: Recipe, config: GenerateConfig, prompts: Sequence[Prompt], tokenizer: Tokenizer
) -> tuple[list[list[int]], frozenset[int]]:
    """(ids of each prompt, ids that end a text)."""
    end = frozenset({tokenizer.eod})
    if not config.chat:
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        refuse(placeholder_problems(recipe, texts, key="--prompt" if config.prompts is None else "--prompts"))
        return [tokenizer.prompt(text) for text in texts], end
    with open_template(config.chat_template or recipe.data.chat.template, tokenizer) as template:
        chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
        return [template.ids(chat) for chat in chats], end | template.stop_ids


def _engine(recipe: Recipe, it: Opened, *, rows: int, context: int, guesses: int) -> InferenceEngine:
    sizes = EngineConfig(rows=rows, context_tokens=context, draft_tokens=guesses)
    return InferenceEngine(it.model, recipe.model, sizes, drafter=it.drafter)


def draft_tokens(config: GenerateConfig | ServeConfig) -> int:
    """The largest number of guesses at a time. RecipeError if it is given without a drafter."""
    if config.draft_tokens is not None and config.speculate is None:
        raise RecipeError(
            f"--draft-tokens {config.draft_tokens} has no effect without --speculate. Add --speculate lookup, or the run of a "
            "draft model."
        )
    return EngineConfig().draft_tokens if config.draft_tokens is None else config.draft_tokens


def _speculation(events: list[Event]) -> dict[str, Any]:
    """How many tokens were guessed, how many of these were right, and in how many steps the text was written."""
    steps = [event.guesses for event in events if event.guesses is not None]
    right = sum(event.token.is_guessed for event in events if event.token is not None)
    return {"speculation": {"guessed": sum(steps), "accepted": right, "steps": len(steps)}}


def _requests(ids: list[int], config: GenerateConfig, *, stop: frozenset[int]) -> list[Request]:
    """The `config.n` requests of one prompt; their seeds count up from the given one."""
    base = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    return [
        Request(
            ids, config.tokens, sampling=replace(base, seed=config.seed + sample), stop=stop,
            top_logprobs=config.logprobs or 0,
        )
        for sample in range(config.n)
    ]  # fmt: skip


def _logprobs(tokens: list[Token], events: list[Event], count: int | None) -> dict[str, Any]:
    if events[-1].finish == "error":
        return {"error": events[-1].message}
    if count is None:
        return {}
    found: dict[str, Any] = {"tokens": [token.id for token in tokens], "logprobs": [token.logprob for token in tokens]}
    return found | ({"top_logprobs": [dict(token.top) for token in tokens]} if count else {})


def read_prompts(path: Path, *, is_chat: bool = False) -> list[Prompt]:
    """The prompts of a file, one per line. A line of a `.jsonl` file is a JSON string, or an object with the text `prompt`; of
    chats also an object with `messages`."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the prompts in {path}: {error}. Name a text file with a prompt on each line."
        ) from error
    if not lines:
        raise DataError(f"{path} has no prompts. Write one on each line.")
    if path.suffix != ".jsonl":
        return [*lines]
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{path}: prompt {number} is not JSON ({error}). Write a JSON string or an object."
            ) from error
        if is_chat and isinstance(value, dict) and "messages" in value:
            try:
                prompts.append(checked_messages(value["messages"]))
            except ValueError as error:
                raise DataError(f"{path}: prompt {number}: {error}.") from error
            continue
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise DataError(
                f'{path}: prompt {number} has no text. Write a JSON string, or an object with "prompt": "...".'
            )
        prompts.append(text)
    return prompts


def _weights_of(recipe: Recipe, checkpoint: str | None) -> tuple[Path, str]:
    """(checkpoint or directory of quantised weights, fingerprint of its tokenizer; empty if not known)."""
    if checkpoint is not None and is_quantized(Path(checkpoint)):
        path = Path(checkpoint)
        file = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)
        return path, "" if file is None else load_tokenizer(file, recipe.data.tokenizer).fingerprint
    folder = Path(recipe.run.folder) / recipe.run.name / "checkpoints"
    found = CheckpointFolder(folder, recipe.checkpoint).newest() if checkpoint is None else None
    if found is None:
        place = checkpoint or recipe.run.start_from
        if place is None:
            raise CheckpointError(f"{folder} contains no checkpoint. Train first: stratum train -cn <recipe>.")
        found = checkpoint_at(place)
    return found[0], found[1].tokenizer
