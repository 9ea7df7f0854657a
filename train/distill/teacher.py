"""The teacher: a second, frozen model in the same world, with its own tensor degree, on the ranks of the last stage.

The student's loss is computed on its last pipeline stage, so the teacher runs there. The ranks of that stage are numbered
0, 1, ... and divided into groups of `objective.teacher_tensor` neighbours; each group is a complete teacher. Of the
student's ranks, R = tensor x context share the same rows.

    teacher tensor < R    R / tensor teachers serve the same rows: each reads some of them, and hidden states are exchanged
    teacher tensor = R    one teacher for each set of rows
    teacher tensor > R    one teacher serves tensor / R sets of rows, one after the other

Ranks exchange hidden states, never logits: the teacher's head is split over the vocabulary like the student's, so that
`train.distill.soft_targets` compares slice with slice, in chunks of tokens. The teacher has no gradients, no optimizer and
no pipeline.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from recipes.schema.errors import CheckpointError, RecipeError, refuse
from recipes.schema.facts import Named, named
from recipes.schema.model import ModelConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.precision import PrecisionConfig
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.teacher_placement import TeacherPlacement, placement_of
from recipes.schema.teacher_rules import teacher_problems
from train.checkpoint.storage import Manifest, read_weights
from train.distill.soft_targets import Head
from train.model.backend import choose_backend
from train.model.build import build_model
from train.model.context import RowContext
from train.model.head import head_weight, hidden_states
from train.parallel.mesh import Mesh, TeacherGroups

log = logging.getLogger(__name__)


def number_format(student: Recipe) -> str:
    """The number format the teacher computes in, e.g. `bf16, blockwise`. Its logits depend on it."""
    params, scaling = student.objective.teacher_params, student.objective.teacher_scaling
    params = student.precision.params if params == "as_student" else params
    return params if scaling == "none" else f"{params}, {scaling}"


class Teacher:
    """A frozen model that computes hidden states for the rows of this rank."""

    def __init__(
        self, chunk: Any, *, model: ModelConfig, head: Head, placement: TeacherPlacement, groups: Any, exchange: Any
    ) -> None:
        self.chunk = chunk
        self.model = model
        self.head = head
        """Split over the student's tensor ranks."""
        self.placement = placement
        self._group = groups.tp
        self._exchange = exchange

    @torch.no_grad()
    def hidden(
        self, tokens_BS: torch.Tensor, documents_BS: torch.Tensor | None, *, layers: tuple[int, ...] = ()
    ) -> list[torch.Tensor]:
        """Final hidden states of whole rows, then the states after each of `layers`: [sequence, rows, hidden] each.

        Collective over the ranks of the last stage that share a teacher or rows.
        """
        if self.placement.row_sets > 1:
            return self._for_all_sets(tokens_BS, documents_BS, layers)
        teachers, rows = self.placement.teachers, tokens_BS.shape[0]
        if teachers == 1 or rows % teachers:  # rows that do not divide evenly are read by every teacher
            return self._run(tokens_BS, documents_BS, layers)
        which = self.placement.index % self.placement.sharing // self.placement.tensor
        mine = slice(which * rows // teachers, (which + 1) * rows // teachers)
        parts = self._run(tokens_BS[mine], documents_BS[mine] if documents_BS is not None else None, layers)
        return [torch.cat(_gather(part, self._exchange), dim=1) for part in parts]

    def _for_all_sets(
        self, tokens_BS: torch.Tensor, documents_BS: torch.Tensor | None, layers: tuple[int, ...]
    ) -> list[torch.Tensor]:
        sharing = self.placement.sharing
        all_tokens = _gather(tokens_BS, self._group)[::sharing]
        all_documents = (
            [None] * len(all_tokens) if documents_BS is None else _gather(documents_BS, self._group)[::sharing]
        )
        mine = self.placement.index % self.placement.tensor // sharing
        result: list[torch.Tensor] = []
        for index, (tokens, documents) in enumerate(zip(all_tokens, all_documents, strict=True)):
            states = self._run(tokens, documents, layers)
            if index == mine:
                result = states
        return result

    def _run(
        self, tokens_BS: torch.Tensor, documents_BS: torch.Tensor | None, layers: tuple[int, ...]
    ) -> list[torch.Tensor]:
        context = RowContext(documents=documents_BS) if documents_BS is not None else None
        positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        with LayerOutputs(self.chunk, layers) as outputs:
            final = hidden_states(self.chunk, tokens_BS, positions, context=context)
            return [final, *(outputs.taken[layer] for layer in layers)]


class LayerOutputs:
    """Context manager that records the outputs of layers of a chunk (whole-model numbers from 0), of their last call."""

    def __init__(self, chunk: Any, layers: tuple[int, ...]) -> None:
        self.taken: dict[int, torch.Tensor] = {}
        self._chunk, self._layers = chunk, layers
        self._hooks: list[Any] = []

    def __enter__(self) -> "LayerOutputs":
        for layer in self._chunk.decoder.layers:
            number = layer.layer_number - 1
            if number in self._layers:
                self._hooks.append(layer.register_forward_hook(self._keep(number)))
        return self

    def __exit__(self, *_error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, number: int) -> Callable[..., None]:
        def keep(_module: object, _arguments: object, output: Any) -> None:
            self.taken[number] = output[0] if isinstance(output, tuple) else output

        return keep


def open_teacher(student: Recipe, *, mesh: Mesh, tokenizer: str | None) -> Teacher | None:
    """Build and load the teacher that a recipe names. None on ranks of earlier pipeline stages. Collective over the world.

    Raises RecipeError, CheckpointError or BackendError that names what does not fit.
    """
    objective = student.objective
    assert objective.teacher is not None, "teacher_rules.distill_problems refuses this"
    found = named(objective.teacher)
    if found.error:
        raise CheckpointError(f"objective.teacher: {found.error}")
    refuse(teacher_problems(student, found, tokenizer=tokenizer, start=_start_of(student), world=mesh.layout.world))
    path, teacher = found.path, found.recipe
    assert path is not None and teacher is not None, "teacher_problems refuses this"
    tensor = objective.teacher_tensor or student.parallel.tensor
    placement = placement_of(mesh.layout, mesh.rank, tensor=tensor)
    parallel = ParallelConfig(tensor=tensor)
    if placement is None:  # an earlier stage: reading is collective, so this rank takes part and reads nothing
        read_weights(path, [], groups=mesh.groups)
        return None
    if student.data.row_tokens > teacher.data.row_tokens and mesh.data_rank == 0:
        log.warning(
            "The teacher was trained on rows of %d tokens, but the student's rows have %d.",
            teacher.data.row_tokens,
            student.data.row_tokens,
        )
    assert mesh.teacher is not None, "the mesh was opened without the teacher's groups"
    groups = _megatron_groups(mesh.teacher)
    exchange = mesh.teacher.exchange
    precision = replace(
        teacher.precision,
        params=student.precision.params if objective.teacher_params == "as_student" else objective.teacher_params,
        backend="auto",
        scaling=objective.teacher_scaling,
        switch_at_tokens=None,
        fp8_weights=False,
        health=False,
    )
    teacher_mesh = Mesh(
        layout=replace(mesh.layout, world=placement.ranks, tensor=tensor, pipeline=1, virtual=1, context=1,
                       data=placement.ranks // tensor),
        rank=mesh.rank,
        device=mesh.device,
        groups=groups,
    )  # fmt: skip
    chunk = frozen_model(teacher, parallel=parallel, precision=precision, mesh=teacher_mesh, weights=path,
                         row_tokens=student.data.row_tokens, reset_at_documents=student.data.reset_at_documents)  # fmt: skip
    head = Head.of(_recut(chunk, groups.tp, mesh.groups.tp), teacher.model, group=mesh.groups.tp)
    return Teacher(chunk, model=teacher.model, head=head, placement=placement, groups=groups, exchange=exchange)


def _start_of(student: Recipe) -> Named | None:
    """The checkpoint that the student starts from; None if it starts from random weights."""
    return named(student.run.start_from) if student.run.start_from is not None else None


def teacher_recipe(manifest: Manifest, path: Path) -> Recipe:
    """The recipe of the run that wrote a checkpoint. CheckpointError if it has none that this version can read."""
    try:
        return recipe_from_mapping(manifest.recipe)
    except RecipeError as error:
        raise CheckpointError(f"{path} has no recipe that this version can read: {error}") from error


def frozen_model(
    recipe: Recipe,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    mesh: Mesh,
    weights: Path,
    row_tokens: int,
    reset_at_documents: bool,
) -> Any:
    """The model of a checkpoint, without gradients and in evaluation mode. Collective over the world."""
    backend = choose_backend(precision, mesh.device)
    (chunk,) = build_model(
        recipe.model,
        parallel=parallel,
        precision=precision,
        run=recipe.run,
        row_tokens=row_tokens,
        mesh=mesh,
        backend=backend,
        reset_at_documents=reset_at_documents,
    )
    read_weights(weights, [chunk], groups=mesh.groups)
    chunk.requires_grad_(False)
    chunk.eval()
    backend.control([chunk], precision=precision, mesh=mesh, seed=0)
    return chunk


def _megatron_groups(teacher: TeacherGroups) -> ProcessGroupCollection:
    """The process groups that Megatron's modules read, for a model without pipeline and context parallelism."""
    groups = ProcessGroupCollection()
    for name in ("pp", "cp", "ep", "embd", "pos_embd", "expt_tp", "tp_ep"):
        setattr(groups, name, teacher.alone)
    for name in ("tp", "mp", "tp_cp"):
        setattr(groups, name, teacher.tensor)
    for name in ("dp", "dp_cp", "expt_dp", "intra_dp_cp", "dp_cp_gtp_remat"):
        setattr(groups, name, teacher.replicas)
    groups.tp_dp_cp = teacher.everyone
    return groups


def _recut(chunk: Any, teacher_group: Any, student_group: Any) -> torch.Tensor:
    """The teacher's head, split over the student's tensor ranks. Collective over the teacher's group."""
    weight = head_weight(chunk).detach()
    if teacher_group.size() != student_group.size():
        whole = torch.cat(_gather(weight, teacher_group)) if teacher_group.size() > 1 else weight
        weight = whole.chunk(student_group.size())[student_group.rank()].clone()
        if not chunk.share_embeddings_and_output_weights:
            chunk.output_layer.weight = None  # frees the teacher's own split, which nothing reads from here on
    # soft_targets multiplies by it for every chunk of tokens. A CPU would convert bf16 to fp32 each time: do it once.
    return weight.float() if weight.device.type == "cpu" else weight


def _gather(part: torch.Tensor, group: Any) -> list[torch.Tensor]:
    """The tensors of all ranks of a group, in rank order."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
