"""Assembly: from a typed recipe to process groups, data, model, objective and optimizer, with checks that they match."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from data.chat.prompts import PromptSet
from data.prepared import open_prompts, read_material, tokenizer_or_file
from data.stream import Dataset, open_dataset
from data.tokenizer import Tokenizer
from recipes.schema.changes import check_same_function, draws_adapters, mtp_change, replaces_head
from recipes.schema.errors import DataError, RecipeError, refuse
from recipes.schema.facts import identity_of, read_disk, read_request
from recipes.schema.layout import Layout, lay_out
from recipes.schema.lora import adapter_prefixes
from recipes.schema.manifest import read_manifest as read_checkpoint_manifest
from recipes.schema.model import ModelConfig
from recipes.schema.optim import OptimConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.parameter_groups import EMBEDDING
from recipes.schema.pattern import layer_kinds
from recipes.schema.recipe import Recipe
from recipes.schema.rules import distill_problems, notes, problems, shape_rules, vocabulary_problems
from train.align.dpo import DPO_PARTS, count_pairs, dpo_step
from train.align.policy_step import PARTS as POLICY_PARTS
from train.align.policy_step import finish_check, policy_step
from train.align.reward import REWARD_PARTS, count_contexts, reward_step
from train.checkpoint.manager import checkpoint_at
from train.checkpoint.storage import read_weights
from train.distill import objective as distill
from train.distill.teacher import Teacher, open_teacher
from train.distill.teacher_cache import TeacherCache
from train.engine import Engine
from train.megatron import use_device
from train.model.backend import Backend, ReferenceBackend, choose_backend, this_machine
from train.model.build import build_model
from train.model.initial import HEAD, MTP, global_names, initialize
from train.objective import next_token, several_tokens
from train.objective.step_counts import Counter
from train.optim.optimizer import build_optimizer
from train.parallel.mesh import Mesh, close_mesh, open_mesh
from train.parallel.wrap import connect, wrap_chunks
from train.quantize.directory import QuantizedFiles, is_quantized
from train.quantize.loading import load_quantized

log = logging.getLogger(__name__)


def check_start(recipe: Recipe, *, world: int, rank: int = 0) -> Layout:
    """Check that a recipe can start on this machine with `world` processes. -> its layout. RecipeError lists all problems.

    Reads the machine and the disk; changes nothing. Only rank 0 reads the disk: thousands of ranks that request the size of
    every file of a checkpoint from a shared file system would wait for minutes. Rank 0 also logs likely mistakes.
    """
    machine, is_first = this_machine(), rank == 0
    data = read_material(recipe, checks=True) if is_first else None
    disk = read_disk(recipe) if is_first else None
    refuse(problems(recipe, world=world, machine=machine, disk=disk, prepared=data))
    for note in notes(recipe, machine=machine, prepared=data) if is_first else ():
        log.warning("%s", note)
    return check(recipe, world=world)


def _rows(recipe: Recipe) -> int:
    """Rows of the whole run."""
    return recipe.run.steps * recipe.run.global_rows


def check(recipe: Recipe, *, world: int) -> Layout:
    """The layout of a recipe on `world` processes. RecipeError lists all violated divisibility rules."""
    return lay_out(
        model=recipe.model,
        parallel=recipe.parallel,
        run=recipe.run,
        row_tokens=recipe.data.row_tokens,
        world=world,
    )


def open_material(recipe: Recipe) -> Dataset | PromptSet:
    """What a run learns from: prepared data, or prompts, which the caller closes. Errors: see `open_data`."""
    if recipe.objective.kind != "grpo":
        return open_data(recipe)
    prompts = open_prompts(recipe, open_tokenizer(recipe)[0])
    refuse(vocabulary_problems(recipe, prompts.vocab_size), DataError)
    return prompts


def open_data(recipe: Recipe) -> Dataset:
    """The prepared data of a recipe, checked against its model. DataError names what does not match."""
    dataset = open_dataset(recipe.data)
    dataset.blend.check_length(_rows(recipe), global_rows=recipe.run.global_rows)
    refuse(vocabulary_problems(recipe, dataset.vocab_size), DataError)
    return dataset


def open_tokenizer(recipe: Recipe) -> tuple[Tokenizer, Path]:
    """(tokenizer, its file): from the prepared data, or from the recipe's path if no data is prepared yet."""
    return tokenizer_or_file(recipe.data)


@contextmanager
def mesh_of(recipe: Recipe, layout: Layout, *, device: torch.device, rank: int) -> Iterator[Mesh]:
    """The process groups of a recipe; always closed at exit, also after an exception. Collective over the world."""
    if recipe.run.deterministic:
        _be_deterministic(device)
    objective = recipe.objective
    has_teacher = objective.kind == "distill" and objective.teacher_cache is None
    try:
        yield open_mesh(
            layout,
            device,
            rank=rank,
            seed=recipe.run.seed,
            timeout_s=recipe.launch.timeout_s,
            teacher_tensor=objective.teacher_tensor or recipe.parallel.tensor if has_teacher else None,
            memory_copies=recipe.run.memory_copies.every_steps > 0,
        )
    finally:
        close_mesh()


@dataclass(frozen=True)
class Objective:
    """The function that Megatron's schedules call for a microbatch, and the names of its terms other than the loss."""

    forward_step: Callable[..., Any]
    parts: tuple[str, ...] = ()
    counter: Counter = next_token.count_labels
    """What is counted in the rows of a step (`train.objective.step_counts`)."""
    check: Callable[[list[Any]], None] | None = None
    """`Engine.check`."""
    teacher: dict[str, Any] | None = None
    """Identity of the teacher's weights (`recipes.schema.facts.identity_of`), the same on every rank."""


def build_objective(recipe: Recipe, *, mesh: Mesh, chunks: list[Any], tokenizer: str | None) -> Objective:
    """The objective of a recipe; a teacher is built and loaded here. Collective over the world.

    chunks: the student's, unwrapped. tokenizer: fingerprint of the data's tokenizer; None skips the check. Raises RecipeError,
    CheckpointError, BackendError.
    """
    refuse(distill_problems(recipe))
    objective = recipe.objective
    if objective.kind == "reward":
        return Objective(reward_step(mesh, objective.reward), REWARD_PARTS, counter=count_contexts)
    if objective.kind == "dpo":
        return Objective(dpo_step(mesh, objective.dpo), DPO_PARTS, counter=count_pairs)
    if objective.kind == "next_token":
        return _next_token(recipe, mesh)
    if objective.kind == "grpo":
        return Objective(policy_step(objective.grpo, mesh=mesh), POLICY_PARTS, check=finish_check)
    source: Teacher | TeacherCache | None
    if objective.teacher_cache is not None:
        request = read_request(Path(objective.teacher_cache))
        source = TeacherCache.open(recipe, tokenizer=tokenizer) if mesh.is_last_stage else None
        step = distill.distill_step(recipe, mesh=mesh, source=source, match=None)
        return Objective(step, distill.PARTS, teacher=request.identity)
    source = open_teacher(recipe, mesh=mesh, tokenizer=tokenizer)
    match = distill.hidden_match(recipe, source)
    assert objective.teacher is not None, "open_teacher refuses a recipe without a teacher"
    step = distill.distill_step(recipe, mesh=mesh, source=source, match=match)
    return Objective(step, distill.PARTS, teacher=identity_of(*checkpoint_at(objective.teacher)))


def _next_token(recipe: Recipe, mesh: Mesh) -> Objective:
    """The next-token objective, with the losses of further depths if the model has them."""
    mtp, reset, z_loss = recipe.model.mtp, recipe.data.reset_at_documents, recipe.objective.z_loss
    if not mtp.depths:
        step = next_token.forward_step(mesh, reset_at_documents=reset, z_loss=z_loss)
        return Objective(step, next_token.Z_LOSS_PARTS if z_loss else ())
    return Objective(
        several_tokens.forward_step(mesh, mtp, reset_at_documents=reset),
        several_tokens.parts_of(mtp),
        counter=several_tokens.CountAhead(mtp.depths, reset_at_documents=reset),
    )


def _chunks(recipe: Recipe, *, mesh: Mesh, backend: Backend, draw_weights: bool = False) -> list[Any]:
    """This rank's part of a recipe's model, for rows of training. Collective (tied embeddings)."""
    return build_model(
        recipe.model,
        parallel=recipe.parallel,
        precision=recipe.precision,
        run=recipe.run,
        row_tokens=recipe.data.row_tokens,
        mesh=mesh,
        backend=backend,
        reset_at_documents=recipe.data.reset_at_documents,
        draw_weights=draw_weights,
    )


def _names(chunks: list[Any], model: ModelConfig) -> dict[torch.nn.Parameter, str]:
    """The name of each parameter in the whole model, the same for every backend and layout."""
    found = {}
    for chunk in chunks:
        for name, parameter in global_names(chunk):
            if name == HEAD and not model.has_own_head:
                name = EMBEDDING  # the last stage's copy of the one matrix
            for linear, norm in _FUSED_NORMS.items():
                name = name.replace(linear, norm)
            found[parameter] = name
    return found


_FUSED_NORMS = {
    "mixer.in_proj.layer_norm_weight": "norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's linears contain the norm before them."""


def build_engine(recipe: Recipe, mesh: Mesh, *, weights: Path | None = None, tokenizer: str | None = None) -> Engine:
    """Model, data parallelism and optimizer of a recipe on this rank. Collective over the world.

    weights: a checkpoint to load the initial weights from, instead of random ones; if it is of a language model and the recipe
    has a scalar head, the head is drawn; so are further depths (`model.mtp`) that it does not have.
    tokenizer: fingerprint of the data's tokenizer; a teacher's must be equal.
    """

    backend = choose_backend(recipe.precision, mesh.device)
    refuse(shape_rules(recipe, backend=backend.name))
    chunks = _chunks(recipe, mesh=mesh, backend=backend, draw_weights=weights is None)
    if weights is not None:
        saved = read_checkpoint_manifest(weights).recipe
        head, mtp = replaces_head(saved, recipe), mtp_change(saved, recipe)
        check_same_function(saved, recipe, place=str(weights), except_head=head)
        if mtp != "none" and mesh.rank == 0:
            log.warning("%s: the weights of further depths (model.mtp) are %s.", weights, mtp)
        without = ((HEAD,) if head else ()) + ((MTP,) if mtp != "none" else ())
        if draws_adapters(saved, recipe):
            without += adapter_prefixes(recipe.model.lora, layer_kinds(recipe.model.pattern))
        read_weights(weights, chunks, groups=mesh.groups, without=without)
        for chunk, begin in product(chunks, without):
            initialize(chunk, model=recipe.model, seed=recipe.run.seed, tensor_group=mesh.groups.tp, only=begin)
    objective = build_objective(recipe, mesh=mesh, chunks=chunks, tokenizer=tokenizer)
    wrapped = wrap_chunks(chunks, parallel=recipe.parallel, mesh=mesh, fp8_weights=recipe.precision.fp8_weights)
    optimizer = build_optimizer(
        wrapped, optim=recipe.optim, precision=recipe.precision, mesh=mesh, names=_names(chunks, recipe.model)
    )
    reduction = connect(wrapped, optimizer)
    return Engine(
        mesh=mesh,
        chunks=wrapped,
        optimizer=optimizer,
        precision=backend.control(wrapped, precision=recipe.precision, mesh=mesh, seed=recipe.run.seed),
        forward_step=objective.forward_step,
        counter=objective.counter,
        check=objective.check,
        loss_parts=objective.parts,
        teacher=objective.teacher,
        row_tokens=recipe.data.row_tokens,
        microbatch_rows=recipe.run.microbatch_rows,
        reset_at_documents=recipe.data.reset_at_documents,
        reduction=reduction,
    )


def frozen_engine(recipe: Recipe, checkpoint: Path, mesh: Mesh) -> Engine:
    """The recipe's model with a checkpoint's weights for forward passes at the recipe's layout, next to another engine: without
    gradients and optimizer. Collective over the world."""
    recipe = replace(recipe, optim=OptimConfig())  # that of the run may name weights that this model does not have
    check(recipe, world=mesh.layout.world)
    backend = choose_backend(recipe.precision, mesh.device)
    chunks = _chunks(recipe, mesh=mesh, backend=backend)
    read_weights(checkpoint, chunks, groups=mesh.groups)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return Engine(
        mesh=mesh,
        chunks=list(chunks),
        optimizer=None,  # type: ignore[arg-type]
        precision=backend.control(chunks, precision=recipe.precision, mesh=mesh, seed=0),
        forward_step=next_token.forward_step(mesh, reset_at_documents=recipe.data.reset_at_documents),
        counter=next_token.count_labels,
        row_tokens=recipe.data.row_tokens,
        microbatch_rows=recipe.run.microbatch_rows,
        reset_at_documents=recipe.data.reset_at_documents,
    )


@contextmanager
def model_on_one_rank(recipe: Recipe, checkpoint: Path, *, device: torch.device) -> Iterator[Any]:
    """The whole model of a recipe in this process, for inference, with the weights that an export of the checkpoint has: those
    of a bf16 run are bf16 numbers, not its fp32 masters."""
    with _models([(recipe, checkpoint)], device=device, rank=0, world=1, tensor=1, masters=False) as ((model,), _):
        yield model


@contextmanager
def model_for_inference(
    recipe: Recipe, checkpoint: Path, *, device: torch.device, rank: int = 0, tensor: int = 1
) -> Iterator[Any]:
    """`model_on_ranks` with one copy of the model, whose tensor ranks are the world."""
    with model_on_ranks(recipe, checkpoint, device=device, rank=rank, world=tensor, tensor=tensor) as (model, _):
        yield model


@contextmanager
def model_on_ranks(
    recipe: Recipe, checkpoint: Path, *, device: torch.device, rank: int, world: int, tensor: int = 1
) -> Iterator[tuple[Any, Mesh]]:
    """The model of a recipe with a checkpoint's weights, for inference: plain torch, in eval mode, one pipeline stage, split
    over `tensor` ranks; each further group of `tensor` ranks has a copy. The checkpoint may be of any layout. Collective over
    the world.

    checkpoint: or a directory of `stratum hf export --quantize`, on one rank: its linear layers keep their codes and scales.
    """
    with _models([(recipe, checkpoint)], device=device, rank=rank, world=world, tensor=tensor) as ((model,), mesh):
        yield model, mesh


@contextmanager
def models_for_inference(
    sources: Sequence[tuple[Recipe, Path]], *, device: torch.device, rank: int = 0, tensor: int = 1
) -> Iterator[list[Any]]:
    """As `model_for_inference` for several models in the same process groups: (recipe, checkpoint) of each."""
    with _models(sources, device=device, rank=rank, world=tensor, tensor=tensor) as (models, _):
        yield models


def model_in_mesh(recipe: Recipe, checkpoint: Path, *, mesh: Mesh) -> Any:
    """The model of a recipe with a checkpoint's weights, for inference, in process groups that are open: split over the tensor
    ranks, a copy in each of the tensor groups, one pipeline stage. Collective over the world.

    Raises RecipeError if the model cannot be split over so many ranks.
    """
    check_same_function(read_checkpoint_manifest(checkpoint).recipe, recipe, place=str(checkpoint))
    one = _on_tensor_ranks(recipe, mesh.layout.tensor, copies=1)
    check(one, world=mesh.layout.tensor)
    return _loaded(one, checkpoint, mesh=mesh, masters=True)


def _on_tensor_ranks(recipe: Recipe, tensor: int, *, copies: int) -> Recipe:
    """The recipe with nothing but tensor parallelism, as inference has it."""
    run = replace(recipe.run, global_rows=copies, microbatch_rows=1)
    return replace(recipe, parallel=ParallelConfig(tensor=tensor), run=run)


@contextmanager
def _models(
    sources: Sequence[tuple[Recipe, Path]],
    *,
    device: torch.device,
    rank: int,
    world: int,
    tensor: int,
    masters: bool = True,
) -> Iterator[tuple[list[Any], Mesh]]:
    """masters: a model in fp32 reads the fp32 masters of a checkpoint that has them, otherwise its weights."""
    for recipe, checkpoint in sources:
        if not is_quantized(checkpoint):
            check_same_function(read_checkpoint_manifest(checkpoint).recipe, recipe, place=str(checkpoint))
        elif tensor > 1:
            raise RecipeError(f"{checkpoint} has quantised weights, which are not split over ranks. Use one rank.")
    use_device(device)

    copies = max(1, world // tensor)
    ones = [_on_tensor_ranks(recipe, tensor, copies=copies) for recipe, _ in sources]
    layouts = [check(one, world=world) for one in ones]
    with mesh_of(ones[0], layouts[0], device=device, rank=rank) as mesh:
        pairs = zip(ones, sources, strict=True)
        yield [_loaded(one, checkpoint, mesh=mesh, masters=masters) for one, (_, checkpoint) in pairs], mesh


def _loaded(recipe: Recipe, checkpoint: Path, *, mesh: Mesh, masters: bool) -> Any:
    """A model for inference with a checkpoint's weights, in these process groups. Collective."""
    quantized = QuantizedFiles(checkpoint) if is_quantized(checkpoint) else None
    if quantized is not None:  # its weights are rounded already
        recipe = replace(recipe, precision=replace(recipe.precision, quantize_weights="none"))
    (chunk,) = build_model(
        recipe.model,
        parallel=recipe.parallel,
        precision=recipe.precision,
        run=recipe.run,
        row_tokens=recipe.data.row_tokens,
        mesh=mesh,
        backend=ReferenceBackend(),
        draw_weights=False,
    )
    if quantized is None:
        read_weights(checkpoint, [chunk], groups=mesh.groups, masters=masters)
    else:
        load_quantized(chunk, quantized, model=recipe.model, groups=mesh.groups)
    return chunk.eval()


def _be_deterministic(device: torch.device) -> None:
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
