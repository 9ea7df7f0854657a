"""How the processes of a run are laid out, and every rule a layout must keep. Standard library only.

    world = tensor x context x data x pipeline      ranks count tensor first, then context, then data, then pipeline

`lay_out` collects everything that does not fit into one error, so that a recipe is mended in one go.
"""

from dataclasses import dataclass

from train.config import ModelConfig, ParallelConfig, RunConfig
from train.errors import RecipeError
from train.model.pattern import CUT, cut, layer_kinds


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of a run; `data` is what the others leave of the world."""

    world: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    data: int
    microbatches: int
    """Microbatches of one data-parallel rank in one step."""

    def describe(self) -> str:
        """The degrees in one short line, e.g. `TP2 PP2 DP1`."""
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        parts += [f"VP{self.virtual}"] * (self.virtual > 1) + [f"CP{self.context}"] * (self.context > 1)
        return " ".join([*parts, f"DP{self.data}"])


@dataclass(frozen=True)
class Coordinates:
    """A rank's place along each axis."""

    tensor: int
    context: int
    data: int
    pipeline: int


def rank_coordinates(layout: Layout, rank: int) -> Coordinates:
    """Where `rank` sits, in Megatron's default order (tensor fastest, pipeline slowest)."""
    rest, tensor = divmod(rank, layout.tensor)
    rest, context = divmod(rest, layout.context)
    pipeline, data = divmod(rest, layout.data)
    return Coordinates(tensor=tensor, context=context, data=data, pipeline=pipeline)


def lay_out(
    *, model: ModelConfig, parallel: ParallelConfig, run: RunConfig, row_tokens: int, world: int
) -> Layout:
    """The layout of a recipe on `world` processes. RecipeError lists every rule it breaks: value, place, remedy."""
    problems = [
        *_world_problems(parallel, world),
        *_shape_problems(model),
        *_tensor_problems(model, parallel, row_tokens),
        *_context_problems(model, parallel, row_tokens),
        *_pipeline_problems(model, parallel),
    ]
    degrees = parallel.tensor * parallel.pipeline * parallel.context
    data = max(1, world // degrees)
    per_turn = run.microbatch_rows * data
    if run.global_rows % per_turn:
        near = sorted({max(1, run.global_rows // per_turn) * per_turn, (run.global_rows // per_turn + 1) * per_turn})
        problems.append(
            f"run.global_rows={run.global_rows} is not a multiple of run.microbatch_rows={run.microbatch_rows} x "
            f"{data} data-parallel ranks. Use run.global_rows={' or '.join(map(str, near))}, or "
            f"run.microbatch_rows={_divisors_below(run.global_rows // data, run.microbatch_rows) if run.global_rows % data == 0 else 1}."
        )
    microbatches = max(1, run.global_rows // per_turn)
    if parallel.virtual_pipeline > 1 and microbatches % parallel.pipeline:
        problems.append(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs the microbatches of a step ({microbatches}) to "
            f"be a multiple of parallel.pipeline={parallel.pipeline}. Change run.global_rows or run.microbatch_rows."
        )
    if problems:
        raise RecipeError("\n".join(problems))
    return Layout(
        world=world,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        context=parallel.context,
        data=data,
        microbatches=microbatches,
    )


def _world_problems(parallel: ParallelConfig, world: int) -> list[str]:
    degrees = parallel.tensor * parallel.pipeline * parallel.context
    if world % degrees:
        return [
            f"parallel.tensor={parallel.tensor} x pipeline={parallel.pipeline} x context={parallel.context} = {degrees} "
            f"does not divide the {world} processes of this run. Start a multiple of {degrees} processes "
            f"(torchrun --nproc-per-node {degrees} -m train ...), or lower the degrees."
        ]
    return []


def _shape_problems(model: ModelConfig) -> list[str]:
    problems = []
    for parts, whole in (("kv_heads", "heads"), ("mamba_groups", "mamba_heads")):
        part, total = getattr(model, parts), getattr(model, whole)
        if total % part:
            problems.append(f"model.{parts}={part} does not divide model.{whole}={total}. Use {_choices(total)}.")
    return problems


def _tensor_problems(model: ModelConfig, parallel: ParallelConfig, row_tokens: int) -> list[str]:
    tensor = parallel.tensor
    problems = []
    kinds = set(layer_kinds(model.pattern))
    sizes = {"model.vocab": model.vocab}
    if "*" in kinds:
        sizes |= {"model.heads": model.heads, "model.kv_heads": model.kv_heads}
    if "M" in kinds:
        sizes |= {"model.mamba_heads": model.mamba_heads, "model.mamba_groups": model.mamba_groups}
    if "-" in kinds:
        sizes["model.ffn"] = model.ffn
    for name, size in sizes.items():
        if size % tensor:
            problems.append(f"parallel.tensor={tensor} does not divide {name}={size}. Use {_choices(size)}.")
    if parallel.sequence and tensor == 1:
        problems.append(
            "parallel.sequence=true needs parallel.tensor > 1: it splits the sequence over the tensor ranks. "
            "Use parallel.sequence=false."
        )
    if parallel.sequence and row_tokens % (tensor * parallel.context):
        problems.append(
            f"parallel.sequence=true splits data.row_tokens={row_tokens} over {tensor * parallel.context} ranks (tensor x "
            f"context), which does not divide. Use a multiple of {tensor * parallel.context}."
        )
    return problems


def _context_problems(model: ModelConfig, parallel: ParallelConfig, row_tokens: int) -> list[str]:
    context = parallel.context
    if context == 1:
        return []
    problems = []
    if row_tokens % (2 * context):
        problems.append(
            f"parallel.context={context} cuts a row into {2 * context} chunks, which does not divide "
            f"data.row_tokens={row_tokens}. Use a multiple of {2 * context}."
        )
    if "M" in layer_kinds(model.pattern) and model.mamba_heads % parallel.tensor == 0:
        heads = model.mamba_heads // parallel.tensor
        groups = max(1, model.mamba_groups // parallel.tensor)
        if heads % context:
            problems.append(
                f"parallel.context={context} does not divide the {heads} Mamba heads of a tensor rank "
                f"(model.mamba_heads={model.mamba_heads}). Use {_choices(heads)}."
            )
        if groups % context and context % groups:
            problems.append(
                f"parallel.context={context} neither divides nor is a multiple of the {groups} Mamba groups of a tensor "
                f"rank (model.mamba_groups={model.mamba_groups}). Use {_choices(groups)}."
            )
    return problems


def _pipeline_problems(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    problems = []
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        problems.append(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1. "
            f"Use parallel.virtual_pipeline=1."
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        problems.append(
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true. Set both, or neither."
        )
    stages = parallel.pipeline * parallel.virtual_pipeline
    if stages > 1 or CUT in model.pattern:
        try:
            cut(model.pattern, stages, model=model)
        except RecipeError as error:
            problems.append(str(error))
    return problems


def _choices(size: int) -> str:
    """The divisors of a size as a phrase: `1, 2, 4 or 8`."""
    divisors = [d for d in range(1, min(size, 1024) + 1) if size % d == 0]
    return str(divisors[0]) if len(divisors) == 1 else ", ".join(map(str, divisors[:-1])) + f" or {divisors[-1]}"


def _divisors_below(size: int, limit: int) -> int:
    """Largest divisor of `size` that is at most `limit`."""
    return max((d for d in range(1, min(size, limit) + 1) if size % d == 0), default=1)
