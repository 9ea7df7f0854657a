"""How the processes of a run are laid out, and every rule of a layout.

    world = tensor x context x data x pipeline      ranks count tensor first, then context, then data, then pipeline
    experts: expert_tensor x expert x copies x pipeline = world, over the same ranks, expert_tensor first

`lay_out` reports all problems in one error, so that a recipe can be corrected at once. A layout that it returns obeys
Megatron-Core's rules and ours. It does not know the machine (memory, network).
"""

import math
from dataclasses import dataclass

from recipes.schema.errors import Problem, refuse
from recipes.schema.experts import experts_problems
from recipes.schema.model import ModelConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import ATTENTION, LayerKind, cut_problems, kinds_of, mtp_problems, pattern_problems
from recipes.schema.run import RunConfig

_LARGEST_DEGREE = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of a run. `data` is the world divided by the others."""

    world: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    data: int
    microbatches_per_step: int
    """Microbatches each data-parallel rank runs in one step (gradient accumulation)."""
    expert: int = 1
    expert_tensor: int = 1

    @property
    def expert_data(self) -> int:
        """Ranks of a stage that have the same experts: the data-parallel degree of expert weights."""
        return self.world // (self.pipeline * self.expert * self.expert_tensor)

    def describe(self) -> str:
        """The degrees in one short line, e.g. `TP2 PP2 DP1`."""
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        parts += [f"VP{self.virtual}"] * (self.virtual > 1) + [f"CP{self.context}"] * (self.context > 1)
        parts += [f"EP{self.expert}"] * (self.expert > 1) + [f"ETP{self.expert_tensor}"] * (self.expert_tensor > 1)
        return " ".join([*parts, f"DP{self.data}"])


@dataclass(frozen=True)
class Coordinates:
    """A rank's index along each axis, from 0."""

    tensor: int
    context: int
    data: int
    pipeline: int


def rank_coordinates(layout: Layout, rank: int) -> Coordinates:
    """The coordinates of `rank` in Megatron-Core's default order "tp-cp-ep-dp-pp": tensor fastest, pipeline slowest."""
    assert 0 <= rank < layout.world, f"rank {rank} is not one of the {layout.world} ranks"
    rest, tensor = divmod(rank, layout.tensor)
    rest, context = divmod(rest, layout.context)
    pipeline, data = divmod(rest, layout.data)
    return Coordinates(tensor=tensor, context=context, data=data, pipeline=pipeline)


def stages_of(layout: Layout) -> list[list[int]]:
    """The ranks of each pipeline stage."""
    each = layout.world // layout.pipeline
    return [list(range(stage * each, (stage + 1) * each)) for stage in range(layout.pipeline)]


def lay_out(*, model: ModelConfig, parallel: ParallelConfig, run: RunConfig, row_tokens: int, world: int) -> Layout:
    """The layout of a recipe on `world` processes. RecipeError has a line for each broken rule."""
    refuse(layout_problems(model=model, parallel=parallel, run=run, row_tokens=row_tokens, world=world))
    data = world // (parallel.tensor * parallel.pipeline * parallel.context)
    return Layout(
        world=world,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        context=parallel.context,
        data=data,
        microbatches_per_step=run.global_rows // (run.microbatch_rows * data),
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
    )


def layout_problems(
    *, model: ModelConfig, parallel: ParallelConfig, run: RunConfig, row_tokens: int, world: int | None
) -> list[Problem]:
    """Every rule that a layout breaks. world: None if the number of processes is not known."""
    problems = _switch_problems(parallel)
    wrong = [*pattern_problems(model.pattern), *mtp_problems(model)]
    problems += wrong
    if not wrong:
        kinds = kinds_of(model)
        problems += _shape_problems(model, kinds)
        problems += _tensor_problems(model, parallel, kinds)
        problems += _expert_problems(model, parallel, kinds)
        problems += _padding_problems(model, parallel)
        problems += _context_problems(model, parallel, kinds)
        problems += cut_problems(model.pattern, parallel.pipeline * parallel.virtual_pipeline)
    problems += _row_problems(parallel, row_tokens)
    if model.mtp.depths >= row_tokens - 1:
        text = f"model.mtp.depths={model.mtp.depths} predicts tokens beyond the rows of data.row_tokens={row_tokens}."
        problems.append(Problem("model.mtp.depths", text, f"Use at most {max(0, row_tokens - 2)}."))
    return problems if world is None else problems + _world_problems(parallel, run, world)


def _world_problems(parallel: ParallelConfig, run: RunConfig, world: int) -> list[Problem]:
    """Degrees that do not divide the processes, or processes that do not divide the rows of a step."""
    degrees = parallel.tensor * parallel.pipeline * parallel.context
    if world % degrees:
        text = (
            f"parallel.tensor={parallel.tensor} x pipeline={parallel.pipeline} x context={parallel.context} = {degrees}"
            f" does not divide the {world} process{'es' * (world > 1)} of this run."
        )
        remedy = (
            f"Start a multiple of {degrees} (torchrun --nproc-per-node {degrees} -m train ...), or lower the degrees"
            f"{_degree_that_fits(parallel, world)}."
        )
        return [Problem("parallel", text, remedy)]
    stage = world // parallel.pipeline
    if stage % (parallel.expert * parallel.expert_tensor):
        text = (
            f"parallel.expert={parallel.expert} x expert_tensor={parallel.expert_tensor} does not divide the {stage} ranks of a "
            f"pipeline stage (world / pipeline)."
        )
        remedy = f"Use parallel.expert=1 and expert_tensor=1, or degrees whose product is {_choices(stage)}."
        return [Problem("parallel.expert", text, remedy)]
    data = world // degrees
    microbatches, not_whole = divmod(run.global_rows, run.microbatch_rows * data)
    if not_whole:
        return _step_problems(run, data=data)
    if parallel.virtual_pipeline > 1 and microbatches % parallel.pipeline:
        turn = run.microbatch_rows * data * parallel.pipeline
        text = (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs the microbatches of a step ({microbatches}) to "
            f"be a multiple of parallel.pipeline={parallel.pipeline}."
        )
        remedy = f"Use run.global_rows={_nearest_multiples(run.global_rows, turn)}, or parallel.virtual_pipeline=1."
        return [Problem("parallel.virtual_pipeline", text, remedy)]
    return []


def _switch_problems(parallel: ParallelConfig) -> list[Problem]:
    """Options that need another option."""
    problems = []
    if parallel.sequence and parallel.tensor == 1:
        problems.append(
            Problem(
                "parallel.sequence",
                "parallel.sequence=true needs parallel.tensor > 1: it splits the sequence over the tensor ranks.",
                "Use parallel.sequence=false.",
            )
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        problems.append(
            Problem(
                "parallel.virtual_pipeline",
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1.",
                "Use parallel.virtual_pipeline=1.",
            )
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        problems.append(
            Problem(
                "parallel.overlap_param_gather",
                "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true.",
                "Set both, or neither.",
            )
        )
    return problems


def _degree_that_fits(parallel: ParallelConfig, world: int) -> str:
    """Which single degree to lower, and to what, so that the degrees divide `world`; empty if one is not enough."""
    degrees = parallel.tensor * parallel.pipeline * parallel.context
    for name in ("context", "pipeline", "tensor"):
        degree = getattr(parallel, name)
        for lower in range(degree - 1, 0, -1):
            if world % (degrees // degree * lower) == 0:
                return f", e.g. parallel.{name}={lower}"
    return ""


def _shape_problems(model: ModelConfig, kinds: set[LayerKind]) -> list[Problem]:
    """Rules of the model alone, for its kinds of layers."""
    problems = []
    for owners, part_name, whole_name in ((ATTENTION, "kv_heads", "heads"), (("M",), "mamba_groups", "mamba_heads")):
        part, whole = getattr(model, part_name), getattr(model, whole_name)
        if not kinds.isdisjoint(owners) and whole % part:
            text = f"model.{part_name}={part} does not divide model.{whole_name}={whole}."
            problems.append(Problem(f"model.{part_name}", text, f"Use {_choices(whole)}."))
    has_attention = not kinds.isdisjoint(ATTENTION)
    if has_attention and model.position == "rope" and model.head_dim % 2:
        text = f"model.head_dim={model.head_dim} is odd, but model.position=rope rotates pairs of channels."
        problems.append(Problem("model.head_dim", text, f"Use {model.head_dim + 1}, or model.position=none."))
    if model.rope_scaling != "none" and (model.position != "rope" or model.rope_factor <= 1):
        wrong = "position=none" if model.position != "rope" else f"rope_factor={model.rope_factor:g}"
        text = f"model.rope_scaling={model.rope_scaling} scales rotary angles, but model.{wrong}."
        remedy = "Use model.position=rope with model.rope_factor > 1, or model.rope_scaling=none."
        problems.append(Problem("model.rope_scaling", text, remedy))
    return problems


def _tensor_problems(model: ModelConfig, parallel: ParallelConfig, kinds: set[LayerKind]) -> list[Problem]:
    """Sizes that the tensor ranks do not divide. Key/value heads are never copied, so each rank needs at least one."""
    sizes = {"model.vocab": model.vocab}
    if not kinds.isdisjoint(ATTENTION):
        sizes |= {"model.heads": model.heads, "model.kv_heads": model.kv_heads}
    if "M" in kinds:
        sizes |= {"model.mamba_heads": model.mamba_heads, "model.mamba_groups": model.mamba_groups}
    if "-" in kinds:
        sizes["model.ffn"] = model.ffn
    if "E" in kinds and model.experts.shared_ffn:
        sizes["model.experts.shared_ffn"] = model.experts.shared_ffn
    broken = [f"{name}={size}" for name, size in sizes.items() if size % parallel.tensor]
    if not broken:
        return []
    fit = [degree for degree in range(1, min(sizes.values()) + 1) if all(size % degree == 0 for size in sizes.values())]
    text = f"parallel.tensor={parallel.tensor} does not divide {', '.join(broken)}."
    change = f"or change {'it' if len(broken) == 1 else 'them'}."
    return [Problem("parallel.tensor", text, f"Use {_phrase(fit)} (what all sizes of this model allow), {change}")]


def _expert_problems(model: ModelConfig, parallel: ParallelConfig, kinds: set[LayerKind]) -> list[Problem]:
    """Rules of `E` layers: sizes that the expert ranks do not divide, and layouts that would compute something else."""
    experts, found = model.experts, []
    if "E" not in kinds:
        for name in ("expert", "expert_tensor"):
            if (degree := getattr(parallel, name)) > 1:
                text = f"parallel.{name}={degree} splits experts, but model.pattern={model.pattern} has no `E` layer."
                found.append(Problem(f"parallel.{name}", text, f"Use parallel.{name}=1."))
        return found
    found = experts_problems(experts)
    if experts.count % parallel.expert:
        text = f"parallel.expert={parallel.expert} does not divide model.experts.count={experts.count}."
        found.append(Problem("parallel.expert", text, f"Use {_choices(experts.count)}."))
    if experts.ffn % parallel.expert_tensor:
        text = f"parallel.expert_tensor={parallel.expert_tensor} does not divide model.experts.ffn={experts.ffn}."
        found.append(Problem("parallel.expert_tensor", text, f"Use {_choices(experts.ffn)}."))
    if parallel.tensor > 1 and not parallel.sequence:
        text = (
            f"parallel.tensor={parallel.tensor} without parallel.sequence: every tensor rank would send the same tokens to the "
            f"experts of `E` layers."
        )
        found.append(Problem("parallel.sequence", text, "Use parallel.sequence=true, or parallel.tensor=1."))
    if experts.capacity is not None and parallel.tensor * parallel.context > 1:
        text = (
            f"model.experts.capacity={experts.capacity:g} with parallel.tensor={parallel.tensor} and "
            f"context={parallel.context}: each rank would count only its part of a microbatch and drop other tokens than one "
            f"process."
        )
        found.append(Problem("model.experts.capacity", text, "Use capacity=null, or tensor=1 and context=1."))
    return found


def _padding_problems(model: ModelConfig, parallel: ParallelConfig) -> list[Problem]:
    """Padding of the vocabulary that would leave the last tensor rank without a token."""
    most = model.vocab // parallel.tensor - 1
    if model.vocab_padding <= most or model.vocab % parallel.tensor:
        return []
    text = (
        f"model.vocab_padding={model.vocab_padding:,} leaves no token for the last rank, as parallel.tensor={parallel.tensor} "
        f"cuts model.vocab={model.vocab:,} into equal parts."
    )
    return [Problem("model.vocab_padding", text, f"Use at most {most:,}, and a smaller model.vocab.")]


def _row_problems(parallel: ParallelConfig, row_tokens: int) -> list[Problem]:
    """Rows that cannot be cut into 2 x context chunks (an early and a late one for each rank), or over the tensor ranks."""
    problems = []
    context, tensor = parallel.context, parallel.tensor
    whole = math.lcm(tensor * context, 2 * context) if context > 1 else tensor
    if context > 1 and row_tokens % (2 * context):
        text = (
            f"parallel.context={context} cuts a row into {2 * context} chunks, which does not divide "
            f"data.row_tokens={row_tokens}."
        )
        remedy = f"Use data.row_tokens={_nearest_multiples(row_tokens, 2 * context)}."
        problems.append(Problem("parallel.context", text, remedy))
    if parallel.sequence and row_tokens % (tensor * context):
        text = (
            f"parallel.sequence=true splits a row over {tensor * context} ranks (tensor={tensor} x context={context}), "
            f"which does not divide data.row_tokens={row_tokens}."
        )
        remedy = f"Use data.row_tokens={_nearest_multiples(row_tokens, whole)}."
        problems.append(Problem("parallel.sequence", text, remedy))
    return problems


def _context_problems(model: ModelConfig, parallel: ParallelConfig, kinds: set[LayerKind]) -> list[Problem]:
    """Rules of Mamba layers under context parallelism, which gives each rank the whole sequence for some of the heads
    (megatron.core.ssm.mamba_context_parallel)."""
    context, tensor = parallel.context, parallel.tensor
    if context == 1 or "M" not in kinds or model.mamba_heads % tensor or model.mamba_groups % tensor:
        return []
    heads, groups = model.mamba_heads // tensor, model.mamba_groups // tensor
    fit = [
        degree
        for degree in range(1, heads + 1)
        if heads % degree == 0 and (groups % degree == 0 or degree % groups == 0)
    ]
    problems = []
    if heads % context:
        text = (
            f"parallel.context={context} does not divide the {heads} Mamba heads of a tensor rank "
            f"(model.mamba_heads={model.mamba_heads}, parallel.tensor={tensor})."
        )
        problems.append(Problem("parallel.context", text, f"Use {_phrase(fit)}."))
    if groups % context and context % groups:
        text = (
            f"parallel.context={context} neither divides nor is a multiple of the {groups} Mamba groups of a tensor "
            f"rank (model.mamba_groups={model.mamba_groups}, parallel.tensor={tensor})."
        )
        problems.append(Problem("parallel.context", text, f"Use {_phrase(fit)}."))
    return problems


def _step_problems(run: RunConfig, *, data: int) -> list[Problem]:
    """The problem that the rows of a step are not whole microbatches for every rank, with numbers of rows that would be."""
    turn = run.microbatch_rows * data
    remedy = f"run.global_rows={_nearest_multiples(run.global_rows, turn)}"
    if run.global_rows % data == 0:
        share = run.global_rows // data
        fit = max(rows for rows in range(1, run.microbatch_rows + 1) if share % rows == 0)
        remedy += f", or run.microbatch_rows={fit}"
    text = (
        f"run.global_rows={run.global_rows} is not a multiple of run.microbatch_rows={run.microbatch_rows} x {data} "
        f"data-parallel ranks (world / (tensor x pipeline x context))."
    )
    return [Problem("run.global_rows", text, f"Use {remedy}.")]


def _nearest_multiples(value: int, step: int) -> str:
    """The multiples of `step` around `value`, as a phrase: `96 or 128`."""
    below = value // step * step
    return _phrase([multiple for multiple in (below, below + step) if multiple > 0])


def _choices(size: int) -> str:
    """The divisors of a size as a phrase: `1, 2, 4 or 8`; of a large size those that can be degrees."""
    return _phrase([divisor for divisor in range(1, min(size, _LARGEST_DEGREE) + 1) if size % divisor == 0])


def _phrase(numbers: list[int]) -> str:
    """Numbers as a phrase. The middle of a long list is left out."""
    words = [str(number) for number in numbers]
    if len(words) > 12:
        words = [*words[:8], "...", *words[-2:]]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"


def reads_whole_rows_only(parallel: ParallelConfig, backend: str) -> list[str]:
    """Settings with which the model that trains cannot generate text, because its layers need whole rows. backend:
    `rules.backend_name`."""
    whole = [
        f"parallel.{field}={str(value).lower()}"
        for field, value, plain in (
            ("pipeline", parallel.pipeline, 1),
            ("context", parallel.context, 1),
            ("expert", parallel.expert, 1),
            ("expert_tensor", parallel.expert_tensor, 1),
            ("sequence", parallel.sequence, False),
        )
        if value != plain
    ]
    return whole + (["the te backend"] if backend == "te" else [])
