"""The plan of a run, from its typed recipe: layout, memory, time, cost and problems.

    Recipe, GPUs, device --checks--> problems --cost--> memory of each stage, time of a step --> days, energy, checkpoints

It needs no torch and no GPU and allocates no tensors, so it runs on a login node in a second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.plan.alignment import alignment_cost, with_rows_of_answers
from launch.plan.checks import Facts, facts_of, recipe_problems, recipe_warnings
from launch.plan.cost.activations import Modules
from launch.plan.cost.decode import DecodeSpeed, decode_table
from launch.plan.cost.device import Device, Format
from launch.plan.cost.efficiency import STRATUM
from launch.plan.cost.memory import RankMemory, rank_memory
from launch.plan.cost.time import Setting, StepTime, step_time
from launch.plan.cost.traffic import StepTraffic, step_traffic
from launch.plan.teacher import find_teacher, teacher_cost
from recipes.schema.errors import RecipeError
from recipes.schema.layout import Layout, lay_out
from recipes.schema.muon import layer_matrices
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import Flops, cut, flops_per_token, layer_kinds, parameters, visible_keys
from recipes.schema.recipe import Recipe
from recipes.schema.scaling import low_precision_linears, rule_numbers
from recipes.schema.units import GIB

USABLE = 0.97
"""Share of a device's memory that a plan may fill: the allocator cannot use all of it."""
STORAGE_PER_NODE = 2e9
"""Bytes/s that one node writes to shared storage. An assumption (arXiv 2407.21783: 2 TB/s sustained for 2,000 nodes)."""
TO_HOST = 20e9
"""Bytes/s from a GPU to its host's memory over PCIe 4, approximately."""


DECODE_CONTEXTS = (8_192, 32_768, 131_072)
"""Contexts for which a plan predicts the speed of generation."""


@dataclass(frozen=True)
class Checkpoints:
    """Size and times of a checkpoint."""

    size_bytes: float
    stall_s: float
    """Training waits this long while each GPU copies its share to the host."""
    write_s: float
    """Time to write it to shared storage in the background."""


@dataclass(frozen=True)
class MemoryCopies:
    """Host memory for copies of the state (`run.memory_copies`)."""

    rank_bytes: float
    """One copy of the fullest rank's state: its weights' range, masters, moments."""
    node_bytes: float
    """All copies on a node: two of each of its ranks, and two of each rank of another node."""


@dataclass(frozen=True)
class Plan:
    """Everything predicted about a run."""

    recipe: Recipe
    device: Device
    layout: Layout
    stages: tuple[str, ...]
    """Pattern of each model chunk, in layer order."""
    modules: Modules
    parameters: int
    active_parameters: int
    """Those that process one token; fewer with experts."""
    flops: Flops
    """Of one token: forward and backward, without recomputation."""
    memory: tuple[RankMemory, ...]
    """For each pipeline rank."""
    time: StepTime
    traffic: StepTraffic
    checkpoints: Checkpoints
    copies: MemoryCopies | None
    """None if the recipe makes no copies in memory."""
    problems: tuple[str, ...]
    """Reasons why the run would fail."""
    warnings: tuple[str, ...]
    """Settings that are allowed but costly."""

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.run.global_rows * self.recipe.data.row_tokens

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_step / self.layout.world / self.time.seconds

    @property
    def peak(self) -> float:
        """Dense bf16 peak (fp32 for an fp32 recipe) of one GPU: the denominator of MFU."""
        high = _high(self.recipe, self.device)
        return self.device.peak[high]

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: attention without the masked half, scan and head included."""
        return self.flops.total * self.tokens_per_s_per_gpu / self.peak

    @property
    def mfu_unmasked(self) -> float:
        """The same including the masked half of attention, as some publishers count it."""
        model, row = self.recipe.model, self.recipe.data.row_tokens
        kinds = layer_kinds(model.pattern)
        seen = kinds.count("*") * visible_keys(row) + kinds.count("w") * visible_keys(row, window=model.window_tokens)
        whole = sum(kind in "*w" for kind in kinds) * row
        missing = 12.0 * (whole - seen) * model.heads * model.head_dim
        return (self.flops.total + missing) * self.tokens_per_s_per_gpu / self.peak

    @property
    def fullest(self) -> RankMemory:
        return max(self.memory, key=lambda one: one.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= USABLE * self.device.memory_gib * GIB

    @property
    def hours(self) -> float:
        """Hours of the whole run, with saves, without failures."""
        every = self.recipe.checkpoint.every_steps
        saves = self.recipe.run.steps // every if every else 1
        return (self.recipe.run.steps * self.time.seconds + saves * self.checkpoints.stall_s) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.layout.world

    @property
    def decode(self) -> list[DecodeSpeed]:
        """Generation on one GPU: for each context that fits, one text and the largest batch. A reward model generates nothing."""
        if self.recipe.model.head == "scalar":
            return []
        return decode_table(self.recipe.model, self.device, DECODE_CONTEXTS)

    @property
    def energy_mwh(self) -> float:
        """Energy with the GPUs and their share of the host at full power, without cooling."""
        return self.gpu_hours * (self.device.watts + self.device.host_watts) / 1e6


def world_of(recipe: Recipe, gpus: int | None) -> int:
    """GPUs of a run: `gpus` if given, else the number of the launch group, else the smallest number that the degrees need."""
    if gpus is not None:
        return gpus
    degrees = recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context
    each = recipe.launch.gpus_per_node or recipe.launch.processes or 0
    return recipe.launch.nodes * each if each else degrees * max(1, recipe.launch.nodes)


def make_plan(
    recipe: Recipe, *, world: int, device: Device, stages: Sequence[str] | None = None, facts: Facts | None = None
) -> Plan:
    """Plan a run. Raises RecipeError with all problems if the layout is impossible; other problems are in the plan.

    stages: pattern of each chunk; None for the recipe's own cut. facts: result of `facts_of`, to reuse it for many layouts.
    """
    facts = facts or facts_of(recipe, device)
    problems = [str(problem) for problem in recipe_problems(recipe, facts, world=world)]
    try:
        layout = lay_out(
            model=recipe.model, parallel=recipe.parallel, run=recipe.run, row_tokens=recipe.data.row_tokens, world=world
        )
    except RecipeError as error:  # `problems` includes it
        raise RecipeError("\n".join(problems)) from error
    recipe = with_rows_of_answers(recipe, layout)
    layout = replace(layout, microbatches_per_step=recipe.run.global_rows // (recipe.run.microbatch_rows * layout.data))
    if stages is not None and len(stages) > 1:
        recipe = replace(recipe, model=replace(recipe.model, pattern="|".join(stages)))
    chunks = tuple(cut(recipe.model.pattern, layout.pipeline * layout.virtual, model=recipe.model))
    precision = recipe.precision
    is_te = precision.backend == "te" or (precision.backend == "auto" and precision.quantize_weights == "none")
    modules: Modules = "te" if is_te else "reference"
    setting = setting_of(recipe, layout=layout, stages=chunks, device=device)
    teacher = find_teacher(recipe, facts.disk.teacher)
    cost = teacher_cost(recipe, teacher.model, student=setting, modules=modules) if teacher.model is not None else None
    if cost is not None:
        setting = replace(setting, teacher_s=cost.seconds)
    aligned = alignment_cost(recipe, layout, stages=chunks)
    frozen = aligned.frozen if cost is None else (*[0.0] * (layout.pipeline - 1), cost.bytes)
    memory = tuple(
        rank_memory(
            recipe.model,
            parallel=recipe.parallel,
            precision=recipe.precision,
            layout=layout,
            rows=recipe.run.microbatch_rows,
            sequence=recipe.data.row_tokens,
            stage=stage,
            modules=modules,
            teacher=frozen[stage],
            caches=aligned.caches,
            distils=recipe.objective.kind == "distill",
            muon=recipe.optim.kind == "muon",
        )
        for stage in range(layout.pipeline)
    )
    plan = Plan(
        recipe=recipe,
        device=device,
        layout=layout,
        stages=chunks,
        modules=modules,
        parameters=parameters(recipe.model).total,
        active_parameters=parameters(recipe.model).active,
        flops=flops_per_token(recipe.model, recipe.data.row_tokens),
        memory=memory,
        time=step_time(setting),
        traffic=step_traffic(setting),
        checkpoints=checkpoints_of(recipe, layout=layout, device=device),
        copies=memory_copies_of(recipe, layout=layout, memory=memory, node=device.node),
        problems=tuple(dict.fromkeys([*problems, *teacher.problems])),
        warnings=(*recipe_warnings(recipe, layout, device, facts), *teacher.notes, *aligned.notes),
    )
    return replace(plan, problems=(*plan.problems, *_memory_problems(plan)))


def setting_of(recipe: Recipe, *, layout: Layout, stages: tuple[str, ...], device: Device) -> Setting:
    """Everything that the step time of a recipe depends on."""
    low = low_precision_linears(recipe.model, recipe.precision)
    layers = range(len(layer_kinds(recipe.model.pattern)))
    scaling, rules = recipe.precision.scaling, recipe.precision.rules
    form: Format = "fp4" if scaling == "nvfp4" else "fp8"
    return Setting(
        model=recipe.model,
        layout=layout,
        stages=stages,
        rows=recipe.run.microbatch_rows,
        sequence=recipe.data.row_tokens,
        device=device,
        low=form if low and scaling != "none" and form in device.peak else None,
        high=_high(recipe, device),
        scaling=scaling,
        high_precision_layers=frozenset(layer for layer in layers if layer not in low),
        rules={
            layer: {name: rules[number].scaling for name, number in names.items()}
            for layer, names in rule_numbers(recipe.model, recipe.precision).items()
        },
        split_sequence=recipe.parallel.sequence,
        recompute=1.0 if recipe.parallel.recompute == "full" else 0.0,
        overlap_grad_reduce=recipe.parallel.overlap_grad_reduce,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        muon=recipe.optim.muon if recipe.optim.kind == "muon" else None,
        software=STRATUM,
    )


def checkpoints_of(recipe: Recipe, *, layout: Layout, device: Device) -> Checkpoints:
    """Size and times of a checkpoint: weights in the recipe's format, fp32 masters if these are bf16, two fp32 moments (of Muon's
    matrices one)."""
    total = parameters(recipe.model).total
    size = float(total * (2 + 12 if recipe.precision.params == "bf16" else 4 + 8))
    if recipe.optim.kind == "muon":
        layers = layer_kinds(recipe.model.pattern)
        one = {kind: layer_matrices(recipe.model, kind, muon=recipe.optim.muon) for kind in set(layers)}
        size -= 4 * sum(math.prod(matrix) for kind in layers for matrix in one[kind])
    nodes = max(1, layout.world // device.node)
    return Checkpoints(
        size_bytes=size,
        stall_s=size / layout.world / TO_HOST,
        write_s=size / (STORAGE_PER_NODE * nodes),
    )


def memory_copies_of(recipe: Recipe, *, layout: Layout, memory: Sequence[RankMemory], node: int) -> MemoryCopies | None:
    """Host memory for copies of the state. node: GPUs of a node."""
    config = recipe.run.memory_copies
    if config.every_steps == 0:
        return None
    shards = layout.data * layout.context
    rank = max(one.weights / shards + one.masters + one.moments for one in memory)
    has_peer = config.peer_nodes > 0 and layout.world > node
    return MemoryCopies(rank, 2 * (1 + has_peer) * rank * min(node, layout.world))


def _high(recipe: Recipe, device: Device) -> Format:
    return "bf16" if recipe.precision.params == "bf16" and "bf16" in device.peak else "fp32"


def _memory_problems(plan: Plan) -> list[str]:
    """The problem that memory is too small, with the most effective remedies."""
    if plan.fits:
        return []
    rank, capacity = plan.fullest, plan.device.memory_gib * USABLE
    parallel = plan.recipe.parallel
    remedies = []
    if rank.activations > 0.25 * rank.total:
        if parallel.recompute == "none":
            remedies.append("parallel.recompute=full")
        if plan.recipe.run.microbatch_rows > 1:
            remedies.append(f"run.microbatch_rows={plan.recipe.run.microbatch_rows // 2}")
        if parallel.tensor > 1 and not parallel.sequence:
            remedies.append("parallel.sequence=true")
    if rank.masters + rank.moments > 0.2 * rank.total:
        remedies.append("more data-parallel GPUs (--gpus)")
    remedies.append(
        f"parallel.tensor={_next_degree(parallel, 'tensor')} or parallel.pipeline={_next_degree(parallel, 'pipeline')}"
    )
    return [
        f"memory: a rank of stage {rank.stage} needs {rank.total / GIB:.1f} GiB; {plan.device.name} has "
        f"{plan.device.memory_gib:.1f} GiB, and {capacity:.1f} GiB can be used. Use {', '.join(remedies)}; "
        f"`--search` lists layouts that fit."
    ]


def _next_degree(parallel: ParallelConfig, axis: str) -> int:
    return int(getattr(parallel, axis)) * 2
