"""The model to compress, built for forward passes at the recipe's layout, from modules that hooks can observe."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.stream import Dataset
from recipes.schema.compress import CompressConfig
from recipes.schema.encoder_rules import without_encoders_problems
from recipes.schema.errors import CheckpointError, RecipeError, refuse
from recipes.schema.expert_rules import dense_problems
from recipes.schema.lora_rules import folded_problems
from recipes.schema.objective_rules import language_model_problems, without_mtp_problems
from recipes.schema.recipe import Recipe
from recipes.schema.rules import vocabulary_problems
from recipes.schema.teacher_rules import tokenizer_problems
from train.checkpoint.manager import checkpoint_at
from train.checkpoint.storage import Manifest, read_weights
from train.distill.teacher import teacher_recipe
from train.engine import Engine
from train.model.backend import ReferenceBackend
from train.model.build import build_model
from train.objective.next_token import count_labels, forward_step
from train.parallel.mesh import Mesh


@dataclass(frozen=True)
class Parent:
    """A checkpoint and the recipe of the run that wrote it."""

    path: Path
    manifest: Manifest
    recipe: Recipe


def parent_of(config: CompressConfig) -> Parent:
    """The checkpoint that `compress.parent` names. RecipeError if not set, CheckpointError if not found."""
    if config.parent is None:
        raise RecipeError("compress.parent is not set: name a checkpoint folder, or a run folder such as runs/NAME.")
    try:
        parent = parent_at(config.parent)
    except CheckpointError as error:
        raise CheckpointError(f"compress.parent: {error}") from error
    place = f"compress.parent={parent.path}"
    refuse(language_model_problems(parent.recipe.model, place=place, key="compress.parent"))
    refuse(dense_problems(parent.recipe.model, place=place, what="pruning", key="compress.parent"))
    if parent.recipe.model.qk_norm:
        raise RecipeError(f"{place} has norms of queries and keys (model.qk_norm), which pruning does not support.")
    refuse(folded_problems(parent.recipe.model, place=place, what="pruning", key="compress.parent"))
    refuse(without_encoders_problems(parent.recipe.model, place=place, what="pruning", key="compress.parent"))
    refuse(without_mtp_problems(parent.recipe.model, place=place, what="pruning", key="compress.parent"))
    return parent


def parent_at(place: str | Path) -> Parent:
    """The checkpoint at a place, or the newest of a run. CheckpointError if there is none, or it has no recipe."""
    path, manifest = checkpoint_at(place)
    return Parent(path, manifest, teacher_recipe(manifest, path))


def check_data(parent: Parent, dataset: Dataset, *, recipe: Recipe) -> None:
    """Refuse calibration rows of another vocabulary or tokenizer than the parent's. recipe: names the data."""
    refuse(vocabulary_problems(recipe, dataset.vocab_size, vocab=parent.recipe.model.real_vocab))
    ours, folder = dataset.tokenizer.fingerprint, recipe.data.folder
    otherwise = "name another compress.parent"
    refuse(
        tokenizer_problems(
            f"the model in {parent.path}", parent.manifest.tokenizer, ours, where=folder, otherwise=otherwise
        )
    )


def layout_recipe(parent: Parent, recipe: Recipe, *, world: int) -> Recipe:
    """The parent's model with the recipe's layout, rows and microbatch size, for a scoring pass."""
    ranks = recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context
    data = max(1, world // ranks)
    # The interleaved schedule needs a number of microbatches that is a multiple of the stages.
    microbatches = recipe.parallel.pipeline if recipe.parallel.virtual_pipeline > 1 else 1
    run = replace(recipe.run, global_rows=recipe.run.microbatch_rows * data * microbatches)
    return replace(recipe, model=parent.recipe.model, run=run)


@contextmanager
def scoring_engine(parent: Parent, recipe: Recipe, mesh: Mesh) -> Iterator[Engine]:
    """An engine without optimizer, in evaluation mode. recipe: from `layout_recipe`. Collective over the world."""
    # The reference backend: fused modules would hide the activations that the hooks read.
    precision = replace(recipe.precision, params=parent.recipe.precision.params, backend="reference", scaling="none",
                        switch_at_tokens=None, fp8_weights=False)  # fmt: skip
    backend = ReferenceBackend()
    chunks: list[Any] = list(
        build_model(
            parent.recipe.model,
            parallel=recipe.parallel,
            precision=precision,
            run=recipe.run,
            row_tokens=recipe.data.row_tokens,
            mesh=mesh,
            backend=backend,
            reset_at_documents=recipe.data.reset_at_documents,
        )
    )
    read_weights(parent.path, chunks, groups=mesh.groups)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    yield Engine(
        mesh=mesh,
        chunks=chunks,
        optimizer=None,  # type: ignore[arg-type]
        precision=backend.control(chunks, precision=precision, mesh=mesh, seed=0),
        forward_step=forward_step(mesh, reset_at_documents=recipe.data.reset_at_documents),
        counter=count_labels,
        row_tokens=recipe.data.row_tokens,
        microbatch_rows=recipe.run.microbatch_rows,
        reset_at_documents=recipe.data.reset_at_documents,
    )
