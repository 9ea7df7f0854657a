"""The teacher: a second model in the same world, frozen, at its own tensor degree, whole on the last stage's ranks.

The student's loss exists on its last pipeline stage, so that is where the teacher lives; its ranks are numbered 0, 1, ...
and cut into teacher groups of `objective.teacher_tensor` neighbours, each group a whole teacher. R = tensor x context of
the student's ranks share the same rows.

    teacher tensor < R    R / tensor teachers serve the same rows: each reads a part of them, hidden states are exchanged
    teacher tensor = R    one teacher for each set of rows
    teacher tensor > R    one teacher serves tensor / R sets of rows: it reads them one after the other

What crosses between the models is never logits: the teacher gives final hidden states, and its head is cut over the
vocabulary like the student's, so that `train.distill.soft_targets` compares slice with slice, a few tokens at a time.
The teacher needs no gradients, no optimizer and no pipeline of its own.
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
from recipes.schema.teacher_placement import Place, place_of
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
    """In which numbers the teacher beside a student computes: its answers depend on it."""
    params, scaling = student.objective.teacher_params, student.objective.teacher_scaling
    params = student.precision.params if params == "as_student" else params
    return params if scaling == "none" else f"{params}, {scaling}"


class Teacher:
    """A frozen model that gives hidden states for the rows of this rank."""

    def __init__(self, chunk: Any, *, model: ModelConfig, head: Head, place: Place, groups: Any, exchange: Any) -> None:
        self.chunk = chunk
        self.model = model
        self.head = head
        """Cut over the student's tensor ranks."""
        self.place = place
        self._group = groups.tp
        self._exchange = exchange

    @torch.no_grad()
    def hidden(
        self, tokens_BS: torch.Tensor, documents_BS: torch.Tensor | None, *, layers: tuple[int, ...] = ()
    ) -> list[torch.Tensor]:
        """Final hidden states of whole rows, then those after each of `layers`, [sequence, rows, hidden] each.

        Collective over the ranks of the last stage that share a teacher or rows.
        """
        if self.place.row_sets > 1:
            return self._for_all_sets(tokens_BS, documents_BS, layers)
        teachers, rows = self.place.teachers, tokens_BS.shape[0]
        if teachers == 1 or rows % teachers:  # rows that cannot be dealt out are read by every teacher
            return self._run(tokens_BS, documents_BS, layers)
        which = self.place.index % self.place.sharing // self.place.tensor
        mine = slice(which * rows // teachers, (which + 1) * rows // teachers)
        parts = self._run(tokens_BS[mine], documents_BS[mine] if documents_BS is not None else None, layers)
        return [torch.cat(_gather(part, self._exchange), dim=1) for part in parts]

    def _for_all_sets(
        self, tokens_BS: torch.Tensor, documents_BS: torch.Tensor | None, layers: tuple[int, ...]
    ) -> list[torch.Tensor]:
        sharing = self.place.sharing
        all_tokens = _gather(tokens_BS, self._group)[::sharing]
        all_documents = (
            [None] * len(all_tokens) if documents_BS is None else _gather(documents_BS, self._group)[::sharing]
        )
        mine = self.place.index % self.place.tensor // sharing
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
    """Within its block, keeps what the given layers (whole-model numbers from 0) of a chunk give; their last call counts."""

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
    """Build and load the teacher a recipe names. None on ranks of earlier pipeline stages. Collective over the world.

    Raises RecipeError, CheckpointError, BackendError naming what does not fit.
    """
    objective = student.objective
    assert objective.teacher is not None, "rules.distill_problems has refused it"
    found = named(objective.teacher)
    if found.error:
        raise CheckpointError(f"objective.teacher: {found.error}")
    refuse(teacher_problems(student, found, tokenizer=tokenizer, start=_start_of(student), world=mesh.layout.world))
    path, teacher = found.path, found.recipe
    assert path is not None and teacher is not None, "refused above"
    tensor = objective.teacher_tensor or student.parallel.tensor
    place = place_of(mesh.layout, mesh.rank, tensor=tensor)
    parallel = ParallelConfig(tensor=tensor)
    if place is None:
        read_weights(path, [], groups=mesh.groups)
        return None
    if student.data.row_tokens > teacher.data.row_tokens and mesh.data_rank == 0:
        log.warning(
            "The teacher was trained on rows of %d tokens and is asked about rows of %d.",
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
        layout=replace(mesh.layout, world=place.ranks, tensor=tensor, pipeline=1, virtual=1, context=1,
                       data=place.ranks // tensor),
        rank=mesh.rank,
        device=mesh.device,
        groups=groups,
    )  # fmt: skip
    chunk = frozen_model(teacher, parallel=parallel, precision=precision, mesh=teacher_mesh, weights=path,
                         row_tokens=student.data.row_tokens, reset_at_documents=student.data.reset_at_documents)  # fmt: skip
    head = Head(_recut(chunk, groups.tp, mesh.groups.tp), softcap=teacher.model.logit_softcap)
    return Teacher(chunk, model=teacher.model, head=head, place=place, groups=groups, exchange=exchange)


def _start_of(student: Recipe) -> Named | None:
    """The checkpoint a student began with, where hidden states of another width are matched."""
    return named(student.run.start_from) if student.run.start_from is not None else None


def teacher_recipe(manifest: Manifest, path: Path) -> Recipe:
    """The recipe of the run that wrote a checkpoint. CheckpointError where it holds none that can be read."""
    try:
        return recipe_from_mapping(manifest.recipe)
    except RecipeError as error:
        raise CheckpointError(f"{path} holds no recipe that this version reads: {error}") from error


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
    """A whole model of a checkpoint's recipe without gradients, in evaluation mode. Collective over the world."""
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
    """The groups Megatron's modules ask for, of a model without pipeline and context ranks."""
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
    """The teacher's head cut over the student's tensor ranks. Collective over the teacher's group, once."""
    weight = head_weight(chunk).detach()
    if teacher_group.size() != student_group.size():
        whole = torch.cat(_gather(weight, teacher_group)) if teacher_group.size() > 1 else weight
        weight = whole.chunk(student_group.size())[student_group.rank()].clone()
        if not chunk.share_embeddings_and_output_weights:
            chunk.output_layer.weight = None  # its own cut is not needed again
    # Multiplied in every chunk of tokens: converted once where a CPU would have to convert it each time.
    return weight.float() if weight.device.type == "cpu" else weight


def _gather(part: torch.Tensor, group: Any) -> list[torch.Tensor]:
    """Everyone's tensor, in the order of the group's ranks."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
