"""A run in a notebook: its model with the weights of a checkpoint, its rows, its steps, its activations.

    from train.notebook import open_run
    with open_run("smoke") as run:
        batch = run.batch(100)
        found = run.look(batch)
        found.loss, found.activations["decoder.layers.3"].std()

Nothing on the disk is changed: steps change the model in memory only. A run of any layout is opened in one process, without
parallelism.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from data.batch import Batch
from data.dataset import Dataset
from recipes.schema.errors import RecipeError
from recipes.schema.options import run_named
from recipes.schema.parallel import ParallelConfig
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import METRICS, Line, read_metrics, recipe_in
from train.build import build_engine, check, mesh_of, open_data
from train.checkpoint.manager import checkpoint_at
from train.engine import Engine, live_model
from train.megatron import choose_device, use_device
from train.objective.next_token import local_rows
from train.record.stopwatch import Stopwatch
from train.replay.execute import of_run
from train.step import train_step


@dataclass(frozen=True)
class Looked:
    """What the model made of a batch. Tensors are copies without gradients, on the CPU."""

    loss: float
    """Mean next-token loss, nats per label."""
    losses: torch.Tensor
    """Of every label, [rows, tokens]."""
    activations: Mapping[str, torch.Tensor]
    """Output of every chosen module by its name; of a layer: [tokens, rows, hidden]."""


@dataclass(frozen=True)
class Stepped:
    """The result of one update in memory."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class OpenRun:
    """A run with the weights of one checkpoint. Get it from `open_run`; it can be used inside the `with` only."""

    folder: Path
    recipe: Recipe
    checkpoint: Path
    step_of_checkpoint: int
    data: Dataset
    engine: Engine

    def metrics(self) -> list[Line]:
        """The lines of metrics.jsonl, oldest first."""
        return read_metrics(self.folder / METRICS)

    def modules(self) -> list[str]:
        """Names of the model's modules, for `look`."""
        return [name for name, _ in live_model(self.engine).named_modules() if name]

    def batch(self, step: int) -> Batch:
        """The rows that step `step` (1 is the first) trained on, [run.global_rows, data.row_tokens]."""
        rows = self.recipe.run.global_rows
        if not 1 <= step <= self.recipe.run.steps:
            raise RecipeError(f"step {step} is not a step of this run. Use 1 to run.steps={self.recipe.run.steps}.")
        return self.data.training_rows(np.arange((step - 1) * rows, step * rows))

    def look(self, batch: Batch, *, modules: str = "decoder.layers.") -> Looked:
        """Losses and activations of a batch, without an update.

        modules: outputs of the modules whose name is this and a number, or exactly this.
        """
        model, found, hooks = live_model(self.engine), dict[str, torch.Tensor](), []

        def keep(name: str) -> torch.utils.hooks.RemovableHandle:
            def hook(_module: torch.nn.Module, _inputs: object, output: object) -> None:
                value = output[0] if isinstance(output, tuple) else output
                if isinstance(value, torch.Tensor):
                    found[name] = value.detach().float().cpu().clone()

            return named[name].register_forward_hook(hook)

        named = dict(model.named_modules())
        chosen = [name for name in named if name == modules or name.removeprefix(modules).isdigit()]
        if not chosen:
            raise RecipeError(f"no module is named {modules!r}. `run.modules()` lists the names.")
        is_training = model.training
        model.eval()
        try:
            hooks = [keep(name) for name in chosen]
            rows = local_rows(batch, self.engine.mesh, reset_at_documents=self.engine.reset_at_documents)
            with torch.no_grad():
                losses = model(rows.tokens, rows.positions, None, labels=rows.labels, packed_seq_params=rows.context)
        finally:
            for hook in hooks:
                hook.remove()
            model.train(is_training)
        losses = losses.float().cpu()
        learned = losses if rows.learned is None else losses[rows.learned.cpu()]
        return Looked(float(learned.double().mean()), losses, MappingProxyType(found))

    def step(self, batch: Batch, *, learning_rate: float) -> Stepped:
        """One update of the weights in memory, with moments that start at zero."""
        size = self.recipe.run.microbatch_rows
        pieces = [batch.select(np.arange(start, start + size)) for start in range(0, len(batch.tokens), size)]
        result = train_step(
            self.engine, pieces, step=self.step_of_checkpoint, learning_rate=learning_rate, watch=Stopwatch()
        )
        return Stepped(float(result.loss), float(result.grad_norm))


@contextmanager
def open_run(run: str | Path, *, checkpoint: str | Path | None = None) -> Iterator[OpenRun]:
    """Open a run by its folder or its name in runs/, with its newest checkpoint or the given one.

    Only for runs that learn from prepared text or chats by next tokens. Raises RecipeError, CheckpointError, DataError.
    """
    folder = run_named(str(run))
    recipe = recipe_from_mapping(recipe_in(folder))
    if recipe.objective.kind != "next_token":
        raise RecipeError(
            f"{folder} has objective.kind={recipe.objective.kind}. A notebook opens runs that learn next tokens: next_token."
        )
    recipe = replace(recipe, parallel=ParallelConfig())
    path, manifest = checkpoint_at(str(checkpoint if checkpoint is not None else folder))
    data = of_run(open_data(recipe), folder)  # rows that the run left out after a spike were not trained on
    device = choose_device(recipe.run.device)
    use_device(device)
    with mesh_of(recipe, check(recipe, world=1), device=device, rank=0) as mesh:
        engine = build_engine(recipe, mesh, weights=path, tokenizer=data.tokenizer.fingerprint)
        yield OpenRun(folder, recipe, path, manifest.step, data, engine)
