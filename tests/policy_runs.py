"""Small runs of GRPO: a hybrid of random weights as the start, a few prompts, rewards that it can learn in seconds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from chats import tokenizer, tokenizer_file
from tiny import RECIPE, Numbers, engine_of, with_fields

from data.prepared import open_prompts
from recipes.schema.align import GrpoConfig
from recipes.schema.data import ChatConfig, DataConfig, TokenizerConfig
from recipes.schema.objective import ObjectiveConfig
from recipes.schema.optim import OptimConfig
from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from train.align.frozen_models import open_frozen_models
from train.align.policy_stream import PolicyStream
from train.build import build_engine, check, mesh_of
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import RunState
from train.engine import Engine
from train.record.stopwatch import Stopwatch
from train.step import train_step

DIGITS = "tests.reward_functions:digit_share"


def prompts_in(folder: Path, *, count: int = 6, function: str = DIGITS, **facts: Any) -> Path:
    """A file of prompts that a reward function judges."""
    path = folder / "prompts.jsonl"
    record = {"verifier": {"kind": "function", "name": function}, **facts}
    path.write_text("".join(json.dumps({"prompt": f"Say {n}.", **record}) + "\n" for n in range(count)))
    return path


def policy_recipe(folder: Path, **changes: Any) -> Recipe:
    """A hybrid of three layers; changes: dotted fields. The start is not there yet (`write_start`)."""
    data = DataConfig(
        folder=str(folder / "none"), tokenizer=TokenizerConfig(path=str(tokenizer_file())), row_tokens=64,
        chat=ChatConfig(template="turns"), reset_at_documents=True,
    )  # fmt: skip
    grpo = GrpoConfig(
        prompts=(str(folder / "prompts.jsonl"),), prompts_per_step=3, generations_per_prompt=4, max_answer_tokens=8,
        allowed_functions=tuple(f"tests.reward_functions:{name}" for name in ("digit_share", "random_reward", "fails")),
    )  # fmt: skip
    recipe = replace(
        RECIPE,
        run=replace(
            RECIPE.run, name="grpo", folder=str(folder), steps=4, global_rows=4, microbatch_rows=1, deterministic=True,
            start_from=str(folder / "start"),
        ),
        model=replace(
            RECIPE.model, pattern="M*-", hidden=32, ffn=64, heads=2, kv_heads=2, head_dim=16, mamba_heads=4,
            mamba_head_dim=8, mamba_state=8, mamba_groups=2, mamba_chunk=8, vocab=400,
        ),
        data=data,
        objective=ObjectiveConfig(kind="grpo", grpo=grpo),
        optim=OptimConfig(lr=3e-3, weight_decay=0.0),
        schedule=replace(RECIPE.schedule, kind="constant"),
        checkpoint=replace(RECIPE.checkpoint, every_steps=1, keep_last=2),
        telemetry=replace(RECIPE.telemetry, log_every_steps=1, tensorboard=False, progress=False),
    )  # fmt: skip
    return with_fields(recipe, changes)


def write_start(rank: int, recipe: Recipe) -> None:
    """For `run_ranks` in one process: a run folder `start` with a checkpoint of random weights."""
    torch.set_num_threads(1)
    with mesh_of(recipe, check(recipe, world=1), device=torch.device("cpu"), rank=rank) as mesh:
        objective = ObjectiveConfig(kind="reward" if recipe.model.head == "scalar" else "next_token")
        engine = build_engine(replace(recipe, objective=objective), mesh)
        state = RunState(recipe=recipe_mapping(recipe), tokenizer=tokenizer().fingerprint)
        CheckpointFolder(Path(recipe.run.folder) / "start" / "checkpoints", recipe.checkpoint).save(engine, state)


@dataclass(frozen=True)
class Learned:
    """Some steps of one process, in full precision."""

    numbers: Numbers
    answers: list[list[int]]
    """Tokens of every answer drawn."""
    rewards: list[float]
    events: list[dict[str, Any]]
    parts: list[list[float]]
    """What the objective reports, by step."""


class Events:
    """Takes the place of a run's telemetry."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.found.append({"kind": kind, **fields})


@contextmanager
def policy_stream(
    engine: Engine, recipe: Recipe, *, start: RunState | None = None, state: dict[str, torch.Tensor] | None = None,
) -> Iterator[tuple[PolicyStream, Events]]:  # fmt: skip
    """A stream of answers of this engine, without a run around it."""
    events = Events()
    prompts = open_prompts(recipe, tokenizer())
    frozen = open_frozen_models(recipe, mesh=engine.mesh, tokenizer=tokenizer().fingerprint, eod=tokenizer().eod)
    with PolicyStream(
        recipe, engine=engine, prompts=prompts, frozen=frozen, telemetry=events,  # type: ignore[arg-type]
        folder=Path(recipe.run.folder), start=start or RunState(), state=state or {}, oldest_step=lambda: 0,
    ) as stream:  # fmt: skip
        yield stream, events


def learn(rank: int, recipe: Recipe, world: int, steps: int) -> Learned:
    """For `run_ranks`: train some steps from the weights that run.seed draws."""
    losses, norms, answers, rewards, parts = [], [], [], [], []
    with engine_of(recipe, rank=rank, world=world) as engine, policy_stream(engine, recipe) as (stream, events):
        for step in range(steps):
            microbatches = next(stream)
            if step % recipe.objective.grpo.updates_per_batch == 0:
                assert stream._batch is not None
                answers += [answer.tokens.tolist() for answer in stream._batch.answers]
                rewards += stream._batch.rewards.reshape(-1).tolist()
            result = train_step(engine, microbatches, step=step, learning_rate=recipe.optim.lr, watch=Stopwatch())
            losses.append(float(engine.mesh.sum_over_world(result.loss.clone())))
            parts.append(engine.mesh.sum_over_world(result.parts.clone()).tolist())
            norms.append(float(result.grad_norm))
    return Learned(Numbers(losses, norms), answers, rewards, events.found, parts)
