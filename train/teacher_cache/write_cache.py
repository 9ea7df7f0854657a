"""Compute and store teacher logits for every row of a recipe, and measure the loss of storing fewer tokens."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from data.store.shards import token_dtype
from data.system.console import open_console, progress
from recipes.schema.errors import RecipeError, refuse
from recipes.schema.facts import CacheRequest
from recipes.schema.objective_rules import language_model_problems
from recipes.schema.parallel import ParallelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.rules import reading_problems
from recipes.schema.teacher_rules import cache_command_problems
from recipes.schema.tools import TeacherCacheConfig
from train.build import check, mesh_of, open_data
from train.checkpoint.manager import checkpoint_at
from train.distill.soft_targets import (
    Head,
    LossWeights,
    OnlineTargets,
    TopK,
    head_losses,
    log_softmax_over_ranks,
    top_k_of,
)
from train.distill.teacher import Teacher, frozen_model, number_format, open_teacher, teacher_recipe
from train.distill.teacher_cache import TeacherCache, batch_keys, open_request, write_block
from train.megatron import choose_device, use_device
from train.model.context import RowContext
from train.model.head import head_weight, hidden_states
from train.parallel.mesh import Mesh, world_from_environment


def write_cache(recipe: Recipe, config: TeacherCacheConfig) -> None:
    """Compute and store teacher logits for every row of a recipe that is not stored yet. Every process of the world calls it.

    Raises RecipeError, DataError, CheckpointError. Blocks that were written stay, and the next call continues from them.
    """
    objective = recipe.objective
    refuse([*reading_problems(recipe), *cache_command_problems(recipe)])
    rank, world = world_from_environment()
    device = choose_device(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    dataset = open_data(recipe)
    rows = recipe.run.steps * recipe.run.global_rows
    parallel = ParallelConfig(tensor=objective.teacher_tensor or recipe.parallel.tensor)
    size = recipe.run.microbatch_rows
    recipe = replace(
        recipe,
        parallel=parallel,
        run=replace(recipe.run, global_rows=size * max(1, world // parallel.tensor)),
        objective=replace(objective, teacher_tensor=parallel.tensor),
    )
    use_device(device)
    # mesh_of opens the teacher's process groups for distillation with an online teacher only.
    online = replace(recipe, objective=replace(recipe.objective, kind="distill", teacher_cache=None))
    with mesh_of(online, check(recipe, world=world), device=device, rank=rank) as mesh:
        teacher = open_teacher(recipe, mesh=mesh, tokenizer=dataset.tokenizer.fingerprint)
        assert teacher is not None, "with one pipeline stage the teacher is on every rank"
        _cache_all_rows(recipe, config, mesh=mesh, teacher=teacher, dataset=dataset, rows=rows)
        if config.student is not None:
            _measure(recipe, config, mesh=mesh, teacher=teacher, dataset=dataset)


def _cache_all_rows(
    recipe: Recipe, config: TeacherCacheConfig, *, mesh: Mesh, teacher: Teacher, dataset: Any, rows: int
) -> None:
    """Store the logits of `rows` training rows, and print counts and sizes. Collective over the world."""
    objective = recipe.objective
    assert objective.teacher is not None and objective.teacher_cache is not None
    folder = Path(objective.teacher_cache)
    path, manifest = checkpoint_at(objective.teacher)
    request = CacheRequest(
        teacher=str(path),
        step=manifest.step,
        fingerprint=manifest.fingerprint,
        numbers=number_format(recipe),
        top_k=objective.top_k,
        temperature=objective.temperature,
        values=config.values,
        vocab=recipe.model.real_vocab,
        tokenizer=dataset.tokenizer.fingerprint,
        row_tokens=recipe.data.row_tokens,
        documents=recipe.data.reset_at_documents,
    )
    if mesh.rank == 0:
        open_request(folder, request)
    mesh.barrier()
    if mesh.rank:
        open_request(folder, request)
    seen = set(TeacherCache(folder).keys())
    before = len(seen)
    mesh.barrier()  # every rank must see the same stored rows, so no rank writes before all have read the index
    written, new_rows, rest = 0, 0, 0.0
    with progress("teacher forward", rows, in_bytes=False, is_shown=mesh.rank == 0) as advance:
        for number, start in enumerate(range(0, rows, config.block_rows)):
            batch = dataset.training_rows(np.arange(start, min(start + config.block_rows, rows)))
            keys = batch_keys(batch, documents=request.documents)
            new = [i for i, key in enumerate(keys) if key not in seen and key not in keys[:i]]
            seen.update(keys)
            advance(len(keys))
            if not new or number % mesh.layout.data != mesh.data_rank:
                continue
            targets = list(_top_k_of_rows(recipe, mesh, teacher, batch.select(np.asarray(new))))
            if mesh.groups.tp.rank() == 0:
                written += write_block(folder, [keys[i] for i in new], targets, request)
                rest += sum(float(row.rest_N.double().sum()) for row in targets)
                new_rows += len(new)
    sums = mesh.sum_over_world(torch.tensor([written, new_rows, rest], dtype=torch.float64, device=mesh.device))
    written, new_rows, rest = int(sums[0]), int(sums[1]), float(sums[2])
    if mesh.rank:
        return
    tokens = new_rows * request.row_tokens
    console = open_console()
    console.print(
        f"{folder}: {new_rows:,} rows added, {before:,} were there before; top {request.top_k} tokens per position."
    )
    if tokens:
        full = 2 * request.vocab
        console.print(
            f"{written / tokens:.1f} bytes per token on disk (full distributions in 16 bits: {full:,}); mean probability of "
            f"the rest {rest / tokens:.4f}."
        )


def _top_k_of_rows(recipe: Recipe, mesh: Mesh, teacher: Teacher, batch: Any) -> Iterator[TopK]:
    """The teacher's top-k logits of each row, on the CPU. Collective over the teacher's ranks."""
    size, tokens = recipe.run.microbatch_rows, recipe.data.row_tokens
    for start in range(0, len(batch.positions), size):
        rows = slice(start, start + size)
        documents = batch.document_index[rows].to(mesh.device) if recipe.data.reset_at_documents else None
        (hidden_SBH,) = teacher.hidden(batch.tokens[rows].to(mesh.device), documents)
        for row in range(hidden_SBH.shape[1]):
            targets = OnlineTargets(hidden_SBH[:, row], teacher.head)
            parts = []
            step = recipe.objective.chunk_tokens or 512
            for first in range(0, tokens, step):
                logits = targets.logits(slice(first, first + step), temperature=recipe.objective.temperature)
                (log_p,) = log_softmax_over_ranks([logits], group=mesh.groups.tp)
                parts.append(
                    top_k_of(
                        log_p,
                        recipe.objective.top_k,
                        slice_size=teacher.head.slice_size,
                        group=mesh.groups.tp,
                    )
                )
            names = ("ids_NK", "log_p_NK", "rest_N")
            yield TopK(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in names))


def _measure(recipe: Recipe, config: TeacherCacheConfig, *, mesh: Mesh, teacher: Teacher, dataset: Any) -> None:
    """Print the divergence of a student measured with the top k tokens, for several k."""
    assert config.student is not None
    path, manifest = checkpoint_at(config.student)
    student = teacher_recipe(manifest, path)
    refuse(language_model_problems(student.model, place=f"--student {config.student}", key="--student"))
    known = dataset.tokenizer.fingerprint
    if student.model.real_vocab != recipe.model.real_vocab or manifest.tokenizer not in ("", known):
        raise RecipeError(
            f"--student {config.student} has a vocabulary of {student.model.real_vocab:,} and tokenizer "
            f"{manifest.tokenizer[:12] or '?'}, but the teacher has {recipe.model.real_vocab:,} and {known[:12]}: they cannot be "
            f"compared. Name a student with the same tokenizer."
        )
    chunk = frozen_model(student, parallel=recipe.parallel, precision=student.precision, mesh=mesh, weights=path,
                         row_tokens=recipe.data.row_tokens, reset_at_documents=recipe.data.reset_at_documents)  # fmt: skip
    head = Head.of(head_weight(chunk), student.model, group=mesh.groups.tp)
    batch = dataset.training_rows(np.arange(config.block_rows))
    counts = [k for k in (1, 4, 16, 32, 64, 128, 256, 1024) if k < recipe.model.real_vocab]
    weights = LossWeights(temperature=recipe.objective.temperature)
    sums = dict.fromkeys([*counts, 0], 0.0)
    size = recipe.run.microbatch_rows
    with torch.no_grad():
        for start in range(0, config.block_rows, size):
            rows = batch.select(np.arange(start, min(start + size, config.block_rows)))
            tokens = rows.tokens.to(mesh.device)
            positions = torch.arange(tokens.shape[1], device=mesh.device).expand_as(tokens)
            documents = rows.document_index.to(mesh.device) if recipe.data.reset_at_documents else None
            context = RowContext(documents=documents) if documents is not None else None
            hidden = hidden_states(chunk, tokens, positions, context=context).flatten(0, 1)
            (states,) = teacher.hidden(tokens, documents)
            for k in sums:
                losses = head_losses(
                    hidden,
                    head,
                    targets=OnlineTargets(states.flatten(0, 1), teacher.head, k),
                    labels_N=rows.labels.t().reshape(-1).to(mesh.device),
                    weights=weights,
                    group=mesh.groups.tp,
                )
                sums[k] += float(losses.divergence_N.double().sum())
    if mesh.rank:
        return
    total = config.block_rows * recipe.data.row_tokens
    whole = max(sums[0] / total, 1e-30)  # the divergence of the teacher from itself is 0
    table = Table(
        "k",
        "bytes per token, uncompressed",
        "divergence, nats",
        "share of the full divergence",
        title=f"student: {path}",
    )
    width = token_dtype(recipe.model.real_vocab).itemsize + np.dtype(config.values).itemsize
    for k in counts:
        table.add_row(str(k), str(k * width + 4), f"{sums[k] / total:.5f}", f"{sums[k] / total / whole:.4f}")
    table.add_row("all", f"{2 * recipe.model.real_vocab} (16 bits)", f"{whole:.5f}", "1")
    open_console().print(table)
