"""Runs of a model with encoders: killed and started again, continued at another layout, and with frozen encoders."""

import asyncio
import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed_runs import Kill, Run, contents_at, recipe_in
from media_files import audio_bytes, image_bytes, media_config, pixels, tone, write_jsonl
from media_rows import AUDIO, VISION, media_recipe, media_rows
from ranks import run_ranks
from rich.console import Console
from tiny import Numbers, engine_of, steps_of

from data.prepare import prepare
from data.tokenizer import train_tokenizer
from recipes.schema import checkpoint_steps
from recipes.schema.data import TokenizerConfig
from recipes.schema.encoder_rules import placeholder_problems
from recipes.schema.optim import ParameterGroupConfig
from recipes.schema.recipe import Recipe
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.model.initial import global_names
from train.serve.prompt_ids import PromptEncoder
from train.serve.refusal import ServerRefusal

STEPS = 6


def prepared_recipe(folder: Path) -> Recipe:
    """A recipe of `killed_runs` with encoders, and 40 records of text, an image and a clip."""
    records = []
    for number in range(40):
        image = base64.b64encode(image_bytes(pixels(number))).decode()
        clip = base64.b64encode(audio_bytes(tone(0.2 + number / 100, hertz=300 + number))).decode()
        parts = [{"type": "image", "bytes": image}, {"type": "audio", "bytes": clip}]
        records.append({"content": [*parts, {"type": "text", "text": f" picture and tone {number}"}]})
    data = media_config(folder, write_jsonl(folder / "records.jsonl", records))
    prepare(data, console=Console(file=io.StringIO()))
    recipe = recipe_in(folder, steps_=STEPS)
    vision = replace(VISION, patch=data.media.patch)
    audio = replace(AUDIO, stride=data.media.audio_stride)
    return replace(recipe, data=data, model=replace(recipe.model, vocab=512, vision=vision, audio=audio))


def test_a_killed_run_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    recipe = prepared_recipe(tmp_path)
    whole = Run(replace(recipe, run=replace(recipe.run, name="whole")), 1, folder=tmp_path / "whole_said")
    assert not whole.attempt(None)
    killed = Run(recipe, 1, folder=tmp_path / "killed_said")
    killed.recipe = replace(recipe, run=replace(recipe.run, stop_after_steps=4))  # should the kill be late
    assert killed.attempt(Kill(steps=2, delay_s=0.0))
    killed.recipe = recipe
    assert not killed.attempt(None)
    assert any(line["kind"] == "resume" for line in killed.metrics)
    last = checkpoint_steps.steps_in(whole.checkpoints)[-1].name
    contents = contents_at(whole.checkpoints / last)
    assert any("media.vision" in name for name in contents) and any("media.audio" in name for name in contents)
    assert contents_at(killed.checkpoints / last) == contents


def saved_then_trained(rank: int, recipe: Recipe, world: int, folder: Path) -> Numbers:
    with engine_of(recipe, rank=rank, world=world) as engine:
        steps_of(engine, recipe, range(2), rows=media_rows)
        CheckpointFolder(folder, recipe.checkpoint).save(engine, RunState(step=2, position=8, data_hash="h"))
        return steps_of(engine, recipe, range(2, 4), rows=media_rows)


def resumed_then_trained(rank: int, recipe: Recipe, world: int, folder: Path) -> Numbers:
    with engine_of(recipe, rank=rank, world=world) as engine:
        found = CheckpointFolder(folder, recipe.checkpoint).resume(engine)
        assert found is not None and found.manifest.step == 2 and not found.notes
        return steps_of(engine, recipe, range(2, 4), rows=media_rows)


def test_a_checkpoint_of_two_tensor_ranks_trains_on_at_two_data_ranks(tmp_path: Path) -> None:
    (expected, _) = run_ranks(2, saved_then_trained, media_recipe(**{"parallel.tensor": 2}), 2, tmp_path)
    for numbers in run_ranks(2, resumed_then_trained, media_recipe(), 2, tmp_path):
        assert numbers.losses == pytest.approx(expected.losses, rel=2e-6)
        assert numbers.grad_norms == pytest.approx(expected.grad_norms, rel=2e-6)


def changed_by_training(rank: int, recipe: Recipe) -> dict[str, bool]:
    with engine_of(recipe, rank=rank, world=1) as engine:
        (chunk,) = engine.chunks
        before = {name: weight.detach().clone() for name, weight in global_names(chunk.module)}
        steps_of(engine, recipe, range(2), rows=media_rows)
        return {name: not torch.equal(weight, before[name]) for name, weight in global_names(chunk.module)}


def test_a_rate_of_zero_freezes_an_encoder() -> None:
    groups = [ParameterGroupConfig(match=f"media.{name}.*", lr_factor=0.0) for name in ("vision", "audio")]
    (changed,) = run_ranks(1, changed_by_training, media_recipe(**{"optim.groups": groups}))
    frozen = {name for name in changed if name.startswith(("media.vision.", "media.audio."))}
    assert frozen and not any(changed[name] for name in frozen)
    assert all(changed[name] for name in changed if name not in frozen and "projector" in name)


def test_a_typed_placeholder_is_refused_by_name() -> None:
    prompts = ["a cat", "a <|audio|> cat"]
    (problem,) = placeholder_problems(media_recipe(), prompts, key="--prompts")
    assert "prompt 2 contains '<|audio|>', which stands for media" in str(problem)
    none = {"model.vision": replace(VISION, layers=0), "model.audio": replace(AUDIO, layers=0)}
    assert not placeholder_problems(media_recipe(**none), prompts, key="--prompts")


def test_the_server_refuses_placeholders_of_media_in_prompts() -> None:
    """As text and as ids; without encoders they are ordinary text."""
    special = {"<|image|>": 1, "<|audio|>": 2}
    tokenizer = train_tokenizer(["a <b"] * 9, TokenizerConfig(vocab_size=260, special_tokens=special))
    encoder = PromptEncoder(tokenizer, None, 64, placeholders=tuple(special))
    for prompt in ("a <|audio|> b", [5, tokenizer.special["<|audio|>"]]):
        with pytest.raises(ServerRefusal, match=r"contains '<\|audio\|>', which stands for media"):
            asyncio.run(encoder.prompts([prompt]))
    assert asyncio.run(encoder.prompts(["a <b", [5, 6]]))[1] == [5, 6]
    assert asyncio.run(PromptEncoder(tokenizer, None, 64).prompts(["a <|audio|> b"]))
